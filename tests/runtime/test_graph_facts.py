"""Micro-batches whose graphs differ: gradients are those of a plain loop, whatever earlier micro-batches have shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.runtime.graph_facts import ALWAYS, MOST, ONE_IN, GraphFacts
from support.plain import same
from support.pool import WorkerPool

STAGES, MICRO_BATCHES, WIDTH = 3, 4, 6


class FirstCallPasses(nn.Module):
    """Takes part in autograd from its second call on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.linear, self.called = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.called += 1
        return x if self.called == 1 else self.linear(x)  # type: ignore[no-any-return]


class ByData(nn.Module):
    """Micro-batches of positive mean pass by the layers; those of large mean pass by everything, without a graph."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        if sign.sum() > 1:
            return x.detach() + 0, sign
        return (x * self.scale if sign.sum() > 0 else self.layers(x)), sign


class LayerDrop(nn.Module):
    """Drops layers by chance, as LayerDrop does."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(()) > 0.5:
                x = x + layer(x).tanh()
        return x


class SecondOutputComesLater(nn.Module):
    """Its second output has a graph in every other micro-batch; the next stage adds both."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.linear, self.called = at, nn.Linear(WIDTH, WIDTH), 0
        self.other = nn.Linear(WIDTH, WIDTH) if at < STAGES - 1 else nn.Identity()

    def forward(self, x: Tensor, more: Tensor | None = None) -> Any:
        self.called += 1
        x = self.linear(x if more is None else x + more)
        if self.at == STAGES - 1:
            return x
        other = self.other(x)
        return x, other if self.called % 2 == 0 else other.detach()


class ByMode(nn.Module):
    """Its layer takes part in autograd only while it trains."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.before, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return x + self.linear(x) if self.training else x


Member = Callable[[int], nn.Module]


def model(member: Member, stages: int = STAGES) -> list[nn.Module]:
    torch.manual_seed(1)
    found = [member(at) for at in range(stages)]
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), found[0]), *found[1:]] if member is FirstCallPasses else found


def batches(member: Member) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    torch.manual_seed(2)
    found = []
    for step in range(3):
        x, y = torch.randn(4 * MICRO_BATCHES, WIDTH), torch.randn(4 * MICRO_BATCHES, WIDTH)
        sign = torch.tensor([-1.0, 0.2, -1.0, -1.0] if step else [0.2, 0.2, 0.4, -1.0]).repeat_interleave(4)
        found.append(((x, sign) if member is ByData else (x,), y))
    return found


def loss_fn(output: Any, target: Tensor) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    # Where no stage has left a graph, the loss would have none; what is added has no gradient for any stage.
    return nn.functional.mse_loss(output, target) + 0.0 * torch.zeros((), requires_grad=True)


def set_mode(member: Member, stages: list[nn.Module], step: int) -> None:
    if member is ByMode:
        for stage in stages:
            stage.train(step != 0)


def plain(member: Member, stages: list[nn.Module]) -> dict[str, Tensor]:
    optimizers = [torch.optim.AdamW(stage.parameters(), lr=0.05) for stage in stages]
    torch.manual_seed(3)
    for step, (args, y) in enumerate(batches(member)):
        set_mode(member, stages, step)
        parts = zip(*(arg.tensor_split(MICRO_BATCHES) for arg in args), y.tensor_split(MICRO_BATCHES), strict=True)
        for *x, target in parts:
            hidden: Any = tuple(x)
            for stage in stages:
                hidden = stage(*(hidden if isinstance(hidden, tuple) else (hidden,)))
            loss_fn(hidden, target).backward()
        for stage, optimizer in zip(stages, optimizers, strict=True):
            for param in stage.parameters():
                if param.grad is not None:
                    param.grad.div_(MICRO_BATCHES)
            optimizer.step()
            optimizer.zero_grad()
    return parameters(stages)


def parameters(stages: list[nn.Module]) -> dict[str, Tensor]:
    return {f"{at}.{name}": p.detach().clone() for at, one in enumerate(stages) for name, p in one.named_parameters()}


def piped(member: Member, stages: list[nn.Module], **options: Any) -> dict[str, Tensor]:
    pipe = paci_rt.LocalPipeline(
        stages,
        n_microbatches=MICRO_BATCHES,
        loss_fn=loss_fn,
        optimizer=lambda params: torch.optim.AdamW([param for _, param in params], lr=0.05),
        **options,
    )
    torch.manual_seed(3)
    for step, (args, y) in enumerate(batches(member)):
        set_mode(member, stages, step)
        pipe.step(*args, target=y)
    pipe.drain()
    pipe.close()
    return parameters(stages)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("member", [FirstCallPasses, ByData, ByMode, SecondOutputComesLater])
def test_a_graph_that_differs_from_those_before(member: Member, schedule: str) -> None:
    same(piped(member, model(member), schedule=schedule), plain(member, model(member)))


@pytest.mark.parametrize("member", [ByData, ByMode])
def test_a_graph_that_differs_from_those_before_and_is_made_twice(member: Member) -> None:
    same(piped(member, model(member), schedule="1f1b", policy="recompute"), plain(member, model(member)))


@pytest.mark.parametrize("policy", ["bounded", "recompute", "stash"])
def test_layers_that_are_dropped_by_chance(policy: str) -> None:
    ours = piped(LayerDrop, model(LayerDrop, 1), schedule="paci", policy=policy)
    same(ours, plain(LayerDrop, model(LayerDrop, 1)))


@pytest.mark.parametrize("member", [FirstCallPasses, ByMode, SecondOutputComesLater])
def test_all_of_an_asynchronous_pipeline_trains(member: Member) -> None:
    before = parameters(model(member))
    after = piped(member, model(member), schedule="paci")
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def over_processes(rank: int, group: Any, member: Member, transport: str) -> dict[str, Tensor]:
    stage = paci_rt.PipelineStage(model(member)[rank], rank, STAGES, group=group)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.05)
    schedule = paci_rt.SchedulePACI(stage, MICRO_BATCHES, loss_fn, optimizer=optimizer, transport=transport)
    for args, y in batches(member):
        schedule.step(*(args if rank == 0 else ()), **({"target": y} if stage.is_last else {}))
    schedule.drain()
    schedule.close()
    return {f"{rank}.{name}": param.detach().clone() for name, param in stage.named_parameters()}


@pytest.mark.parametrize("transport", ["gloo", "shm"])
@pytest.mark.parametrize("member", [FirstCallPasses, ByData, SecondOutputComesLater])
def test_facts_travel_with_every_message(workers: WorkerPool, member: Member, transport: str) -> None:
    local = piped(member, model(member), schedule="paci")
    for found in workers.run(over_processes, STAGES, member, transport):
        same(found, {name: local[name] for name in found})


def test_a_kind_is_measured_at_powers_of_two_and_counts_as_its_largest() -> None:
    facts, sizes = GraphFacts(), iter([10, 30, 20, 5])
    assert [facts.saved_bytes((), {}, "kind", lambda: next(sizes)) for _ in range(9)] == [
        10,
        30,
        30,
        30,
        30,
        30,
        30,
        30,
        30,
    ]
    assert next(sizes, None) is None


def test_ever_new_kinds_are_not_all_measured() -> None:
    facts, measured = GraphFacts(), []

    def measure() -> int:
        measured.append(len(measured))
        return 7

    forwards = 40 * ONE_IN
    assert {facts.saved_bytes((), {}, at, measure) for at in range(forwards)} == {7}
    assert ALWAYS < len(measured) <= ALWAYS + forwards // ONE_IN
    assert len(facts._kinds) <= MOST
