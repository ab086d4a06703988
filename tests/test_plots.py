"""Pictures are drawn, with the cells, colours and numbers that they should have."""

from __future__ import annotations

import pytest

from paci_rt.trace import Event
from paci_rt.train import plots

pytest.importorskip("matplotlib")


def lane(events: list[tuple[int, str, float, float]], start_s: float = 0.0) -> plots.Lane:
    return plots.Lane(title="paci", events=[Event(*event, version=0) for event in events], start_s=start_s)


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
    cells = {}
    for collection in axis.collections:
        box = collection.get_paths()[0].get_extents()
        cells[round(box.x0), round(box.width), round(box.y0 + box.height / 2)] = collection.get_facecolor()[0]
    assert set(cells) == {(0, 1000, 0), (2000, 2000, 0), (3000, 10, 1), (3500, 1500, 1)}  # milliseconds
    assert len({tuple(colour) for colour in cells.values()}) == 3  # F, B, U
    assert tuple(cells[0, 1000, 0]) == tuple(cells[3500, 1500, 1])
    assert [text.get_text() for text in axis.texts] == ["0", "0", "7"]  # 123 does not fit into its cell
    assert [label.get_text() for label in axis.get_yticklabels()] == ["stage 0", "stage 1"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # stage 0 on top
    legend = [text.get_text().split()[0] for text in figures[0].legends[0].get_texts()]
    assert legend == ["F", "B", "U", "idle"]


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
