"""``benchmarks/checkpoints.py``: what it makes of given numbers, and a small run."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import checkpoints


def seconds(*rounds: tuple[float, float, float]) -> list[dict[str, float]]:
    return [dict(zip(checkpoints.KINDS, one, strict=True)) for one in rounds]


def test_the_share_lost_is_against_the_stretch_of_the_same_round() -> None:
    found = checkpoints.lost(seconds((10.0, 11.0, 10.1), (20.0, 22.0, 20.2), (5.0, 5.5, 5.05)), "beside")
    assert found["share"] == pytest.approx(0.01)
    assert found["low"] == pytest.approx(found["high"])
    wide = checkpoints.lost(seconds((10.0, 11.0, 9.0), (10.0, 11.0, 10.0), (10.0, 11.0, 11.0)), "beside")
    assert wide["share"] == pytest.approx(0.0)
    assert wide["high"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert checkpoints.lost(seconds((10.0, 11.0, 10.1)), "beside")["high"] == float("inf")


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    options = ["--rounds", "2", "--updates", "2", "--model", "gpt-mini", "--rows", "1", "--seq-len", "8"]
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *options, "--json", str(out)])
    with suppress(SystemExit):  # so short a run may well miss the target
        checkpoints.main()
    rows = {row["kind"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == set(checkpoints.KINDS)
    assert rows["none"]["stopped_s"] == 0.0 < rows["beside"]["stopped_s"]
    assert rows["none"]["most_share"] == 0.0 == rows["blocking"]["writer_s"] < rows["beside"]["writer_s"]
    assert rows["none"]["lost_wall"]["share"] == 0.0
    assert all(row["wall_s"] > 0 and row["cpu_s"] > 0 for row in rows.values())
    assert "blocking" in capsys.readouterr().out
