"""The plot of ``comm_overlap.py``: hidden against exposed communication."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlap.report import Row, size
from overlap.wires import WIRES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HIDDEN, EXPOSED, ALONE = "#56B4E9", "#D55E00", "#000000"  # from Okabe and Ito's colours
PANEL_INCH, BAR_INCH, PANEL_HEIGHT_INCH, LEGEND_INCH = 0.9, 0.45, 3.2, 0.9
DPI = 140


def check(path: str | None) -> None:
    """Raise ValueError where a picture is asked for that cannot be drawn."""
    if path is None:
        return
    if Path(path).suffix != ".png":
        raise ValueError(f"--plot {path}: name a .png file")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot draws with matplotlib, which is not installed: pip install matplotlib")


def draw(path: str, rows: Sequence[Row], title: str) -> None:
    """A row of panels a kind and length of compute, a panel a message size, a bar a transport; microseconds a step.

    The lower part of a bar is exposed communication, the upper part what compute hides of the transfer; the line
    across is the transfer alone. Exposed is more than the transfer where both disturb each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    overlap = [row for row in rows if row["measure"] == "overlap"]
    kinds = list(dict.fromkeys(_kind(row) for row in overlap))
    sizes = sorted({row["bytes"] for row in overlap})
    most = max(len({row["transport"] for row in overlap if _kind(row) == kind}) for kind in kinds)
    width = max(7.0, 1.0 + len(sizes) * (PANEL_INCH + BAR_INCH * most))
    height = LEGEND_INCH + len(kinds) * PANEL_HEIGHT_INCH
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), len(sizes), squeeze=False)
    for panels, kind in zip(grid, kinds, strict=True):
        names = sorted({row["transport"] for row in overlap if _kind(row) == kind}, key=list(WIRES).index)
        for axes, nbytes in zip(panels, sizes, strict=True):
            case = {row["transport"]: row for row in overlap if _kind(row) == kind and row["bytes"] == nbytes}
            axes.set_visible(bool(case))
            _panel(axes, names, case)
            axes.set_title(f"messages of {size(nbytes)}", fontsize=10)
        device, compute, milliseconds = kind
        panels[0].set_ylabel(f"µs a step\n{compute} {milliseconds:g} ms, {device}", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _kind(row: Row) -> tuple[str, str, float]:
    return row["device"], row["compute"], row["asked_compute_ms"]


def _panel(axes: Axes, names: Sequence[str], case: dict[str, Any]) -> None:
    drawn = [(at, case[name]) for at, name in enumerate(names) if name in case]
    places = [at for at, _ in drawn]
    exposed = [max(0.0, row["exposed_us"]) for _, row in drawn]
    hidden = [max(0.0, row["transfer_us"] - shown) for (_, row), shown in zip(drawn, exposed, strict=True)]
    axes.bar(places, exposed, color=EXPOSED, width=0.7, label="exposed: both minus compute alone")
    axes.bar(places, hidden, bottom=exposed, color=HIDDEN, width=0.7, label="hidden behind compute")
    axes.hlines(
        [row["transfer_us"] for _, row in drawn],
        [at - 0.42 for at in places],
        [at + 0.42 for at in places],
        color=ALONE,
        linewidth=1.6,
        label="transfer alone",
    )
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_xlim(-0.7, len(names) - 0.3)
    highest = max((max(row["transfer_us"], shown) for (_, row), shown in zip(drawn, exposed, strict=True)), default=1.0)
    axes.set_ylim(0, 1.06 * highest)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
