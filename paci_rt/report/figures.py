"""The paper's two figures, from any set of runs: what a token buys, and what an hour buys."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paci_rt.report.plots import DPI, SCHEDULE_COLOURS, _count, schedule_colour
from paci_rt.report.runs import FoundRun, grouped
from paci_rt.report.spread import Ratio, first_reached, median, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ARROWS = 3


def loss_over_tokens(runs: Sequence[FoundRun]) -> Figure:
    """Validation loss against tokens, a colour a schedule and a line a seed."""
    figure, axis = _axes()
    _curves(axis, runs, lambda run: ([one.tokens for one in run.evals], [one.val_loss for one in run.evals]))
    axis.set_xlabel("tokens")
    axis.set_ylabel("validation loss, nats per token")
    axis.xaxis.set_major_formatter(lambda value, _: _count(value))
    axis.legend(frameon=False)
    return figure


def perplexity_over_time(runs: Sequence[FoundRun], thresholds: Sequence[float], baseline: str) -> Figure:
    """Perplexity against hours of training, with an arrow at each threshold from the baseline to the quickest other.

    Args:
        thresholds: losses, in nats per token. baseline: a label of the runs.
    """
    figure, axis = _axes()
    unit, name = unit_of_time(runs)
    _curves(
        axis,
        runs,
        lambda run: (
            [one.elapsed_s / unit for one in run.evals],
            [math.exp(min(one.val_loss, 700)) for one in run.evals],
        ),
    )
    axis.set_yscale("log")
    axis.set_xlabel(f"{name} of training")
    axis.set_ylabel("validation perplexity")
    axis.yaxis.set_major_formatter(lambda value, _: _count(value))
    axis.yaxis.set_minor_formatter(lambda value, _: _count(value))
    few = thresholds[-1::-2][:MOST_ARROWS] if len(thresholds) > MOST_ARROWS else thresholds
    for loss in few:
        _arrow(axis, runs, loss, baseline, unit)
    axis.legend(frameon=False)
    return figure


def unit_of_time(runs: Sequence[FoundRun]) -> tuple[float, str]:
    """Seconds of the unit that the longest run is best told in, and its name."""
    longest = max(run.evals[-1].elapsed_s for run in runs)
    return (3600.0, "hours") if longest >= 1800 else (60.0, "minutes") if longest >= 60 else (1.0, "seconds")


def times_to(runs: Sequence[FoundRun], loss: float) -> list[float | None]:
    """Seconds at which each run came down to ``loss``."""
    return [first_reached(run.evals, loss)[1] for run in runs]


def speedup(groups: dict[str, list[FoundRun]], baseline: str, label: str, loss: float) -> Ratio | None:
    """How many times as fast as the baseline, over the seeds that both have."""
    both = {run.seed for run in groups[baseline]} & {run.seed for run in groups[label]}
    mine, other = ({run.seed: run for run in groups[name] if run.seed in both} for name in (baseline, label))
    return ratio(*(times_to([some[seed] for seed in sorted(both)], loss) for some in (mine, other)))


def _arrow(axis: Axes, runs: Sequence[FoundRun], loss: float, baseline: str, unit: float) -> None:
    """From the baseline's time to that of the schedule that got there first."""
    groups = grouped(runs)
    times = {label: median(times_to(some, loss)) for label, some in groups.items()}
    start = times.get(baseline)
    others = [(seconds, label) for label, seconds in times.items() if label != baseline and seconds]
    if not start or not others:
        return
    seconds, label = min(others)
    one = speedup(groups, baseline, label, loss)
    height = math.exp(min(loss, 700))
    style: dict[str, Any] = {"arrowstyle": "->", "color": "#333333", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=(seconds / unit, height), xytext=(start / unit, height), arrowprops=style, zorder=6)
    words = f"{start / seconds:.2f}×" if one is None else f"{one.value:.2f}×"
    if one is not None and one.differs is False:
        words += " (no difference)"
    place = ((seconds + start) / 2 / unit, height)
    axis.annotate(words, xy=place, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9, zorder=7)


def as_png(figure: Figure) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white")
    return stream.getvalue()


def as_svg(figure: Figure) -> str:
    """The picture for a page: text stays text, and nothing is fetched from elsewhere."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "paci_rt"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    whole = stream.getvalue()
    return whole[whole.index("<svg") :]


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=DPI)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.11, 0.13, 0.86, 0.83))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis


def colours_of(runs: Sequence[FoundRun]) -> dict[str, str]:
    """A colour for each label."""
    labels = list(dict.fromkeys(run.label for run in runs))
    return {label: schedule_colour(label, [*SCHEDULE_COLOURS, *labels]) for label in labels}


def _curves(axis: Axes, runs: Sequence[FoundRun], points: Any) -> None:
    colours = colours_of(runs)
    for label, some in grouped(runs).items():
        for at, run in enumerate(some):
            x, y = points(run)
            name = label if at == 0 else None
            axis.plot(x, y, color=colours[label], label=name, linewidth=1.5, marker="o", markersize=3, alpha=0.9)
    axis.set_xlim(left=0)
