from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is there: without it, on some CPUs, MKL's products depend in their last bit on where a matrix lies.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import torch

from support.interpreted import Interpreter
from support.pool import WorkerPool

torch.set_num_threads(1)
# The scripts' own modules. First, since `kernels` is both a benchmark and the folder of paci_rt.kernels.
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("benchmarks", "tools")]


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore Ctrl-C, and so would the programs that tests start in order to interrupt them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Whole folders of tests run in three processes, where pytest-xdist is there and ``-n`` says nothing else.

    Many tests wait for processes of their own, or for a deadline, so that three fit on two cores.
    """
    option = config.option
    if (
        hasattr(config, "workerinput")
        or "PYTEST_XDIST_WORKER" in os.environ
        or getattr(option, "numprocesses", 0) is not None
    ):
        return  # a worker itself, no pytest-xdist, or told otherwise
    folders = all(Path(path.split("::")[0]).is_dir() for path in config.args)
    if folders and not option.usepdb and not option.collectonly and (os.cpu_count() or 1) > 1:
        option.numprocesses, option.dist = 3, "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in ``slow.txt`` and ``long.txt``, which ``tools/slow_tests.py`` writes from measured times, have that
    mark."""
    for mark in ("slow", "long"):
        names = set((Path(__file__).parent / f"{mark}.txt").read_text(encoding="utf-8").splitlines())
        for item in items:
            if item.nodeid in names:
                item.add_marker(getattr(pytest.mark, mark))


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """Four processes, of which each test takes some, in a gloo group of its own."""
    pool = WorkerPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Calls functions in a process where Triton kernels run on the CPU."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
