"""Fuzz targets: the arguments of stages, pipelines and steps, and checkpoints that were damaged."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import paci_rt
from fuzz_files import changed, changes
from fuzz_schedules import names, slacks, step_costs
from fuzz_support import REFUSED, Target, attempt, holds, often, small, some_of, weird, words
from paci_rt import checkpoint
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.schedules.policies import POLICIES

WIDTH = 3
inert = weird.filter(lambda value: not callable(value))
"""Callables of the user's may raise what they like."""
tensors = st.tuples(
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(
        [torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
    ),
    st.sampled_from(["plain", "plain", "strided", "expanded", "meta", "sparse", "grad", "nan", "parameter"]),
).map(lambda drawn: make_tensor(*drawn))


def make_tensor(shape: list[int], dtype: torch.dtype, how: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.ones(shape, dtype=dtype, device="meta" if how == "meta" else "cpu")
        if how == "strided" and value.dim() >= 2:
            value = value.transpose(0, 1)
        elif how == "expanded":
            value = torch.ones((), dtype=dtype).expand(shape)
        elif how == "sparse":
            value = value.to_sparse()
        elif how == "grad" and dtype.is_floating_point:
            value.requires_grad_()
        elif how == "nan" and dtype.is_floating_point:
            value = value * float("nan")
        elif how == "parameter" and dtype.is_floating_point:
            value = nn.Parameter(value)
    return value


good = st.integers(0, 12).map(lambda rows: torch.ones(rows, WIDTH))
nested = st.recursive(
    tensors | good | weird,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2) | st.tuples(inner, inner),
    max_leaves=4,
)


class Odd(nn.Module):
    """Returns what it should not."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.result = result

    def forward(self, x: Any) -> Any:
        return self.result


def shared() -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(linear, linear)


MODULES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "wide": lambda: nn.Linear(WIDTH + 1, WIDTH),
    "meta": lambda: nn.Linear(WIDTH, WIDTH, device="meta"),
    "bf16": lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16),
    "empty": nn.Identity,
    "lazy": lambda: nn.LazyLinear(WIDTH),
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    "shared": shared,
    "embedding": lambda: nn.Embedding(4, WIDTH),
    "sparse": lambda: nn.Embedding(4, WIDTH, sparse=True),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "none": lambda: Odd(None),
    "text": lambda: Odd("text"),
    "list": lambda: Odd([1, {"a": torch.ones(2)}]),
    "same": lambda: Odd(torch.ones(1, WIDTH)),
}
modules = often(st.just("linear"), st.sampled_from(list(MODULES))).map(lambda name: MODULES[name]())
trained = modules.filter(lambda module: next(module.parameters(), None) is not None)
"""torch's optimizers refuse a stage without parameters in their own words."""
LOSSES = [
    nn.MSELoss(),
    nn.MSELoss(reduction="none"),
    nn.CrossEntropyLoss(),
    lambda output, target: output.sum(),
    lambda output, target: 1.0,
    lambda: None,
]
OPTIMIZERS = [
    paci_rt.AdamW,
    paci_rt.SGD,
    lambda params: paci_rt.SGD(params, lr=0.1, momentum=0.9),
    lambda params: torch.optim.SGD([param for _, param in params], lr=0.1),
    lambda params: None,
    lambda params: paci_rt.AdamW(params[:1]),
    None,
]


def check_stage(case: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    module, place, options = case
    attempt("stage", lambda: paci_rt.PipelineStage(module, *place, **options))


stage_options = some_of(
    {
        "device": often(st.just("cpu"), st.sampled_from(["meta", "cuda", "cuda:9", "xyz", "cpu:3"]), words, weird),
        "input_args": nested,
        "output_args": nested,
        "output_grads": nested,
        "input_grads": nested,
        "group": st.none() | weird,
        "dw_builder": st.none() | weird,
        "get_mesh": st.none() | weird,
    }
)


def check_pipeline(case: tuple[list[Any], dict[str, Any], list[tuple[Any, Any]]]) -> None:
    stages, options, steps = case
    made = attempt("pipeline", lambda: paci_rt.LocalPipeline(stages, **options))
    if made is REFUSED:
        return
    for inputs, target in steps:
        attempt("step", partial(made.step, *inputs, target=target))
    attempt("step", made.drain)
    with contextlib.suppress(paci_rt.PaciError):
        made.close()


def check_step(case: tuple[str, int, Any, tuple[list[Any], Any], dict[str, Any], bool]) -> None:
    schedule, count, loss_fn, (inputs, target), kwargs, evaluates = case
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    made = paci_rt.LocalPipeline(
        layers,
        schedule=schedule,
        n_microbatches=count,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.SGD(params, lr=0.1),
    )
    call = made.eval if evaluates else made.step
    result = attempt("step", lambda: call(*inputs, target=target, **kwargs))
    if result is not REFUSED and isinstance(result, torch.Tensor) and evaluates:
        whole = layers[1](layers[0](inputs[0]))
        holds(torch.allclose(result, whole, rtol=1e-4, equal_nan=True), f"{case}")
    made.close()


kwarg = some_of(
    {
        "losses": st.none() | st.builds(list) | weird,
        "return_outputs": st.booleans(),
        "loss_kwargs": st.none() | st.just({}) | weird,
        "mask": nested,
    }
)

ties = often(
    st.just(()),
    st.lists(
        st.builds(
            TiedWeight,
            owner_stage=small(0, 2),
            owner=words | st.just("weight"),
            reader_stage=small(0, 2),
            reader=words | st.just("weight"),
        ),
        max_size=2,
    ),
    weird,
)
pipeline_options = st.fixed_dictionaries(
    {
        "n_microbatches": small(1, 4),
        "loss_fn": often(st.just(LOSSES[0]), st.sampled_from(LOSSES), inert),
        "optimizer": often(st.just(paci_rt.SGD), st.sampled_from(OPTIMIZERS), inert),
    },
    optional={
        "schedule": names,
        "slack": slacks,
        "policy": often(st.sampled_from([None, *POLICIES]), words, weird),
        "lookahead": often(st.sampled_from([None, True, False]), weird),
        "costs": often(st.none(), step_costs, weird),
        "chunks": small(1, 2),
        "buffers": often(st.sampled_from([None, 1, 2]), weird),
        "tied_weights": ties,
        "lr_scheduler": often(st.none(), inert),
        "device": often(st.none(), words, weird, st.lists(words, max_size=2)),
        "scale_grads": often(st.booleans(), weird),
    },
)
step_arguments = st.tuples(
    often(st.lists(good, min_size=1, max_size=1), st.lists(nested, max_size=2)), often(good, nested)
)
same_rows = st.integers(4, 8).map(lambda rows: ([torch.ones(rows, WIDTH)], torch.ones(rows, WIDTH)))


# ------------------------------------------------------------------------------------------------------ checkpoints


def pipeline() -> paci_rt.LocalPipeline:
    torch.manual_seed(0)
    return paci_rt.LocalPipeline(
        [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)],
        n_microbatches=2,
        loss_fn=nn.MSELoss(),
        optimizer=paci_rt.AdamW,
    )


@lru_cache(maxsize=1)
def saved() -> Path:
    """A good checkpoint, made once."""
    folder = Path(tempfile.mkdtemp(prefix="paci-rt-fuzz-"))
    made = pipeline()
    made.step(torch.ones(4, WIDTH), target=torch.ones(4, WIDTH))
    checkpoint.save(folder, made, extra={"seed": 1})
    made.close()
    return folder


def damage(folder: Path, number: int, how: str, flips: list[tuple[int, int]], index: Any) -> None:
    """Change one file of a checkpoint, or its index."""
    import json

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[number % len(files)]
    if how == "index":
        known = next(path for path in files if path.suffix == ".json")
        content = changed(json.loads(known.read_text(encoding="utf-8")), index)
        known.write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
        return
    raw = bytearray(file.read_bytes())
    if how == "flip":
        for at, byte in flips:
            if raw:
                raw[at % len(raw)] = byte
        file.write_bytes(raw)
    elif how == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "remove":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "swap":
        other = files[(number + 1) % len(files)]
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)


def check_checkpoint(case: tuple[int, str, list[tuple[int, int]], Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "saved"
        shutil.copytree(saved(), folder)
        damage(folder, *case)
        made = pipeline()
        before = [param.detach().clone() for stage in made.stages for param in stage.parameters()]
        attempt("checkpoint", lambda: checkpoint.read_index(folder))
        found = attempt("checkpoint", lambda: checkpoint.load(folder, made))
        after = [param.detach() for stage in made.stages for param in stage.parameters()]
        if found is REFUSED:
            holds(all(map(torch.equal, before, after)), f"{case} changed weights and was refused")
        made.close()


DAMAGES = ("flip", "flip", "index", "index", "index", "cut", "remove", "empty", "folder", "swap")
flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)

TARGETS = [
    Target(
        "stage", st.tuples(often(modules, weird), st.tuples(small(0, 2), small(1, 3)), stage_options), check_stage, 1
    ),
    Target(
        "pipeline",
        st.tuples(
            often(st.lists(trained, min_size=1, max_size=3), st.lists(weird, max_size=2), weird),
            pipeline_options,
            st.lists(often(same_rows, step_arguments), max_size=2),
        ),
        check_pipeline,
        15,
    ),
    Target(
        "step",
        st.tuples(
            st.sampled_from(["paci", "1f1b", "zb-h1", "gpipe"]),
            st.integers(1, 4),
            st.sampled_from(LOSSES[:3]),
            step_arguments,
            kwarg,
            st.booleans(),
        ),
        check_step,
        8,
    ),
    Target(
        "checkpoint", st.tuples(st.integers(0, 20), st.sampled_from(DAMAGES), flips, changes()), check_checkpoint, 15
    ),
]
