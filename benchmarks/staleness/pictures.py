"""Plots of the convergence benchmark: loss over tokens, and token overhead over delay."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from staleness.case import METHODS
from staleness.report import Row, Table
from staleness.tasks import make_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours.
COLOURS = {"flush": "#0072B2", "paci": "#D55E00", "look-ahead": "#009E73", "look-ahead shared": "#56B4E9"}
OTHERS = ("#CC79A7", "#E69F00", "#0F4C5C", "#000000", "#999999")
LINES = ("-", "--", ":", "-.")
DPI = 140


def draw(folder: Path, tables: Sequence[Table]) -> list[Path]:
    """``loss-STUDY.png`` for every study and ``overhead-delay.png`` for all of them; returns the paths.

    Raises:
        ValueError: matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        figure, axes = _figure(8.0, 5.0)
        _losses(axes, table)
        written.append(_save(figure, folder / f"loss-{table.study.name}.png"))
    figure, axes = _figure(8.0, 5.0)
    if _delays(axes, tables):
        written.append(_save(figure, folder / "overhead-delay.png"))
    return written


def _losses(axes: Axes, table: Table) -> None:
    """Mean curves at the best learning rates; a band from the lowest to the highest seed."""
    task = make_task(table.study.task, layers=table.study.layers)
    others = itertools.cycle(OTHERS)
    colours = dict(COLOURS)
    used: dict[str, int] = {}
    for row in table.rows:
        name = _kind(row.method)
        colour = colours.setdefault(name, next(others)) if name not in colours else colours[name]
        line = LINES[used.setdefault(name, 0) % len(LINES)]
        used[name] += 1
        points = _points(row)
        tokens = [update * task.units_per_update / 1e3 for update, _ in points]
        means = [statistics.fmean(losses) for _, losses in points]
        spread = [min(losses) for _, losses in points], [max(losses) for _, losses in points]
        label = row.method if METHODS[row.method].flushes else f"{row.method}, a = {row.accumulation}"
        axes.plot(tokens, means, line, color=colour, label=f"{label}, rate {row.rate:g}", linewidth=1.6)
        axes.fill_between(tokens, *spread, color=colour, alpha=0.15, linewidth=0)
    for values in table.thresholds.values():
        for value in values:
            axes.axhline(value, color="#BBBBBB", linewidth=0.8, zorder=0)
    last = [row.final[seed] for row in table.rows for seed in row.final]
    first = min((values[0] for values in table.thresholds.values()), default=max(last))
    axes.set_ylim(min(last) - 0.05, max(first, *last) + 0.6)
    axes.set_xlabel(f"thousand {task.unit}")
    axes.set_ylabel(f"held-back loss, nats per {task.unit.removesuffix('s')}")
    axes.set_title(table.study.question, fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _points(row: Row) -> list[tuple[int, list[float]]]:
    """Updates and the losses of all seeds then, where all have one."""
    by_update: dict[int, list[float]] = {}
    for run in row.runs:
        for update, loss in run.curve:
            by_update.setdefault(update, []).append(loss)
    return [(update, losses) for update, losses in sorted(by_update.items()) if len(losses) == len(row.runs)]


def _delays(axes: Axes, tables: Sequence[Table]) -> bool:
    """Overhead at the early threshold over the pipeline's largest delay, for AdamW; whether there was anything."""
    shown = False
    for method, marker in (("paci", "o"), ("look-ahead", "s"), ("look-ahead shared", "D")):
        for filled, short in ((True, False), (False, True)):
            points = []
            for table in tables:
                if table.study.shape != "cosine" or table.study.name in ("variants", "variants-4", "rivals", "quick"):
                    continue
                for row in table.rows:
                    if row.method == method and bool(row.overheads[0].short) == short:
                        points.append(((table.study.stages - 1) / row.accumulation, row.overheads[0].mean))
            if points:
                shown = True
                x, y = zip(*sorted(points), strict=True)
                face = COLOURS[method] if filled else "none"
                label = method + ("" if filled else " (never reached: at least this)")
                axes.scatter(x, y, marker=marker, color=COLOURS[method], facecolors=face, label=label)
    axes.axhline(1.0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("(P - 1) / a: windows between a forward of the first stage and its backward")
    axes.set_ylabel("tokens to the early loss over 1F1B-flush's")
    axes.legend(fontsize=8, frameon=False)
    return shown


def _kind(method: str) -> str:
    """What decides a method's colour."""
    return next((kind for kind in COLOURS if method == kind or method.startswith(f"{kind} ")), method)


def _figure(width_inch: float, height_inch: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--out draws with matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(width_inch, height_inch), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
