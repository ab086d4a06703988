"""Rows of the throughput benchmark, and what it asks of large messages; nothing here asserts a speed."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

import pipeline_throughput
from paci_rt import launch
from pipelines import Case
from support.deadlines import deadline


@pytest.mark.slow
def test_rows_have_exposed_communication() -> None:
    cases = [
        Case(schedule=name, stages=2, accumulation=2, emulate_ms=(1.0, 2.0), message_bytes=8192, transport=transport)
        for name, transport in (("paci", "gloo"), ("torch-1f1b", "auto"))
    ]
    per_rank = launch.run(pipeline_throughput.measure, 2, (cases, 3, 2), timeout_s=deadline(120))
    ours, torchs = pipeline_throughput.summarise(per_rank, 3)
    shares = []
    for repeat in zip(*(measured[cases[0]] for measured in per_rank), strict=True):
        exposed_s, compute_s = (sum(stage[key] for stage in repeat) for key in ("exposed_comm_s", "compute_s"))
        shares.append(100 * exposed_s / compute_s)
    assert ours["exposed_comm_percent"] == pytest.approx(sum(shares) / 2) and min(shares) > 0
    assert (ours["transport"], torchs["transport"], torchs["exposed_comm_percent"]) == ("gloo", "gloo", None)


def row(schedule: str, utilization: float, exposed: float, accumulation: int = 8) -> dict[str, Any]:
    numbers = {"utilization": utilization, "exposed_comm_percent": exposed, "transport": "shm"}
    return {"schedule": schedule, "accumulation": accumulation, **numbers}


def test_what_is_asked_of_large_messages_through_shared_memory() -> None:
    args = Namespace(emulate_ms=(10.0, 20.0), stages=8, message_bytes=4 << 20, accumulation=[4, 8])
    rows = [row("1f1b", 0.5, 90.0), row("paci", 0.93, 4.0), row("paci+slack1", 0.96, 3.5)]
    assert pipeline_throughput.short_with_large_messages(rows, args) == ["exposed % of paci at a=8: 3.50 > 3.0"]
    rows.append(row("paci", 0.94, 2.0, accumulation=4))
    found = pipeline_throughput.short_with_large_messages(rows, args)
    assert found == ["utilization of paci at a=4: 0.940 < 0.95", "exposed % of paci at a=8: 3.50 > 3.0"]
    assert pipeline_throughput.asked(args) == pipeline_throughput.asked_utilization(args) == {}
    for changes in ({"message_bytes": 1024}, {"stages": 4}):
        assert pipeline_throughput.short_with_large_messages(rows, Namespace(**{**vars(args), **changes})) == []
    over_gloo = [{**one, "transport": "gloo"} for one in rows]
    assert pipeline_throughput.short_with_large_messages(over_gloo, args) == []
    assert pipeline_throughput.asked(Namespace(**{**vars(args), "message_bytes": 1024})) == {
        ("paci / 1f1b", 8): (1.84, None)
    }
