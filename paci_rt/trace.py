"""One event record, whoever ran the action, and its export for Perfetto and ``chrome://tracing``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paci_rt.action import Action


@dataclass(frozen=True, slots=True)
class Event:
    """One executed or simulated action.

    Attributes:
        stage: pipeline stage.
        action: the action's string, for example ``"2F0"``.
        start_s, end_s: seconds on the run's monotonic clock (one clock for all processes of a host).
        version: local updates that the stage had applied when the action started.
    """

    stage: int
    action: str
    start_s: float
    end_s: float
    version: int


def perfetto(events: Iterable[Event]) -> dict[str, Any]:
    """Chrome trace-event JSON: one track a stage, times in microseconds from the first event.

    Format: "Trace Event Format", complete events (``ph: X``) and metadata (``ph: M``).
    """
    ordered = sorted(events, key=lambda event: (event.start_s, event.stage))
    origin = ordered[0].start_s if ordered else 0.0
    records: list[dict[str, Any]] = []
    for stage in sorted({event.stage for event in ordered}):
        named = {"ph": "M", "pid": 0, "tid": stage}
        records.append({**named, "name": "thread_name", "args": {"name": f"stage {stage}"}})
        records.append({**named, "name": "thread_sort_index", "args": {"sort_index": stage}})
    for event in ordered:
        action = Action.parse(event.action)
        records.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": event.stage,
                "name": event.action,
                "cat": action.op.value,
                "ts": (event.start_s - origin) * 1e6,
                "dur": (event.end_s - event.start_s) * 1e6,
                "args": {"version": event.version, "index": action.index},
            }
        )
    return {"traceEvents": records, "displayTimeUnit": "ms"}


def write_perfetto(path: str | Path, events: Iterable[Event]) -> None:
    """Write ``events`` to ``path``; open the file at ui.perfetto.dev or in ``chrome://tracing``."""
    Path(path).write_text(json.dumps(perfetto(events)), encoding="utf-8")
