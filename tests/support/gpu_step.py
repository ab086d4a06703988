"""Steps of ``make gpu`` that run a few lines of Python, and a runner for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu_runner import Outcome, Runner, Step
from support.deadlines import deadline

FAST: dict[str, Any] = {"measure": "fast", "value": 0.95, "unit": "of copy", "target": ">= 0.92", "ok": True}
SLOW: dict[str, Any] = {"measure": "slow", "value": 0.5, "unit": "", "target": ">= 0.92", "ok": False}


def fake(name: str, *lines: str, limit_s: float | None = None, **options: Any) -> Step:
    """A step that runs a few lines of Python; ``out`` is the path to write to."""
    program = "\n".join(["import json, os, sys, time", "out = sys.argv[1]", *lines])
    return Step(
        name=name,
        does="fake",
        command=("{python}", "-c", program, "{out}"),
        limit_s=limit_s or deadline(60.0),
        **options,
    )


def writes(name: str, measures: list[dict[str, Any]], exit_code: int = 0) -> Step:
    document = json.dumps({"measures": measures, "rows": [1, 2]})
    return fake(name, f"open(out, 'w').write({document!r})", f"sys.exit({exit_code})")


def make_runner(tmp_path: Path, said: list[str], budget_s: float | None = None) -> Runner:
    (tmp_path / "scratch").mkdir()
    return Runner(
        folder=tmp_path,
        scratch=tmp_path / "scratch",
        log=tmp_path / "log",
        python=sys.executable,
        budget_s=budget_s or deadline(120.0),
        say=said.append,
    )


def only_row(outcome: Outcome) -> dict[str, Any]:
    (row,) = outcome.rows()
    return row


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be fetched does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
