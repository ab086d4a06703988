"""What torch's own tests ask of forwards, evaluation and return values, asked of torch and of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.torch_twin import IN_A_V, RANKS, SEVERAL, SINGLE, Side, assert_alike, both, data, stacked, summed


def rounds(side: Side) -> dict[str, Any]:
    """The output of the last rank is the next input of the first, twenty times, without a loss."""
    schedule, _, whole = stacked(side, "_ScheduleForwardOnly", several=False, traced=True)
    x, _ = data()
    expected, out = x.clone(), torch.zeros_like(x)
    for _ in range(20):
        if side.rank == 0:
            schedule.step(x)
            dist.recv(x, src=RANKS - 1, group=side.group)
        elif side.last:
            out = schedule.step()
            dist.send(out, dst=0, group=side.group)
        else:
            schedule.step()
    if not side.last:
        return {}
    with torch.no_grad():
        for _ in range(20):
            expected = whole(expected)
    torch.testing.assert_close(out.detach(), expected)
    return {"out": out.detach()}


def test_forward_only(ranks: Any) -> None:
    assert_alike(ranks.run(both, rounds))


def evaluation(side: Side, kind: str, many: bool) -> dict[str, Any]:
    """``eval`` computes losses and no gradients, with and without ``no_grad`` around it."""
    schedule, modules, whole = stacked(side, kind, many, traced=True, count=2 * RANKS, loss_fn=summed)
    x, target = data()
    losses: list[Tensor] = []
    if side.rank == 0:
        with torch.no_grad():
            schedule.eval(x, **({"target": target, "losses": losses} if side.last else {}))
    elif side.last:
        schedule.eval(target=target, losses=losses)
    else:
        schedule.eval()
    assert all(param.grad is None for module in modules for param in module.parameters())
    assert len(losses) == (2 * RANKS if side.last else 0)
    if side.last:
        with torch.no_grad():
            torch.testing.assert_close(sum(losses), summed(whole(x), target))
    return {"losses": [loss.detach() for loss in losses]}


@pytest.mark.parametrize(("kind", "many"), [*SINGLE, *(one for one in SEVERAL if one[0] not in IN_A_V)])
def test_evaluation_computes_losses_and_no_gradients(ranks: Any, kind: str, many: bool) -> None:
    assert_alike(ranks.run(both, evaluation, kind, many))


def ours_alone(rank: int, group: Any, kind: str) -> dict[str, Any]:
    side = Side("ours", rank, group)
    try:
        return evaluation(side, kind, True)
    finally:
        for schedule in side.open:
            schedule.close()


@pytest.mark.parametrize("kind", IN_A_V)
def test_evaluation_in_a_v_where_torchs_own_fails(ranks: Any, kind: str) -> None:
    assert [len(one["losses"]) for one in ranks.run(ours_alone, kind)] == [2 * RANKS, 0, 0, 0]


def no_outputs(side: Side, kind: str, many: bool) -> dict[str, Any]:
    """``return_outputs=False`` returns None; every rank but the last is given the inputs."""
    schedule, _, _ = stacked(side, kind, many, traced=True, count=2 * RANKS, loss_fn=summed)
    x, target = data()
    losses: list[Tensor] = []
    if side.last:
        inputs = (x,) if side.rank == 0 else ()
        returned = schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
    else:
        returned = schedule.step(x)
    assert returned is None and len(losses) == (2 * RANKS if side.last else 0)
    return {"losses": [loss.detach() for loss in losses]}


@pytest.mark.parametrize(("kind", "many"), [*SINGLE, *SEVERAL])
def test_outputs_are_not_returned_where_they_are_not_wanted(ranks: Any, kind: str, many: bool) -> None:
    assert_alike(ranks.run(both, no_outputs, kind, many))


def many_steps(side: Side, kind: str) -> dict[str, Any]:
    """Twenty steps in a row; ``losses`` is a new list each time."""
    schedule, _, _ = stacked(side, kind, several=False, traced=True, count=4, loss_fn=summed)
    x, target = data()
    history = []
    for _ in range(20):
        losses: list[Tensor] = []
        side.step(schedule, x, target, losses)
        history.append([loss.detach() for loss in losses])
    return {"losses": history}


@pytest.mark.parametrize(("kind", "_many"), SINGLE)
def test_many_steps(ranks: Any, kind: str, _many: bool) -> None:
    assert_alike(ranks.run(both, many_steps, kind))
