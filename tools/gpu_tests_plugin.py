"""Plugin of pytest for ``gpu_tests.py``: records each test as it begins and ends.

So a process that hangs or dies loses one test, and not the results of all.

Lines of JSON go to ``--record``: ``{"collected": [names]}``, ``{"begins": name}`` and ``{"ends": name, "outcome":
"passed" | "failed" | "skipped", "message": text, "seconds": number}``. Tests that are in the file already are left out.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

SPOILED = 71
"""Exit code of a process whose CUDA context a test has spoiled: what would follow there could only fail."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="where results go, test by test")
    parser.addoption("--test-limit-s", type=float, default=60.0, help="seconds after which a test ends its process")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Recorder(config), "gpu-tests-recorder")


def read(record: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that was cut off by the end of its process is left out."""
    entries = []
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class Recorder:
    """Writes the record of one process."""

    def __init__(self, config: pytest.Config) -> None:
        self._path, self._limit_s = Path(config.getoption("--record")), config.getoption("--test-limit-s")
        self._known = {entry.get("ends") for entry in read(self._path)}
        self._found: dict[str, Any] = {}
        # pytest has put another file in place of stderr; where a test hung is to be read later.
        self._traces = self._path.with_suffix(".traces").open("a", encoding="utf-8")

    def _write(self, **entry: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)  # behind the choice by marks
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._known]
        items[:] = [item for item in items if item.nodeid not in self._known]
        config.hook.pytest_deselected(items=done)
        self._write(collected=[item.nodeid for item in items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._found = {"outcome": "passed", "message": "", "seconds": 0.0}
        self._write(begins=nodeid)
        # A thread of C, which needs no interpreter lock to end the process.
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=self._traces)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._found["seconds"] += report.duration
        if report.failed and self._found["outcome"] != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            said = str(report.longrepr) if crash is None else crash.message
            self._found |= {"outcome": "failed", "message": f"{report.when}: {said}"[:500]}
        elif report.skipped and self._found["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._found |= {"outcome": "skipped", "message": reason[:500]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        trouble = spoiled() if self._found["outcome"] == "failed" else None
        faulthandler.cancel_dump_traceback_later()
        self._write(ends=nodeid, **self._found)
        if trouble is not None:
            print(f"\n{nodeid} has left CUDA unusable ({trouble}): a new process goes on", flush=True)
            os._exit(SPOILED)


def spoiled() -> str | None:
    """What CUDA says after a failure, None where all is well or CUDA is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception as error:  # of whatever type: it is told
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
