"""Fuzz targets: training configurations, profiles, plans, and files of tokens."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzz_support import REFUSED, Target, attempt, floats, holds, huge, often, small, some_of, weird, words
from paci_rt import schedules
from paci_rt.planner import BlockProfile, Profile, load_profile, parse_profile, plan
from paci_rt.schedules import policies
from paci_rt.train import config_file
from paci_rt.train.config import DTYPES, OPTIMIZERS, TrainConfig
from paci_rt.train.data import load_corpus
from paci_rt.train.families import FAMILIES, MODELS
from paci_rt.transport import TRANSPORTS

# ------------------------------------------------------------------------------------------------- configurations

CONFIG: dict[str, st.SearchStrategy[Any]] = {
    "schedule": often(st.sampled_from(list(schedules.FAMILIES)), words, weird),
    "stages": small(1, 6),
    "accumulation": small(1, 8),
    "chunks": small(1, 2),
    "slack": often(st.integers(0, 4), st.lists(st.integers(0, 3), max_size=4), st.just("auto"), huge, weird),
    "profile": often(st.none(), words, weird),
    "policy": often(st.sampled_from([None, *policies.POLICIES]), words, weird),
    "lookahead": st.sampled_from([None, True, False]),
    "step_costs": st.none()
    | st.builds(schedules.StepCosts, forward=st.lists(floats, max_size=4).map(tuple), hop=floats),
    "buffers": small(1, 2),
    "model": often(st.sampled_from(list(MODELS)), words, weird),
    "partition": often(st.none(), st.lists(st.integers(-1, 9), max_size=5).map(tuple), weird),
    "data": often(st.none(), words, weird),
    "steps": small(1, 100),
    "batch_size": small(1, 32),
    "seq_len": small(1, 128),
    "optimizer": often(st.sampled_from(OPTIMIZERS), words, weird),
    "dtype": often(st.sampled_from(list(DTYPES)), words, weird),
    "device": often(
        st.just("cpu"), st.sampled_from(["auto", "cuda", "cuda:0", "cuda:99", "cuda:٣", "tpu"]), words, weird
    ),
    "transport": often(
        st.sampled_from(["auto", "gloo", "shm", "local"]), st.sampled_from(list(TRANSPORTS)), words, weird
    ),
    "out": often(st.none(), words, weird),
    "resume": often(st.none(), words, weird),
    "trace": st.booleans(),
}
for _name in ("lr_steps", "warmup_steps", "seed", "eval_interval", "eval_batches", "save_interval", "threads", "port"):
    CONFIG[_name] = small(0, 50)
for _name in ("lr", "min_lr", "weight_decay", "beta1", "beta2", "momentum", "transfer_timeout"):
    CONFIG[_name] = often(st.floats(0, 0.99), floats, weird)
for _name in ("layers", "heads", "kv_heads", "width", "ffn_width", "vocab_size", "context"):
    CONFIG[_name] = often(st.none(), st.sampled_from([1, 2, 4, 8, 64, 300]), huge, weird)
CONFIG |= {
    "family": often(st.none(), st.sampled_from(list(FAMILIES)), words, weird),
    "rope_base": often(st.none(), floats, weird),
    "tied": often(st.none(), st.booleans(), weird),
    "warmup_share": often(st.floats(0, 0.99), floats, weird),
    "log_interval": small(1, 10),
    "log": often(st.none(), words, weird),
}
assert set(CONFIG) <= {field.name for field in fields(TrainConfig)}, "a new option: give it a strategy"


def check_config(options: dict[str, Any]) -> None:
    made = attempt("config", lambda: TrainConfig(**options))
    if made is REFUSED:
        return
    holds(sum(made.partition) == made.shape.layers and made.batch_size % made.accumulation == 0, f"{options}")
    holds(all(0 <= made.lr_factor(step) <= 1e6 for step in (0, 1, made.steps)) or made.min_lr > made.lr, f"{options}")
    json.dumps(made.to_json())
    text = attempt("config file", lambda: config_file.text_of(made))
    if text is REFUSED:  # a path that is no Unicode
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, config_file.NAME)
        path.write_text(text, encoding="utf-8")
        values = config_file.read(path)
    derived = values.pop(config_file.DERIVED, [])
    holds(list(made.derived) == derived, f"{options}")
    holds(TrainConfig(**values, trace=made.trace) == made, f"{options}: {text}")


def check_config_file(case: tuple[str, bytes]) -> None:
    """Any bytes, and lines that are nearly right: options, or one line that says what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.toml")
        path.write_bytes(case[0].encode("utf-8", "surrogatepass") + case[1])
        found = attempt("config file", lambda: config_file.read(path))
    if found is not REFUSED:
        holds(set(found) <= {*config_file.names(), config_file.RECIPE, config_file.DERIVED}, f"{case}")


_LINES = st.lists(
    st.builds(
        "{} = {}\n".format,
        st.sampled_from([*config_file.names(), "recipe", "derived", "json", "stepz", "a.b", '"x y"']) | words,
        st.sampled_from(
            ["1", "0.5", "true", '"auto"', '"default"', "[1, 2]", "{a = 1}", "nan", "1979-05-27", "'x'", "["]
        )
        | st.integers().map(str)
        | floats.map(repr)
        | words.map(json.dumps),
    )
    | st.sampled_from(["[table]\n", "[[steps]]\n", "\ufeff", "# \x00\n", "\r\n"]),
    max_size=4,
).map("".join)
CONFIG_FILES = st.tuples(_LINES, often(st.just(b""), st.binary(max_size=8)))


# -------------------------------------------------------------------------------------------- profiles and plans

_BLOCK = BlockProfile(
    name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
    parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
)  # fmt: skip
GOOD = Profile(
    blocks=(_BLOCK,) * 4,
    profiled={"model": "any", "dtype": "fp32", "rows": 2, "seq_len": 128, "threads": 1, "machine": {}},
    hop_s=1e-3,
).to_json()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | words | st.sampled_from([10**400, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values lie in a decoded file."""
    found = [at] if at else []
    if isinstance(value, dict):
        found += [path for key, inner in value.items() for path in _paths(inner, (*at, key))]
    elif isinstance(value, list):
        found += [path for key, inner in enumerate(value) for path in _paths(inner, (*at, key))]
    return found


def changed(good: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """``good`` with some values replaced, removed or added."""
    result = copy.deepcopy(good)
    for number, how, value in changes:
        paths = _paths(result)
        if not paths:
            return result
        *way, last = paths[number % len(paths)]
        holder = result
        for key in way:
            holder = holder[key]
        if how == "replace":
            holder[last] = value
        elif how == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[str(value)[:20]] = value
        else:
            holder.append(value)
    return result


def changes(how: tuple[str, ...] = ("replace", "replace", "remove", "add")) -> st.SearchStrategy[Any]:
    return st.lists(st.tuples(st.integers(0, 200), st.sampled_from(how), JSON_VALUES), max_size=3)


PLAN = {
    "stages": small(1, 4),
    "accumulations": often(st.lists(st.integers(1, 8), min_size=1, max_size=2), st.lists(weird, max_size=2), weird),
    "memory_limit_bytes": often(st.none(), floats, st.lists(floats, max_size=4), weird),
    "drift_limit": often(st.none(), small(0, 4)),
    "delay_limit": often(st.none(), st.just("measured"), small(0, 4)),
    "lookahead": st.sampled_from([None, True, False]),
    "device_speeds": often(st.none(), st.lists(floats, max_size=4), weird),
    "slack": often(st.just("auto"), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=4), weird),
    "chunks": often(st.just((2,)), st.lists(st.integers(-1, 4), max_size=2), weird),
    "policies": st.none() | st.lists(often(st.sampled_from(policies.POLICIES), words), max_size=2),
}


def check_profile(case: tuple[Any, dict[str, Any], list[str]]) -> None:
    damage, options, names = case
    profile = attempt("profile", lambda: parse_profile(changed(GOOD, damage)))
    if profile is REFUSED:
        return
    json.dumps(profile.to_json())
    options = {"stages": 2, "accumulations": [2, 4], "schedules": names, **options}
    found = attempt("plan", lambda: plan(profile, **options))
    if found is not REFUSED:
        holds(sum(found.chosen.partition) == profile.middle, f"{case}")


def check_profile_file(case: tuple[Any, list[tuple[int, int]], int]) -> None:
    damage, flips, end = case
    raw = bytearray(json.dumps(changed(GOOD, damage)).encode("utf-8", "surrogatepass"))
    for at, byte in flips:
        raw[at % len(raw)] = byte
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(raw[: max(0, len(raw) - end)])
        file.flush()
        attempt("profile file", lambda: load_profile(file.name))


flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)

# --------------------------------------------------------------------------------------------------------- tokens


def check_tokens(case: tuple[str, bytes, Any, Any]) -> None:
    suffix, content, vocab_size, seq_len, often = case
    content *= often
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"tokens{suffix}"
        if suffix == "/":
            path.mkdir()
            (path / "train.bin").write_bytes(content)
            (path / "val.bin").write_bytes(content[::-1])
        else:
            path.write_bytes(content)
        corpus = attempt("tokens", lambda: load_corpus(path, vocab_size=vocab_size, seq_len=seq_len))
        if corpus is REFUSED:
            return
        batch = attempt("tokens", lambda: corpus.batch(3, 2, seq_len, 1))
        if batch is not REFUSED:
            inputs, targets = batch
            holds(inputs.shape == targets.shape == (2, seq_len), f"{case}")
            holds(bool((inputs < vocab_size).all()) and bool((inputs[:, 1:] == targets[:, :-1]).all()), f"{case}")


contents = st.one_of(
    st.binary(max_size=300),
    st.lists(st.integers(0, 300), min_size=1, max_size=100).map(lambda tokens: np.array(tokens, "<u2").tobytes()),
    st.lists(st.integers(0, 300), min_size=1, max_size=100).map(lambda tokens: np.array(tokens, "<i4").tobytes()),
    st.text(min_size=1, max_size=200).map(lambda text: text.encode("utf-8", "replace")),
    st.lists(floats, max_size=50).map(lambda values: np.array(values, "<f8").tobytes()),
)

TARGETS = [
    Target("config", some_of(CONFIG), check_config, 1),
    Target("config file", CONFIG_FILES, check_config_file, 1),
    Target(
        "profile",
        st.tuples(
            changes(), some_of(PLAN), st.lists(st.sampled_from(["paci", "1f1b", "zb-h1"]), min_size=1, max_size=2)
        ),
        check_profile,
        6,
    ),
    Target("profile file", st.tuples(changes(), flips, st.integers(0, 40)), check_profile_file, 1),
    Target(
        "tokens",
        st.tuples(
            st.sampled_from([".bin", ".txt", "", "/"]),
            contents,
            often(st.sampled_from([256, 301, 50304]), st.integers(1, 70000)),
            often(st.integers(1, 16), st.integers(1, 400)),
            st.sampled_from([1, 1, 40]),
        ),
        check_tokens,
        2,
    ),
]
