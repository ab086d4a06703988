"""Slack below 0: fewer forwards in flight, down to a pipeline that has one and trains as 1F1B-flush, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paci_rt


def trained(slack: Any, *, schedule: str = "paci", accumulation: int = 4, lookahead: bool | None = None) -> Any:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
    options = {} if lookahead is None else {"lookahead": lookahead}
    pipeline = paci_rt.LocalPipeline(
        stages,
        schedule=schedule,
        n_microbatches=accumulation,
        loss_fn=nn.MSELoss(),
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        slack=slack,
        **options,  # type: ignore[arg-type]
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(6):
        x = torch.randn(8, 8, generator=draw)
        pipeline.step(x, target=x.flip(1))
    pipeline.drain()
    stats = pipeline.stats()
    weights = [param.detach().clone() for stage in stages for param in stage.parameters()]
    pipeline.close()
    return weights, stats


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("lookahead", [True, False])
def test_none_ahead_is_flush_to_the_bit(accumulation: int, lookahead: bool) -> None:
    weights, stats = trained((-3, -2, -1, 0), accumulation=accumulation, lookahead=lookahead)
    assert equal(weights, trained(0, schedule="1f1b", accumulation=accumulation)[0])
    assert set(stats["peak_in_flight"].values()) == {1} and stats["max_drift"] == 0


@pytest.mark.parametrize(
    ("slack", "in_flight"),
    [((-1, -1, 0, 0), (3, 2, 2, 1)), ((-2, -1, -1, 0), (2, 2, 1, 1)), ((1, -1, 0, 0), (5, 2, 2, 1))],
)
def test_each_stage_has_as_many_in_flight_as_it_is_told(slack: Any, in_flight: tuple[int, ...]) -> None:
    weights, stats = trained(slack)
    assert tuple(stats["peak_in_flight"].values()) == in_flight
    assert not equal(weights, trained(0)[0])
    assert equal(weights, trained(slack)[0])
