"""Stages without a parameter to train, under schedules whose other stages look ahead."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.changing import adamw, batch, loss_fn, make_stages


@pytest.mark.parametrize("schedule", ["paci", "paci-split", "async-1f1b"])
def test_a_frozen_first_stage_makes_paci_what_a_flush_is(schedule: str) -> None:
    """Only the last stage is trained, and its forwards are never early."""

    def trained(schedule: str, count: int) -> Tensor:
        first, second = make_stages()[:2]
        first.requires_grad_(False)
        pipe = paci_rt.LocalPipeline(
            [first, second], schedule=schedule, n_microbatches=count, loss_fn=loss_fn, optimizer=adamw
        )
        for step in range(6):
            x, y = batch(step)
            pipe.step(x, target=y)
        pipe.drain()
        return torch.cat([param.detach().flatten() for param in second.parameters()])

    count = 1 if schedule == "async-1f1b" else 2
    assert torch.equal(trained(schedule, count), trained("1f1b", count))


@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("schedule", ["paci", "paci-split", "paci-v", "async-1f1b"])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.01}, {"on_nonfinite": "skip-window", "max_grad_norm": 0.01}]
)
def test_stages_that_are_frozen_stay_and_the_others_are_trained(
    frozen: tuple[int, ...], schedule: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(at not in frozen) for at in range(4)]
    before = [stage[0].weight.detach().clone() for stage in stages]
    count = 1 if schedule == "async-1f1b" else 2
    optimizer = partial(paci_rt.AdamW, lr=1e-2)
    pipe = paci_rt.LocalPipeline(
        stages, schedule=schedule, n_microbatches=count, loss_fn=nn.functional.mse_loss, optimizer=optimizer, **options
    )
    for _ in range(8):
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
    pipe.drain()
    moved = [not torch.equal(stage[0].weight, then) for stage, then in zip(stages, before, strict=True)]
    assert moved == [at not in frozen for at in range(4)]
    assert all(bool(stage[0].weight.isfinite().all()) for stage in stages)
