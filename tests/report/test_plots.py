"""Pictures are drawn, with the cells, colours and numbers that they should have."""

from __future__ import annotations

import pytest

from paci_rt import schedules
from paci_rt.report import plots
from paci_rt.schedules import Shape
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import Event

pytest.importorskip("matplotlib")


def lane(events: list[tuple[int, str, float, float]], start_s: float = 0.0, ranks: int | None = None) -> plots.Lane:
    timed = [Event(*event, version=3) for event in events]
    return plots.Lane(title="paci", events=timed, start_s=start_s, ranks=ranks)


def cells_of(axis) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """Colour by left edge, width and row of every cell."""
    cells = {}
    for collection in axis.collections:
        for path in collection.get_paths():
            box = path.get_extents()
            place = round(box.x0), round(box.width), round(box.y0 + box.height / 2)
            assert place not in cells
            cells[place] = tuple(collection.get_facecolor()[0])
    return cells


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    kept: list = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


def test_timeline_cells(figures):
    events = [
        (0, "0F0", 10.0, 11.0),
        (0, "0B0", 12.0, 14.0),
        (1, "1U123", 13.0, 13.01),
        (1, "1F7", 13.5, 19.0),  # reaches over the edge
        (1, "1F6", 9.0, 10.0),  # before the picture
    ]
    plots.timeline("unused", [lane(events, start_s=10.0)], span_s=5.0)
    (axis,) = figures[0].axes
    cells = cells_of(axis)
    assert set(cells) == {(0, 1000, 0), (2000, 2000, 0), (3000, 10, 1), (3500, 1500, 1)}  # milliseconds
    assert len(set(cells.values())) == 3  # F, B, U
    assert cells[0, 1000, 0] == cells[3500, 1500, 1]
    # Numbers, and the version below; 123 does not fit into its cell.
    assert [text.get_text() for text in axis.texts] == ["0", "v3", "0", "v3", "7", "v3"]
    assert axis.texts[0].get_position()[1] < 0 < axis.texts[1].get_position()[1]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["stage 0", "stage 1"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # stage 0 on top
    legend = [text.get_text().split()[0] for text in figures[0].legends[0].get_texts()]
    assert legend == ["F", "B", "U", "idle"]


def test_bubbles_are_a_band_behind_the_cells(figures):
    plots.timeline("unused", [lane([(0, "0F0", 0.0, 1.0), (1, "1F0", 1.0, 3.0)])], span_s=4.0)
    (axis,) = figures[0].axes
    bands = [(patch.get_x(), patch.get_width(), patch.get_y() + patch.get_height() / 2) for patch in axis.patches]
    assert bands == [(0, 3000, 0), (0, 3000, 1)]  # up to the end of the last action
    assert all(patch.get_zorder() < axis.collections[0].get_zorder() for patch in axis.patches)
    assert len({tuple(patch.get_facecolor()) for patch in axis.patches} | set(cells_of(axis).values())) == 2


def test_updates_that_take_no_time_are_lines(figures):
    plots.timeline("unused", [lane([(0, "0B0", 0.0, 1.0), (0, "0U0", 1.0, 1.0), (0, "0U9", 9.0, 9.0)])], span_s=2.0)
    (axis,) = figures[0].axes
    assert [list(line.get_xdata()) for line in axis.lines] == [[1000, 1000]]
    assert [text.get_text().split()[0] for text in figures[0].legends[0].get_texts()] == ["B", "U", "idle"]


def test_rows_are_ranks(figures):
    events = [(stage, f"{stage}F0", float(stage), stage + 1.0) for stage in range(4)]
    plots.timeline("unused", [lane(events, ranks=2)], span_s=4.0)
    (axis,) = figures[0].axes
    cells = cells_of(axis)
    assert set(cells) == {(0, 1000, 0), (1000, 1000, 1), (2000, 1000, 0), (3000, 1000, 1)}
    assert cells[0, 1000, 0] == cells[1000, 1000, 1] != cells[2000, 1000, 0] == cells[3000, 1000, 1]
    assert sum(cells[2000, 1000, 0]) > sum(cells[0, 1000, 0])  # lighter
    assert [label.get_text() for label in axis.get_yticklabels()] == ["rank 0", "rank 1"]
    assert "lighter" in figures[0].legends[0].get_texts()[-1].get_text()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("zb-h1", {}, ["zb-h1", "bubble rate 0.1429", "peak activations 2"]),
        ("interleaved-1f1b", {"chunks": 2}, ["interleaved-1f1b", "bubble rate 0.2000", "peak activations 4"]),
        ("paci", {}, ["paci", "bubble rate 0.1935", "steady utilization", "peak activations 2", "drift 1, delay 1"]),
    ],
)
def test_simulated_lanes(figures, name, options, words):
    unit = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,), update_s=(0.5,))
    shape = Shape(num_stages=2 * options.get("chunks", 1), accumulation=2, **options)
    simulation = simulate(schedules.get(name), shape, unit, windows=2, keep_events=True)
    shown = plots.simulated_lane(simulation)
    for word in words:
        assert word in shown.title
    plots.timeline("unused", [shown], span_s=simulation.makespan_s)
    (axis,) = figures[0].axes
    assert sum(len(collection.get_paths()) for collection in axis.collections) == len(simulation.events)
    assert len(axis.get_yticks()) == 2


def test_pictures_grow_with_what_they_show():
    few = lane([(0, f"0F{m}", float(m), m + 1.0) for m in range(10)])
    many = lane([(0, f"0F{m}", float(m), m + 1.0) for m in range(100)])
    assert plots.legible_width_inch([few], 10.0) == plots.LEAST_INCH
    assert plots.LEAST_INCH < plots.legible_width_inch([many], 100.0) < plots.MOST_INCH
    assert plots.legible_width_inch([many], 1e6) == plots.MOST_INCH
    assert plots.legible_width_inch([lane([])], 1.0) == plots.LEAST_INCH


def test_lanes_share_their_time_axis(figures):
    plots.timeline("unused", [lane([(0, "0F0", 0.0, 30.0)]), lane([(2, "2F0", 5.0, 6.0)], start_s=5.0)], span_s=30.0)
    first, second = figures[0].axes
    assert first.get_xlim() == second.get_xlim() == (0, 30)  # seconds, this time
    assert len(second.get_yticks()) == 3


def test_loss_curves(figures):
    curves = [
        plots.Curve(
            label=name,
            schedule=name,
            tokens=[0, 1000, 2000],
            elapsed_s=[0.0, slow, 2 * slow],
            val_loss=[5.0, 4.0, 3.5],
            reached=(1000.0, slow),
        )
        for name, slow in (("paci", 1.0), ("1f1b", 1.5), ("1f1b", 1.6), ("brand-new", 9.0))
    ]
    plots.loss_over_tokens("unused", curves, target=4.0)
    plots.loss_over_time("unused", curves, target=None)
    by_tokens, by_time = (figure.axes[0] for figure in figures)
    assert [text.get_text() for text in by_tokens.get_legend().get_texts()] == [
        "paci",
        "1f1b",
        "brand-new",
        "target 4.000",
    ]
    assert list(by_time.lines[1].get_xdata()) == [0.0, 1.5, 3.0]
    colours = [line.get_color() for line in by_time.lines]
    assert len(by_time.lines) == 4
    assert colours[1] == colours[2]
    assert len(set(colours)) == 3
    assert by_tokens.get_ylim()[0] > 3  # the marks of the target do not pull the axis down to zero


def test_files_are_written(tmp_path):
    plots.timeline(tmp_path / "timeline.png", [lane([(0, "0F0", 0.0, 1.0)])], span_s=1.0)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_colours_differ():
    assert len(set(plots.ACTION_COLOURS.values())) == len(plots.ACTION_COLOURS)
    assert set(plots.ACTION_COLOURS) == set(plots.ACTION_NAMES)
    assert len(set(plots.SCHEDULE_COLOURS.values())) == len(plots.SCHEDULE_COLOURS)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"paci-rt\[plot\]\""):
        plots.require_matplotlib()
