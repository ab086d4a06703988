"""``benchmarks/replicas.py``: what it makes of given numbers, and that its stages cost what they say."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import replicas
from replicas import SleepingStage, Way, measures_of, row_of


def rows(**changes: Any) -> list[dict[str, Any]]:
    found = []
    for name in ("1f1b", "paci, no overlap", "paci", "paci, ZeRO-1"):
        shared = 2 if name == "paci, ZeRO-1" else 1
        row = {"way": name, "exposed_percent": 1.0, "reduce_percent": 20.0, "resident_bytes": 1}
        row |= {"optimizer_bytes": 800 // shared, "masters_bytes": 400 // shared}
        found.append({**row, **changes})
    return found


def test_exposed_time_and_bytes_are_judged() -> None:
    assert [row["ok"] for row in measures_of(rows())] == [True, True, True, None, None]
    assert [row["ok"] for row in measures_of(rows(exposed_percent=5.1))][:2] == [False, False]
    busy = measures_of(rows(exposed_percent=9.0, reduce_percent=60.0))
    assert [row["ok"] for row in busy][:2] == [None, None]
    assert "60 % of a window" in busy[0]["note"]
    assert measures_of(rows(optimizer_bytes=800))[2]["ok"] is False


def test_a_row_is_of_the_worst_process() -> None:
    way = replicas.ways_of(_args())[2]
    assert (way.schedule, way.overlap, way.shard) == ("paci", 4, False)
    one = {"window_ms": 100.0, "reduce_ms": 20.0, "exposed_ms": 1.0, "gather_ms": 0.0, "resident_bytes": 5}
    one |= {"memory": {"optimizer": 3, "masters": 2, "total": 9}}
    row = row_of(way, [one, {**one, "exposed_ms": 4.0, "resident_bytes": 7}])
    assert (row["exposed_percent"], row["resident_bytes"], row["optimizer_bytes"]) == (4.0, 7, 3)


def _args() -> Any:
    import argparse

    return argparse.Namespace(parameters=64, accumulation=8, emulate_ms=[1.0, 2.0], windows=1)


def test_stages_sleep_and_have_gradients() -> None:
    way = Way(
        name="x",
        schedule="paci",
        overlap=0,
        shard=False,
        parameters=64,
        accumulation=8,
        windows=1,
        forward_s=0.01,
        backward_s=0.02,
    )
    stage = SleepingStage(way)
    begin = time.perf_counter()
    stage(torch.ones(1, replicas.WIDTH, dtype=torch.bfloat16)).sum().backward()
    assert time.perf_counter() - begin >= 0.03
    assert stage.weight.grad is not None
    assert float(stage.weight.grad.float().mean()) == pytest.approx(1e-3, rel=1e-2)
