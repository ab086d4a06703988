"""The figure of activations against throughput: every row is in it, in its group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import activations_figure as figure


def row(schedule: str, activations: float, ratio: float) -> dict[str, object]:
    return {
        "schedule": schedule,
        "peak_activations": activations,
        "relative_to_1f1b": ratio,
        "stages": 8,
        "accumulation": 8,
        "emulated_ms": [40.0, 40.0, 40.0],
    }


ROWS = [
    row("1f1b", 8, 1.0),
    row("gpipe", 8, 1.005),
    row("zb-v", 8, 1.3),
    row("paci", 8, 1.8),
    row("paci-v@4.5", 4, 1.7),
    row("paci+recompute", 8, 1.4),
]


def test_rows_are_in_their_groups_and_those_that_lie_together_share_a_point() -> None:
    points = figure.points_of(ROWS)
    assert points == {
        ("1f1b", 8.0, 1.0): ["1f1b", "gpipe"],
        ("zb-v", 8.0, 1.3): ["zb-v"],
        ("paci", 8.0, 1.8): ["paci"],
        ("paci-v", 4.0, 1.7): ["paci-v@4.5"],
        ("paci", 8.0, 1.4): ["paci+recompute"],
    }


def test_it_is_drawn_from_the_file_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, out = tmp_path / "rows.json", tmp_path / "figure.png"
    source.write_text(json.dumps({"rows": ROWS}))
    figure.main([str(source), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_committed_figure_has_its_rows() -> None:
    rows = json.loads((Path(figure.__file__).parent / "results" / "schedules_8_v.json").read_text())["rows"]
    names = {one["schedule"] for one in rows}
    assert {"1f1b", "paci", "paci-v", "zb-v", "v-half", "v-min", "dualpipe-v", "zb-2p"} <= names
    assert sum(len(labels) for labels in figure.points_of(rows).values()) == len(rows)
