"""Every public name has an example in its docstring, and every example in a docstring runs.

What an example may use without importing it: ``torch``, ``nn`` and ``paci_rt``, and for kernels ``device``.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import native
from support.interpreted import Interpreter

PUBLIC = (
    "paci_rt",
    "paci_rt.optim",
    "paci_rt.planner",
    "paci_rt.simulate",
    "paci_rt.schedules",
    "paci_rt.launch",
    "paci_rt.transport",
    "paci_rt.check",
    "paci_rt.checkpoint",
    "paci_rt.interop",
    "paci_rt.green",
    "paci_rt.errors",
    "paci_rt.trace",
    "paci_rt.action",
    "paci_rt.kernels",
)

NEEDS_A_GPU = {
    "paci_rt.green.SmPartition": "only a GPU has SMs, and there is no other way to get one of these",
    "paci_rt.green.SmPartitions": "likewise",
}
"""Names whose examples may be skipped from the first line to the last, and why."""

WITHOUT_A_GPU = {"paci_rt.errors.CudaError": "shows what a machine without a GPU says"}
SLOW = {"paci_rt.launch.run": "starts processes, which import torch"}

SUMMARY_WORDS = 30
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
IMPORT = re.compile(r"from \S+ import |import ")
SECTION = re.compile(r"^ *Example:\n(?P<body>(?: +\S.*\n|\n)+)", re.MULTILINE)


def module_named(name: str) -> types.ModuleType:
    """A module; two functions are named like the modules that they are in."""
    return importlib.import_module(name)


def public_names() -> dict[str, Any]:
    """Public classes and functions by name. Constants and type aliases have no docstring that Python keeps."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for module_name in PUBLIC:
        module = module_named(module_name)
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name
        ]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in seen:
                seen.add(id(value))
                found[f"{module_name}.{name}"] = value
    return found


NAMES = public_names()


def docstring_of(value: Any) -> str:
    """Its own, not the one of a class that it derives from."""
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return inspect.cleandoc(own or "") + "\n"


def example_of(name: str, value: Any) -> doctest.DocTest:
    """What stands under ``Example:``."""
    section = SECTION.search(docstring_of(value))
    body = inspect.cleandoc(section["body"]) if section else ""
    return doctest.DocTestParser().get_doctest(body + "\n", {}, name, None, 0)


def run(test: doctest.DocTest, **more: Any) -> tuple[int, str]:
    """How many lines have run, and what went wrong."""
    test.globs.update({"torch": torch, "nn": nn, "paci_rt": paci_rt, **more})
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    out = io.StringIO()
    runner.run(test, out=out.write, clear_globs=False)
    return runner.tries, out.getvalue()


def run_kernel_example(name: str, device: str) -> tuple[int, str]:
    return run(example_of(name, NAMES[name]), device=torch.device(device))


def marked(names: Iterator[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def test_the_names_are_those_of_the_package() -> None:
    assert len(NAMES) > 100
    for name in ("paci_rt.AdamW", "paci_rt.planner.plan", "paci_rt.simulate.simulate", "paci_rt.checkpoint.save"):
        assert name in NAMES
    assert NEEDS_A_GPU.keys() | WITHOUT_A_GPU.keys() | SLOW.keys() <= NAMES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_summary_and_an_example(name: str) -> None:
    text = docstring_of(NAMES[name])
    summary = re.split(r"(?<=[.:;])\s|\n\n", text, maxsplit=1)[0]
    assert 0 < len(summary.split()) <= SUMMARY_WORDS, f"the summary of {name}: {summary!r}"
    lines = example_of(name, NAMES[name]).examples
    assert lines, f"{name} has no Example: section with a line that begins with >>>"
    executed = [one for one in lines if doctest.SKIP not in one.options and not IMPORT.match(one.source)]
    assert bool(executed) != (name in NEEDS_A_GPU), f"{name}: {len(executed)} of {len(lines)} lines run"


@pytest.mark.parametrize("name", marked(name for name in NAMES if not name.startswith("paci_rt.kernels.")))
def test_an_example_runs(name: str) -> None:
    if name in WITHOUT_A_GPU and (torch.cuda.is_available() or not native.core().cuda):
        pytest.skip(f"{WITHOUT_A_GPU[name]}, with CUDA in the native core")
    tries, report = run(example_of(name, NAMES[name]))
    assert report == ""
    assert tries > 0 or name in NEEDS_A_GPU


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("paci_rt.kernels.")])
def test_an_example_of_a_kernel_runs(name: str, interpreter: Interpreter) -> None:
    tries, report = interpreter(run_kernel_example, name, "cpu")
    assert report == ""
    assert tries > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("paci_rt.kernels.")])
def test_an_example_of_a_kernel_runs_on_a_gpu(name: str) -> None:
    tries, report = run_kernel_example(name, "cuda")
    assert report == ""
    assert tries > 0


def other_examples() -> list[doctest.DocTest]:
    """Those of modules, methods and what is not public; they see the names of their module."""
    public = {(value.__module__, value.__qualname__) for value in NAMES.values()}
    found = []
    for one in pkgutil.walk_packages(paci_rt.__path__, "paci_rt."):
        if one.name.rpartition(".")[2] in ("__main__", "_C"):
            continue
        module = module_named(one.name)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            if test.examples and (one.name, test.name.removeprefix(one.name + ".")) not in public:
                found.append(test)
    return found


def test_every_other_example_of_the_package_runs() -> None:
    tests = other_examples()
    assert {"paci_rt.action", "paci_rt.optim.accumulator.GradAccumulator"} <= {test.name for test in tests}
    assert [(test.name, report) for test in tests if (report := run(test)[1])] == []


def test_these_checks_can_fail() -> None:
    class Nothing:
        pass

    class Inherits(paci_rt.PaciError):
        pass

    def wrong() -> None:
        """A sum.

        Example:
            In words.

            >>> torch.ones(2).sum()
            tensor(3.)

        Raises:
            ValueError: never.
        """

    assert not example_of("nothing", Nothing).examples
    assert not example_of("inherits", Inherits).examples
    test = example_of("wrong", wrong)
    assert [line.source for line in test.examples] == ["torch.ones(2).sum()\n"]
    with contextlib.redirect_stdout(io.StringIO()):
        tries, report = run(test)
    assert tries == 1
    assert "tensor(3.)" in report and "tensor(2.)" in report
