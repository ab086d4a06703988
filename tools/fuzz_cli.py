"""Fuzz targets: the command line. A command ends with 0, or with 2 and one line, and then has written nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from fuzz_files import GOOD, changed, changes
from fuzz_support import Target, Undocumented, counts, limit, often
from paci_rt import cli, schedules
from paci_rt.cli.app import parse
from paci_rt.schedules.policies import POLICIES
from paci_rt.train import run as train_run

NUMBERS = st.integers(-1, 12).map(str) | st.sampled_from(
    [
        "0",
        "1.5",
        "1e308",
        "-1e308",
        "nan",
        "inf",
        "-inf",
        "5e-324",
        "2147483648",
        "9" * 30,
        "9" * 5000,
        "1" * 400 + ".0",
        "1000000",
        "18014398509481984",
        "٣",
        "0x10",
        "1_000",
        " 3 ",
        "+3",
        "--3",
        "1e3",
        "",
    ]
)
LISTS = st.lists(NUMBERS, max_size=5).map(",".join)
WORDS = st.text(max_size=8) | st.sampled_from(
    ["\0", "a\nb", "\ud800", "x" * 3000, "auto", "none", "'", "%s", "{}", "~"]
)
NAMES = st.sampled_from(
    [*schedules.FAMILIES, *POLICIES, "gpt-tiny", "gpt-mini", "adamw", "sgd", "bf16", "cpu", "local", "shm"]
)
SIZES = st.sampled_from(["8GiB", "1e400GB", "0B", "1e-400TB", "500MB", "-1", "nanGB", "1..2", "8QB", "1e5/s"])
FILES = st.sampled_from(
    ["out.json", "no/such/folder/out.json", ".", "/", "/dev/null/x", "\0", "a\nb.json", "profile.json", ""]
)
COSTS = st.lists(st.sampled_from(["1", "0.5:1", "1e308", "nan", "-1", "2:2:2"]), max_size=6).map(",".join)
ANY = st.one_of(NUMBERS, LISTS, WORDS, NAMES, SIZES, FILES, COSTS)
SMALL = st.integers(1, 6).map(str)
FLAGS: dict[str, list[str]] = {}
for _command in ("train", "compare", "simulate", "plan"):
    _options = parse([_command]).parser._option_string_actions
    FLAGS[_command] = sorted(
        flag for flag in _options if flag.startswith("--") and flag not in ("--help", "--measure-link")
    )
FLAGS["train"].append("--no-such-option")


def value_for(flag: str) -> st.SearchStrategy[str]:
    if flag in ("--json", "--trace", "--plot", "--save-trace", "--out", "--resume", "--profile", "--data"):
        return often(FILES, ANY)
    if flag in (
        "--schedule",
        "--schedules",
        "--policy",
        "--policies",
        "--model",
        "--optimizer",
        "--dtype",
        "--device",
        "--transport",
    ):
        return often(NAMES, ANY)
    if flag in (
        "--stages",
        "--micro-batches",
        "--windows",
        "--accumulation",
        "--steps",
        "--chunks",
        "--seeds",
        "--repeats",
        "--rows",
    ):
        return often(SMALL, ANY)
    return often(st.one_of(SMALL, NUMBERS, LISTS, SIZES), ANY)


def arguments(command: str) -> st.SearchStrategy[list[str]]:
    def of(flag: str) -> st.SearchStrategy[list[str]]:
        given = value_for(flag)
        return st.one_of(
            given.map(lambda value: [flag, value]), given.map(lambda value: [f"{flag}={value}"]), st.just([flag])
        )

    some = st.lists(st.sampled_from(FLAGS[command]).flatmap(of), max_size=5)
    return some.map(lambda parts: [command, *(word for part in parts for word in part)])


ENVIRONMENT = st.fixed_dictionaries(
    {},
    optional={
        "RANK": st.sampled_from(["0", "1", "-1", "", "x", "999999999999"]),
        "WORLD_SIZE": st.sampled_from(["1", "2", "0", "x", ""]),
        "MASTER_ADDR": st.sampled_from(["127.0.0.1", "nowhere.invalid", ""]),
        "MASTER_PORT": st.sampled_from(["29500", "x", "99999"]),
        "LOCAL_RANK": st.sampled_from(["0", "x"]),
    },
)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check_command(case: tuple[list[str], dict[str, str], Any]) -> None:
    argv, environment, damage = case
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {**clean, **environment}, clear=True):
        os.chdir(folder)
        Path("profile.json").write_text(json.dumps(changed(GOOD, damage)), encoding="utf-8", errors="surrogatepass")
        had = tree(Path(folder))
        try:
            with (
                limit(30),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                mock.patch.object(train_run, "execute", side_effect=lambda config, **_: None),
                mock.patch("paci_rt.train.compare.compare", side_effect=ValueError("not run here")),
                mock.patch("paci_rt.train.gpt_blocks.profile_gpt", side_effect=ValueError("not measured here")),
            ):
                code = cli.main(argv)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 99
        except Undocumented:
            raise
        except BaseException as error:
            raise Undocumented(f"cli: a {type(error).__name__}: {str(error)[:300]!r} of {argv}") from error
        finally:
            os.chdir(before)
        left = tree(Path(folder))
    counts[f"cli: exit {code}"] += 1
    complain = err.getvalue()
    silent = (
        all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        and environment["RANK"] != "0"
    )
    if code == 0:
        return
    if code != 2:
        raise Undocumented(f"cli: exit {code} of {argv}: {complain[-300:]!r}")
    if not re.fullmatch(r"paci-rt: error: [^\n\r]{5,1400}\n", complain) and not (silent and not complain):
        raise Undocumented(f"cli: not one line of {argv} in {environment}: {complain[:400]!r}")
    if left != had:
        raise Undocumented(f"cli: {set(left) - set(had)} was written by {argv}")


commands = st.sampled_from(list(FLAGS)).flatmap(arguments) | st.lists(ANY, max_size=3)
few = often(st.just({}), ENVIRONMENT)

TARGETS = [Target("cli", st.tuples(commands, few, often(st.just([]), changes())), check_command, 8)]
