"""The beginning of runs near the edge of stability: `benchmarks/edge.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edge
from staleness import run as whole
from staleness.case import Case


def test_a_beginning_has_the_losses_of_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "edge.json"
    edge.main(
        ["--methods", "flush", "--clips", "1", "--seeds", "3", "--updates", "5", "--jobs", "1", "--json", str(out)]
    )
    row = json.loads(out.read_text())["rows"][0]
    assert (row["method"], row["clip"], row["seed"]) == ("flush", 1.0, 3)
    points: dict[int, float] = {}

    class Enough(Exception):
        pass

    def look(update: int, loss: float) -> None:
        points[update] = loss
        if update >= 10:
            raise Enough

    case: Case = edge.case_of("flush", 1.0, 3, 2e-3)
    with pytest.raises(Enough):
        whole.run(case, on_point=look)
    assert points[5] == pytest.approx(row["loss"], rel=1e-5) and points[10] < points[5] < points[0]
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["flush", "1"]


def test_what_is_stuck_is_counted() -> None:
    results = [{"method": "paci", "clip": None, "seed": seed, "loss": loss} for seed, loss in ((1, 3.0), (2, 3.5))]
    assert edge.rows_of(results) == [["paci", "none", 3.25, 3.5, 1, 2]]


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edge.main(["--methods", "flash"])
    assert "--methods has flash: choose from flush" in capsys.readouterr().err
