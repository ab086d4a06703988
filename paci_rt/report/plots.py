"""Pictures: loss over tokens and over time, and what each stage did when.

Colours are from the set of Okabe and Ito, which people with any kind of colour vision can tell apart. matplotlib is
optional (``pip install "paci-rt[plot]"``) and used without its global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paci_rt.action import Action
from paci_rt.schedules import Placement
from paci_rt.trace import Event

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from paci_rt.simulate import Simulation

ACTION_COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#009E73", "U": "#D55E00", "E": "#CC79A7"}
ACTION_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input-gradient half",
    "W": "weight-gradient half",
    "U": "update",
    "E": "evaluation",
}
SCHEDULE_COLOURS = {"paci": "#D55E00", "1f1b": "#0072B2", "gpipe": "#009E73", "async-1f1b": "#CC79A7"}
OTHER_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#F0E442")
IDLE_COLOUR = "#DDDDDD"
DPI = 140
POINTS_PER_INCH = 72
LEAST_INCH, MOST_INCH = 11.0, 30.0  # width of a timeline


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
    """One schedule in a timeline.

    Attributes:
        title: stands above it.
        events: what was executed or simulated.
        start_s: where the picture starts, on the events' own clock.
        ranks: rows, later stages of a rank in lighter colours; None: one per stage.
        placement: which stages a rank has, see :class:`paci_rt.schedules.Placement`.
    """

    title: str
    events: Sequence[Event]
    start_s: float
    ranks: int | None = None
    placement: str | None = None

    @property
    def stages(self) -> int:
        """Stages that did something."""
        return 1 + max((event.stage for event in self.events), default=0)

    @property
    def rows(self) -> int:
        return self.stages if self.ranks is None else self.ranks

    @property
    def places(self) -> Placement:
        """Which row each stage is in."""
        return Placement.over(self.rows, self.placement)


def require_matplotlib(flag: str = "--out") -> None:
    """Raise ValueError, with the remedy, where there is no matplotlib for what ``flag`` asks for."""
    if find_spec("matplotlib") is None:
        raise ValueError(f'plots need matplotlib: pip install "paci-rt[plot]", or leave {flag} away')


def loss_over_tokens(path: str | Path, curves: Sequence[Curve], *, target: float | None) -> None:
    """Write ``loss_vs_tokens.png``: what a token buys, whatever it takes in time."""
    _loss(path, curves, target, by_time=False)


def loss_over_time(path: str | Path, curves: Sequence[Curve], *, target: float | None) -> None:
    """Write ``loss_vs_time.png``: what a second buys."""
    _loss(path, curves, target, by_time=True)


def simulated_lane(simulation: Simulation, *, start_s: float = 0.0) -> Lane:
    """A simulation that kept its events, as a lane; the title says what it came to."""
    peak = max(simulation.peak_activations.values())
    facts = [simulation.schedule, f"bubble rate {simulation.bubble_rate:.4f}", f"peak activations {peak}"]
    if simulation.max_drift or simulation.max_delay:
        facts[2:2] = [f"steady utilization {simulation.steady_utilization:.4f}"]
        facts.append(f"largest drift {simulation.max_drift}, delay {simulation.max_delay}")
    return Lane(
        title="   ".join(facts),
        events=simulation.events,
        start_s=start_s,
        ranks=simulation.ranks,
        placement=simulation.placement,
    )


def timeline(path: str | Path, lanes: Sequence[Lane], *, span_s: float, width_inch: float = LEAST_INCH) -> None:
    """Write a picture of ``span_s`` seconds of every lane: rows are ranks, cells actions, grey is idleness.

    All lanes share the time axis, so cells of one length took one time. Cells that are wide enough carry their
    micro-batch's (an update: its window's) number, and below it the version of the weights that they used. An update
    that took no time is a line.
    """
    rows = [lane.rows for lane in lanes]
    figure = _figure(width_inch, 0.9 + sum(0.75 + 0.34 * count for count in rows))
    axes = figure.subplots(len(lanes), 1, squeeze=False, gridspec_kw={"height_ratios": [c + 1 for c in rows]})[:, 0]
    left = 0.75 / width_inch
    figure.subplots_adjust(left=left, right=1 - 0.2 / width_inch, top=0.99 - 0.42 / figure.get_figheight(), hspace=0.55)
    figure.subplots_adjust(bottom=0.85 / figure.get_figheight())
    scale, unit = (1e3, "ms") if span_s < 10 else (1.0, "s")
    used: set[str] = set()
    for axis, lane in zip(axes, lanes, strict=True):
        used |= _lane(axis, lane, span_s, scale)
    axes[-1].set_xlabel(unit)
    chunks = max(-(-lane.stages // lane.rows) for lane in lanes)
    lines = _timeline_legend(figure, [op for op in ACTION_COLOURS if op in used], chunks=chunks, left=left)
    if lines > 1:
        height = figure.get_figheight() + 0.2 * (lines - 1)
        figure.set_figheight(height)
        figure.subplots_adjust(bottom=(0.85 + 0.2 * (lines - 1)) / height, top=0.99 - 0.42 / height)
    _save(figure, path)


def legible_width_inch(lanes: Sequence[Lane], span_s: float) -> float:
    """Width of a timeline in which short cells have room for a number of two digits, within reason."""
    durations = sorted(
        event.end_s - event.start_s for lane in lanes for event in lane.events if "U" not in event.action
    )
    short_s = durations[len(durations) // 10] if durations else 0.0
    return min(MOST_INCH, max(LEAST_INCH, span_s / short_s * 0.14 + 1.0)) if short_s else LEAST_INCH


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


def _lane(axis: Axes, lane: Lane, span_s: float, scale: float) -> set[str]:
    """Draw one lane; returns the operations that it shows."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Rectangle

    rows, chunks, places = lane.rows, -(-lane.stages // lane.rows), lane.places
    points = axis.get_window_extent().width / DPI * POINTS_PER_INCH / (span_s * scale)  # in a unit of the axis
    boxes: dict[tuple[str, int], list[list[tuple[float, float]]]] = {}
    ends = [0.0]
    for event in lane.events:
        left, right = max(event.start_s - lane.start_s, 0.0) * scale, min(event.end_s - lane.start_s, span_s) * scale
        action = Action.parse(event.action)
        op, row = action.op.value, places.rank_of(event.stage)
        if right < left or (right == left and event.end_s > event.start_s):
            continue
        ends.append(right)
        if right == left:
            line: dict[str, Any] = {"color": ACTION_COLOURS[op], "linewidth": 1.6, "zorder": 4, "clip_on": False}
            axis.plot([left, left], [row - 0.46, row + 0.46], **line)
        else:
            low, high = row - 0.44, row + 0.44
            corners = [(left, low), (right, low), (right, high), (left, high)]
            boxes.setdefault((op, places.chunk_of(event.stage)), []).append(corners)
            _label(axis, (left + right) / 2, row, (right - left) * points, action.index, event.version)
    for row in range(rows):
        axis.add_patch(Rectangle((0, row - 0.44), max(ends), 0.88, facecolor=IDLE_COLOUR, edgecolor="none", zorder=0))
    for (op, chunk), corners_of_all in boxes.items():
        colour = _lighter(ACTION_COLOURS[op], chunk, chunks)
        axis.add_collection(
            PolyCollection(corners_of_all, facecolor=colour, edgecolor="white", linewidth=0.5, zorder=1)
        )
    axis.set_ylim(rows - 0.4, -0.6)
    axis.set_xlim(0, span_s * scale)
    axis.set_yticks(range(rows), [f"{'rank' if chunks > 1 else 'stage'} {at}" for at in range(rows)])
    axis.tick_params(axis="y", length=0)
    axis.set_title(lane.title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return {op for op, _ in boxes} | ({"U"} if axis.lines else set())


def _label(axis: Axes, x: float, row: int, width_points: float, number: int, version: int) -> None:
    """The number, and the version below it, in the largest letters that fit; nothing where none do."""
    place: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True, "zorder": 3}
    for size in (7.5, 6.0):
        if width_points > 0.65 * size * len(str(number)) + 2:
            with_version = width_points > 0.6 * 5.5 * len(f"v{version}") + 2
            axis.text(x, row - 0.15 * with_version, str(number), fontsize=size, **place)
            if with_version:
                axis.text(x, row + 0.24, f"v{version}", fontsize=5.5, color="#222222", **place)
            return


def _lighter(colour: str, chunk: int, chunks: int) -> str:
    """``colour`` mixed with white, the more the later the chunk."""
    share = 0.6 * chunk / max(1, chunks - 1)
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)


def _timeline_legend(figure: Figure, ops: Sequence[str], *, chunks: int, left: float) -> int:
    """Put the legend below the lanes; the lines that it takes in a picture of this width."""
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=ACTION_COLOURS[op], label=f"{op}  {ACTION_NAMES[op]}") for op in ops]
    handles.append(Patch(facecolor=IDLE_COLOUR, label="idle"))
    if chunks > 1:
        handles.append(Patch(facecolor="white", edgecolor="#AAAAAA", label="lighter: later stages of the rank"))
    wide_inch = sum(0.6 + 0.07 * len(handle.get_label()) for handle in handles)
    lines = math.ceil(wide_inch / (figure.get_figwidth() * (1 - left)))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (left - 0.008, 0.0)}
    figure.legend(handles=handles, frameon=False, fontsize=8.5, ncols=math.ceil(len(handles) / lines), **place)
    return lines
