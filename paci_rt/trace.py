"""One event record, whoever ran the action: its export for Perfetto, and its drawing for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paci_rt.action import Action, Op


@dataclass(frozen=True, slots=True)
class Event:
    """One executed or simulated action.

    Attributes:
        stage: pipeline stage.
        action: the action's string, for example ``"2F0"``.
        start_s, end_s: seconds on the run's monotonic clock (one clock for all processes of a host).
        version: local updates that the stage had applied when the action started.

    Example:
        >>> from paci_rt.trace import Event
        >>> event = Event(stage=2, action="2F0", start_s=1.0, end_s=1.5, version=0)
        >>> event.end_s - event.start_s
        0.5
    """

    stage: int
    action: str
    start_s: float
    end_s: float
    version: int


def perfetto(events: Iterable[Event]) -> dict[str, Any]:
    """Chrome trace-event JSON: one track a stage, times in microseconds from the first event.

    Format: "Trace Event Format", complete events (``ph: X``) and metadata (``ph: M``).

    Args:
        events: executed or simulated actions, in any order.

    Returns:
        JSON-ready values with the keys ``traceEvents`` and ``displayTimeUnit``.

    Example:
        >>> from paci_rt.trace import Event, perfetto
        >>> trace = perfetto([Event(0, "0F0", 10.0, 10.5, 0), Event(1, "1F0", 10.5, 11.0, 0)])
        >>> [(one["name"], one["ts"], one["dur"]) for one in trace["traceEvents"] if one["ph"] == "X"]
        [('0F0', 0.0, 500000.0), ('1F0', 500000.0, 500000.0)]
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
    """Write ``events`` to ``path``; open the file at ui.perfetto.dev or in ``chrome://tracing``.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import json, tempfile
        >>> from paci_rt.trace import Event, write_perfetto
        >>> with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        ...     write_perfetto(file.name, [Event(0, "0F0", 0.0, 0.5, 0)])
        ...     json.load(file)["displayTimeUnit"]
        'ms'
    """
    Path(path).write_text(json.dumps(perfetto(events)), encoding="utf-8")


_MOST_ROWS = 64


def format_timeline(
    events: Iterable[Event], *, ranks: int | None = None, rank_of: Callable[[int], int] | None = None, width: int = 160
) -> str:
    """Draw ``events`` with letters: what each rank did when, in columns of equal time.

    ::

        1 column = 1 ms
        rank 0  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---|
        rank 1  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3---|
        rank 2  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3---|
        . idle   - still running   | update

    A column is as long as the shortest F, B, I or W that took any time; starts and ends are rounded to columns. An
    update that is shorter than half a column is a ``|`` behind the action before it. What does not fit is counted in a
    last line.

    Args:
        events: executed or simulated actions.
        ranks: rows, by default as many as there are stages. Letters behind the numbers tell the stages of a row apart.
        rank_of: the row of a stage; by default ``s % ranks`` for stage ``s``.
        width: characters a line may have.

    Returns:
        Lines of text without a line end behind the last.

    Example:
        >>> from paci_rt.trace import Event, format_timeline
        >>> events = [Event(0, "0F0", 0.0, 1.0, 0), Event(1, "1F0", 1.0, 2.0, 0), Event(1, "1B0", 2.0, 4.0, 0)]
        >>> print(format_timeline(events))
        1 column = 1000 ms
        rank 0  F0
        rank 1  .  F0 B0---
        . idle   - still running
    """
    timed = sorted(((Action.parse(event.action), event) for event in events), key=lambda pair: pair[1].start_s)
    if not timed:
        return "no events"
    stages = 1 + max(action.stage for action, _ in timed)
    rows = stages if ranks is None else ranks
    row_of = rank_of or (lambda stage: stage % rows)
    durations = [event.end_s - event.start_s for action, event in timed if action.op is not Op.U]
    step_s = min((duration for duration in durations if duration > 0), default=0.0)
    if not step_s:
        return "no action took any time"
    origin_s = timed[0][1].start_s

    def column(at_s: float) -> int:
        return math.floor((at_s - origin_s) / step_s + 0.5 + 1e-9)

    lines = _Lines(rows, [_label(action, rows, stages) for action, _ in timed])
    for action, event in timed:
        lines.add(row_of(action.stage), _label(action, rows, stages), column(event.start_s), column(event.end_s))
    return "\n".join([f"1 column = {step_s * 1e3:.4g} ms", *lines.text(width), lines.legend(rows < stages)])


def _label(action: Action, ranks: int, stages: int) -> str:
    chunk = chr(ord("a") + action.stage // ranks % 26) if stages > ranks else ""
    return f"{action.op.value}{action.index}{chunk}"


class _Lines:
    """Rows of equally wide cells, each with a separator behind it."""

    def __init__(self, ranks: int, labels: list[str]) -> None:
        self.cell = max(map(len, labels))
        self.rows: list[list[str]] = [[] for _ in range(ranks)]
        self.columns = 0
        self.marked = False

    def add(self, row: int, label: str, first: int, end: int) -> None:
        """Put an action into columns ``first ... end - 1`` of a row; into no column, it becomes a mark."""
        cells = self.rows[row]
        while len(cells) < end:
            cells.append(".".ljust(self.cell) + " ")
        self.columns = max(self.columns, end)
        if first == end:
            if label.startswith("U") and end:
                cells[end - 1] = cells[end - 1][:-1] + "|"
                self.marked = True
            return
        text = label.ljust((self.cell + 1) * (end - first) - 1, "-" if end - first > 1 else " ") + " "
        for at in range(first, end):
            cells[at] = text[(at - first) * (self.cell + 1) : (at - first + 1) * (self.cell + 1)]

    def text(self, width: int) -> list[str]:
        """One line a rank, and what had to be left out."""
        names = [f"rank {row}" for row in range(len(self.rows))]
        margin = len(names[-1]) + 2
        shown = max(1, (width - margin) // (self.cell + 1))
        lines = [
            (name.ljust(margin) + "".join(cells[:shown])).rstrip()
            for name, cells in zip(names[:_MOST_ROWS], self.rows, strict=False)
        ]
        left_out = []
        if self.columns > shown:
            left_out.append(f"{self.columns - shown} more columns")
        if len(names) > _MOST_ROWS:
            left_out.append(f"{len(names) - _MOST_ROWS} more ranks")
        return [*lines, *([f"... {' and '.join(left_out)}"] if left_out else [])]

    def legend(self, chunks: bool) -> str:
        parts = [". idle", "- still running"]
        if self.marked:
            parts.append("| update")
        if chunks:
            parts.append("a b ... first, second ... stage of a rank")
        return "   ".join(parts)
