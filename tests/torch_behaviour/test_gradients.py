"""What torch's own tests ask of gradients, asked of torch and of this package."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import pipelining

import paci_rt
from support.torch_twin import (
    RANKS,
    ROWS,
    SEVERAL,
    SINGLE,
    WIDTH,
    Mixed,
    Side,
    assert_alike,
    both,
    data,
    grads_of,
    stacked,
    summed,
)


def _zero(modules: list[nn.Module]) -> None:
    for module in modules:
        module.zero_grad()


def _reference(whole: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
    x, target = data()
    out = whole(x, *args)
    loss = summed(out, target)
    loss.backward()
    return out.detach(), loss.detach()


def trained(side: Side, kind: str, many: bool, traced: bool, declared: bool) -> dict[str, Any]:
    """Two steps, gradients zeroed before each: outputs, losses and gradients are the uncut model's."""
    options = {"declared": True} if declared else {}
    schedule, modules, whole = stacked(side, kind, many, traced, loss_fn=summed, **options)
    x, target = data()
    out, losses = None, []
    for _ in range(2):
        _zero(modules)
        out = side.step(schedule, x, target, losses)
    expected, loss = _reference(whole)
    if side.last:
        torch.testing.assert_close(out.detach(), expected)
        torch.testing.assert_close(sum(losses).detach(), loss)
    for name, param in _named(side, modules, many, traced):
        torch.testing.assert_close(param.grad, whole.get_parameter(name).grad, rtol=1e-5, atol=4e-5)
    result = {"grads": grads_of(modules), "losses": [one.detach() for one in losses]}
    return {**result, "out": out.detach()} if side.last else result


def _named(side: Side, modules: list[nn.Module], many: bool, traced: bool) -> list[tuple[str, nn.Parameter]]:
    """Parameters of this rank under their names in the uncut model."""
    if traced:
        return list(modules[0].named_parameters())
    indices = side.indices if many else [side.rank]
    return [
        (f"layers.{at}.{name}", param)
        for at, module in zip(indices, modules, strict=True)
        for name, param in module.named_parameters()
    ]


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize(("kind", "many"), SINGLE)
def test_gradients_of_stages_made_by_hand(ranks: Any, kind: str, many: bool, declared: bool) -> None:
    assert_alike(ranks.run(both, trained, kind, many, False, declared))


@pytest.mark.parametrize(("kind", "many"), SINGLE)
def test_gradients_of_traced_stages(ranks: Any, kind: str, many: bool) -> None:
    assert_alike(ranks.run(both, trained, kind, many, True, False))


@pytest.mark.parametrize(("kind", "many"), SEVERAL)
def test_gradients_of_several_stages_a_rank(ranks: Any, kind: str, many: bool) -> None:
    results = ranks.run(both, trained, kind, many, False, False)
    if kind == "ScheduleLoopedBFS":
        for result in results:
            backwards(result["torch"], result["ours"])
    assert_alike(results)


def backwards(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Torch adds up the gradients of this schedule from the last micro-batch to the first: equal but for rounding."""
    grads, kept = theirs.pop("grads"), ours.pop("grads")
    assert grads.keys() == kept.keys()
    for name, grad in grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(kept[name], grad, rtol=0, atol=2 * RANKS * torch.finfo(grad.dtype).eps * scale)


def with_keywords(side: Side, kind: str) -> dict[str, Any]:
    """A keyword argument that the tracer gives to the stage that reads it."""
    torch.manual_seed(5)
    model = Mixed()
    whole = copy.deepcopy(model)
    x, target = data()
    y = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
    stage, module = side.traced(model, (x.chunk(4)[0],), {"y": y.chunk(4)[0]})
    schedule = side.schedule(kind, stage, 4, summed)
    losses: list[Tensor] = []
    if side.rank == 0:
        schedule.step(x, y=y)
    elif side.last:
        out = schedule.step(target=target, losses=losses)
        expected, loss = _reference(whole, y)
        torch.testing.assert_close(out.detach(), expected)
        torch.testing.assert_close(sum(losses).detach(), loss)
    else:
        schedule.step()
    return {"grads": grads_of([module]), "losses": [loss.detach() for loss in losses]}


@pytest.mark.parametrize(("kind", "_many"), SINGLE)
def test_keyword_arguments_of_traced_stages(ranks: Any, kind: str, _many: bool) -> None:
    assert_alike(ranks.run(both, with_keywords, kind))


def with_an_idle_keyword(side: Side, kind: str) -> dict[str, Any]:
    """A keyword argument on the first rank only, one row a micro-batch, that no module uses."""
    schedule, modules, whole = stacked(side, kind, several=True, traced=False, loss_fn=summed)
    x, target = data()
    losses: list[Tensor] = []
    for _ in range(2):
        _zero(modules)
        if side.rank == 0:
            schedule.step(x, idle=torch.ones(1).expand(2 * RANKS, 1))
        else:
            side.step(schedule, x, target, losses)
    _, loss = _reference(whole)
    if side.last:
        torch.testing.assert_close(sum(losses).detach(), loss)
    return {"grads": grads_of(modules), "losses": [one.detach() for one in losses]}


@pytest.mark.parametrize("kind", ["ScheduleInterleavedZeroBubble", "ScheduleInterleaved1F1B"])
def test_a_keyword_that_is_not_used(ranks: Any, kind: str) -> None:
    assert_alike(ranks.run(both, with_an_idle_keyword, kind))


def with_own_weight_gradients(rank: int, group: Any) -> list[str]:
    """What is said to a ``dw_builder``: of our stages, and of torch's in schedules of several and one stage a rank."""

    def build() -> Any:
        raise AssertionError("a refused stage asked for its weight gradients")

    def stages(kind: Any, *indices: int) -> list[Any]:
        count, cpu = RANKS * len(indices), torch.device("cpu")
        return [kind(nn.Linear(WIDTH, WIDTH), at, count, cpu, group=group, dw_builder=build) for at in indices]

    ours, torchs = paci_rt.PipelineStage, pipelining.PipelineStage
    said = []
    for attempt in (
        lambda: stages(ours, rank),
        lambda: paci_rt.ScheduleInterleavedZeroBubble(stages(torchs, rank, rank + RANKS), 8, loss_fn=summed),
        lambda: paci_rt.ScheduleGPipe(*stages(torchs, rank), 4, loss_fn=summed),
    ):
        try:
            attempt()
        except (ValueError, paci_rt.PaciError) as error:
            said.append(str(error))
    return said


def test_a_module_with_its_own_weight_gradients_is_refused(ranks: Any) -> None:
    for said in ranks.run(with_own_weight_gradients):
        assert len(said) == 3
        assert all("dw_builder" in one and "weight gradients" in one and "leave it out" in one for one in said)
