"""Evaluation among training micro-batches, with every stage in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import launch
from paci_rt.errors import PaciError

WIDTH, WINDOWS = 8, 4


def stage(ctx: launch.Context, transport: str, schedule: str, validates: tuple[bool, ...]) -> list[list[float]]:
    """Train some windows, the ranks that do with an evaluation before each; losses on the last stage."""
    torch.manual_seed(5)
    slices = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(ctx.world_size)]
    place = paci_rt.PipelineStage(slices[ctx.rank], ctx.rank, ctx.world_size)
    pipe = paci_rt.get_schedule_class(schedule)(
        place, 4, nn.MSELoss(), optimizer=paci_rt.AdamW(place.parameters(), lr=1e-2), transport=transport,
        transfer_timeout_s=30.0,
    )  # fmt: skip
    x, y = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    found: list[list[float]] = []
    for k in range(WINDOWS):
        within: list[list[torch.Tensor]] = [[], []]
        for losses in within if validates[ctx.rank] and k else []:
            pipe.eval(x * 2, target=y, losses=losses, drained=False)
        pipe.step(x + k, target=y)
        found += [torch.stack(losses).tolist() for losses in within if losses]
    pipe.drain()
    after: list[torch.Tensor] = []
    pipe.eval(x, target=y, losses=after)
    pipe.close()
    return [*found, [one.item() for one in after], [float(sum(param.sum() for param in place.parameters()))]]


def run(transport: str, schedule: str, validates: tuple[bool, ...]) -> list[Any]:
    return launch.run(stage, len(validates), (transport, schedule, validates))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_processes_evaluate_among_training_and_train_the_same(transport: str) -> None:
    with_it, without = run(transport, "paci", (True, True, True)), run(transport, "paci", (False, False, False))
    assert [one[-2:] for one in with_it] == [one[-2:] for one in without]
    assert len(with_it[2]) == 2 * (WINDOWS - 1) + 2
    assert with_it[2][0] == with_it[2][1] != with_it[2][2]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("validates", [(True, False), (False, True)])
def test_ranks_that_disagree_end_with_an_error(transport: str, validates: tuple[bool, ...]) -> None:
    with pytest.raises(PaciError) as caught:
        run(transport, "paci", validates)
    assert "stage" in str(caught.value)
