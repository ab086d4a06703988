"""``benchmarks/checkpoints.py``: what it makes of given numbers."""

from __future__ import annotations

from typing import Any

import pytest

import checkpoints


def rows(*rounds: tuple[float, float, float]) -> list[dict[str, Any]]:
    return [
        {"round": number, "kind": kind, "updates_per_s": speed}
        for number, speeds in enumerate(rounds)
        for kind, speed in zip(checkpoints.KINDS, speeds, strict=True)
    ]


def test_the_share_lost_is_against_the_run_of_the_same_round() -> None:
    found = checkpoints.lost(rows((10.0, 9.0, 9.9), (20.0, 18.0, 19.8), (5.0, 4.5, 4.95)), "async")
    assert found["lost"] == pytest.approx(0.01)
    assert found["low"] == pytest.approx(found["high"])
    wide = checkpoints.lost(rows((10.0, 9.0, 9.0), (10.0, 9.0, 10.0), (10.0, 9.0, 11.0)), "async")
    assert wide["lost"] == pytest.approx(0.0)
    assert wide["high"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert checkpoints.lost(rows((10.0, 9.0, 9.9)), "async")["high"] == float("inf")
