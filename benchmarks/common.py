"""What every benchmark prints and writes the same way: the machine, the table, the verdict, the JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paci_rt.train.machine import machine


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


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def list_of(convert: Any) -> Any:
    """An argparse type: values with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def finish(benchmark: str, rows: list[dict[str, Any]], missed: Sequence[str], json_path: str | None) -> None:
    """Write the JSON, print what fell short, end with OK or FAILED and the exit code."""
    if json_path:
        document = {"benchmark": benchmark, "machine": machine(), "rows": rows, "missed": list(missed)}
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for line in missed:
        print(f"below what was asked: {line}")
    print("FAILED" if missed else "OK")
    sys.exit(1 if missed else 0)
