"""What every benchmark prints and writes the same way: the machine, the table, the verdict, the JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from paci_rt.report.machine import machine


def median_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Right-aligned columns, the first left-aligned."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in [list(columns), *cells]) for at in range(len(columns))]
    for row in [list(columns), *cells]:
        first, *rest = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip())


def integer(least: int, problem: str = "is too small") -> Callable[[str], int]:
    """An argparse type: an integer of at least ``least``; ``problem`` says what is wrong with a smaller one."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} {problem}: give at least {least}")
        return value

    parse.__name__ = "integer"  # argparse names it where the text is not a number
    return parse


positive = integer(1)


def list_of(convert: Any) -> Any:
    """An argparse type: values with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def measure(
    name: str,
    value: float | None,
    unit: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    note: str | None = None,
) -> dict[str, Any]:
    """A row of ``make gpu``'s table: see ``tools/gpu_runner.py``.

    Args:
        name: what was measured.
        value: None where it could not be; ``note`` then says why. What is not finite reaches no target.
        unit: of the value.
        at_least, at_most: the target, one of them or none, where the row only informs.
    """
    target = None
    if at_least is not None or at_most is not None:
        target = f">= {at_least:.3g}" if at_least is not None else f"<= {at_most:.3g}"
    ok = None
    if value is not None and target is not None:
        ok = bool(value >= at_least) if at_least is not None else bool(value <= at_most)  # type: ignore[operator]
    if value is not None and not math.isfinite(value):  # JSON has no such numbers
        value, ok, note = None, None if target is None else False, f"it was {value}"
    row = {"measure": name, "value": value, "unit": unit, "target": target, "ok": ok}
    return row if note is None else {**row, "note": note}


def could_not(name: str, error: BaseException) -> dict[str, Any]:
    """The row of what failed instead of giving a number; it counts as missed."""
    reason = (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0]
    return {**measure(name, None, note=reason), "target": "to run", "ok": False}


def write_json(path: Path | str, document: dict[str, Any]) -> None:
    """All of it or nothing, so that a benchmark that is ended early leaves what it wrote last."""
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def write_measures(
    benchmark: str, measures: list[dict[str, Any]], details: dict[str, Any], json_path: str | None
) -> None:
    """Measures and details as JSON, as far as they are known by now."""
    if json_path:
        document = {"benchmark": benchmark, "machine": {**machine(), **gpu_facts()}, "measures": measures, **details}
        write_json(json_path, document)


def gpu_facts() -> dict[str, Any]:
    """What a GPU's numbers depend on beside the machine; empty without one."""
    if not torch.cuda.is_available():
        return {}
    import triton

    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}


def finish_measures(
    benchmark: str, measures: list[dict[str, Any]], details: dict[str, Any], json_path: str | None
) -> int:
    """Write measures and details as JSON, print the measures and the verdict; returns the exit code."""
    bad = [row for row in measures if row["ok"] is False]
    for row in measures:
        value = "-" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
        word = "MISSED" if row["ok"] is False else "OK" if row["ok"] else ""
        note = f"({row['note']})" if row.get("note") else ""
        print(f"{row['measure']:52s} {value:>24s}  {row['target'] or '':12s} {word} {note}".rstrip())
    write_measures(benchmark, measures, details, json_path)
    print("FAILED" if bad else "OK")
    return 1 if bad else 0


def finish(benchmark: str, rows: list[dict[str, Any]], missed: Sequence[str], json_path: str | None) -> None:
    """Write the JSON, print what fell short, end with OK or FAILED and the exit code."""
    if json_path:
        document = {"benchmark": benchmark, "machine": machine(), "rows": rows, "missed": list(missed)}
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for line in missed:
        print(f"below what was asked: {line}")
    print("FAILED" if missed else "OK")
    sys.exit(1 if missed else 0)
