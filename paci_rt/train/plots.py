"""Pictures: loss over tokens and over time, and what each stage did when.

Colours are from the set of Okabe and Ito, which people with any kind of colour vision can tell apart. matplotlib is
optional (``pip install "paci-rt[plot]"``) and used without its global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paci_rt.action import Action
from paci_rt.trace import Event

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACTION_COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#009E73", "U": "#D55E00"}
ACTION_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input-gradient half",
    "W": "weight-gradient half",
    "U": "update",
}
SCHEDULE_COLOURS = {"paci": "#D55E00", "1f1b": "#0072B2", "gpipe": "#009E73", "async-1f1b": "#CC79A7"}
OTHER_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#F0E442")
DPI = 140
POINTS_PER_INCH = 72


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Validation loss of one run: nats per token at ``tokens`` and at ``elapsed_s`` of training.

    Attributes:
        label: stands in the legend, once; curves of equal labels (seeds) share their colour.
        schedule: decides the colour.
        reached: tokens and seconds at which the target was reached, if it was.
    """

    label: str
    schedule: str
    tokens: Sequence[float]
    elapsed_s: Sequence[float]
    val_loss: Sequence[float]
    reached: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One schedule in a timeline: its events from ``start_s`` on, on the events' own clock."""

    title: str
    events: Sequence[Event]
    start_s: float


def require_matplotlib() -> None:
    """Raise ValueError, with the remedy, where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise ValueError('plots need matplotlib: pip install "paci-rt[plot]", or leave --out away')


def loss_over_tokens(path: str | Path, curves: Sequence[Curve], *, target: float | None) -> None:
    """Write ``loss_vs_tokens.png``: what a token buys, whatever it takes in time."""
    _loss(path, curves, target, by_time=False)


def loss_over_time(path: str | Path, curves: Sequence[Curve], *, target: float | None) -> None:
    """Write ``loss_vs_time.png``: what a second buys."""
    _loss(path, curves, target, by_time=True)


def timeline(path: str | Path, lanes: Sequence[Lane], *, span_s: float) -> None:
    """Write a picture of ``span_s`` seconds of every lane: rows are stages, cells actions, white is idleness.

    All lanes share the time axis, so cells of one length took one time. Cells that are wide enough carry their
    micro-batch's (an update: its window's) number.
    """
    rows = [1 + max((event.stage for event in lane.events), default=0) for lane in lanes]
    figure = _figure(11.0, 0.9 + sum(0.75 + 0.34 * count for count in rows))
    axes = figure.subplots(len(lanes), 1, squeeze=False, gridspec_kw={"height_ratios": [c + 1 for c in rows]})[:, 0]
    figure.subplots_adjust(left=0.075, right=0.985, top=0.99 - 0.42 / figure.get_figheight(), hspace=0.55)
    figure.subplots_adjust(bottom=0.85 / figure.get_figheight())
    scale, unit = (1e3, "ms") if span_s < 10 else (1.0, "s")
    used: set[str] = set()
    for axis, lane, count in zip(axes, lanes, rows, strict=True):
        used |= _lane(axis, lane, count, span_s, scale)
    axes[-1].set_xlabel(unit)
    _timeline_legend(figure, [op for op in ACTION_COLOURS if op in used])
    _save(figure, path)


def _figure(width_inch: float, height_inch: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, facecolor="white")


def _loss(path: str | Path, curves: Sequence[Curve], target: float | None, *, by_time: bool) -> None:
    figure = _figure(7.2, 4.4)
    axis = figure.add_axes((0.1, 0.13, 0.87, 0.79))
    named: set[str] = set()
    for curve in curves:
        colour = schedule_colour(curve.schedule, [c.schedule for c in curves])
        x = curve.elapsed_s if by_time else curve.tokens
        label = curve.label if curve.label not in named else None
        named.add(curve.label)
        axis.plot(x, curve.val_loss, color=colour, label=label, linewidth=1.6, marker="o", markersize=3.5)
        if target is not None and curve.reached is not None:
            at = curve.reached[1] if by_time else curve.reached[0]
            axis.annotate(
                "",
                xy=(at, 0),
                xycoords=("data", "axes fraction"),
                xytext=(at, target),
                textcoords="data",
                arrowprops={"arrowstyle": "-", "color": colour, "linestyle": ":", "shrinkA": 0, "shrinkB": 0},
            )
            axis.plot([at], [target], color=colour, marker="D", markersize=7, markeredgecolor="white", zorder=5)
    if target is not None:
        axis.axhline(target, color="#555555", linewidth=1.0, linestyle="--", label=f"target {target:.3f}", zorder=0)
    axis.set_xlabel("seconds of training" if by_time else "tokens")
    axis.set_ylabel("validation loss, nats per token")
    axis.set_title("Loss over time" if by_time else "Loss over tokens", loc="left", fontsize=11)
    axis.set_xlim(left=0)
    if not by_time:
        axis.xaxis.set_major_formatter(lambda value, _: _count(value))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False)
    _save(figure, path)


def schedule_colour(schedule: str, all_schedules: Sequence[str]) -> str:
    """The same colour for a schedule in every picture; those without one of their own share the rest in order."""
    if schedule in SCHEDULE_COLOURS:
        return SCHEDULE_COLOURS[schedule]
    others = list(dict.fromkeys(name for name in all_schedules if name not in SCHEDULE_COLOURS))
    return OTHER_COLOURS[others.index(schedule) % len(OTHER_COLOURS)]


def _count(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def _lane(axis: Axes, lane: Lane, stages: int, span_s: float, scale: float) -> set[str]:
    """Draw one lane; returns the operations that it shows."""
    end_s, used = lane.start_s + span_s, set()
    width_points = axis.get_window_extent().width / DPI * POINTS_PER_INCH
    for event in lane.events:
        left, right = max(event.start_s, lane.start_s), min(event.end_s, end_s)
        if right <= left:
            continue
        action = Action.parse(event.action)
        op = action.op.value
        used.add(op)
        start, width = (left - lane.start_s) * scale, (right - left) * scale
        axis.broken_barh(
            [(start, width)], (event.stage - 0.44, 0.88), facecolor=ACTION_COLOURS[op], edgecolor="white", linewidth=0.5
        )
        number = str(action.index)
        if (right - left) / span_s * width_points > 5.2 * len(number) + 3:
            axis.text(start + width / 2, event.stage, number, ha="center", va="center", fontsize=7.5, clip_on=True)
    axis.set_ylim(stages - 0.4, -0.6)
    axis.set_xlim(0, span_s * scale)
    axis.set_yticks(range(stages), [f"stage {at}" for at in range(stages)])
    axis.tick_params(axis="y", length=0)
    axis.set_title(lane.title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return used


def _timeline_legend(figure: Figure, ops: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=ACTION_COLOURS[op], label=f"{op}  {ACTION_NAMES[op]}") for op in ops]
    handles.append(Patch(facecolor="white", edgecolor="#aaaaaa", label="idle"))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.067, 0.0), "ncols": len(handles)}
    figure.legend(handles=handles, frameon=False, fontsize=8.5, **place)
