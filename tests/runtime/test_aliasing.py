"""Whose memory is whose: what the caller, a weight or the next stage does to a tensor changes nobody else's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import same
from support.pool import WorkerPool

STAGES, MICRO_BATCHES, WIDTH, ROWS = 3, 2, 6, 8


def adamw(params: Any) -> paci_rt.AdamW:
    return paci_rt.AdamW(params, lr=0.05)


def tensors_of(modules: list[nn.Module], first: int = 0) -> dict[str, Tensor]:
    return {
        f"{first + at}.{name}": one.detach().clone()
        for at, m in enumerate(modules)
        for name, one in m.state_dict().items()
    }


# --- the caller's memory ---


class Rewrites:
    """A loop that fills the same memory again and again, in the ways that people do."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.arrays = [np.zeros((ROWS, WIDTH), np.float32) for _ in range(3)]
        self.buffers = [torch.zeros(ROWS, WIDTH) for _ in range(3)]

    def __call__(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        fresh = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(3)]
        for new, array, buffer in zip(fresh, self.arrays, self.buffers, strict=True):
            array[:] = new.numpy()
            (buffer.data if self.how == "data" else buffer).copy_(new)
        if self.how == "numpy":
            return [torch.from_numpy(array) for array in self.arrays]
        return fresh if self.how == "fresh" else list(self.buffers)

    def spoil(self) -> None:
        for array, buffer in zip(self.arrays, self.buffers, strict=True):
            array[:] = np.nan
            (buffer.data if self.how == "data" else buffer).fill_(float("nan"))


class Shifted(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.linear = at, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x).tanh() * shift  # type: ignore[no-any-return]


def looped(how: str, schedule: str, policy: str | None = None, **options: Any) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(1)
    modules: list[nn.Module] = [Shifted(at) for at in range(STAGES)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        policy=policy,
        n_microbatches=MICRO_BATCHES,
        loss_fn=nn.functional.mse_loss,
        optimizer=adamw,
        **options,
    )
    loop = Rewrites(how)
    for step in range(4):
        x, y, shift = loop(step)
        pipe.step(x, target=y, shift=shift)
        loop.spoil()
    pipe.drain()
    stats = pipe.stats()
    pipe.close()
    return tensors_of(modules), stats


@pytest.mark.parametrize("how", ["numpy", "data", "in place"])
@pytest.mark.parametrize("schedule", ["paci", "paci-split", "async-1f1b", "pipedream-2bw", "1f1b"])
def test_a_batch_may_be_overwritten_as_soon_as_step_returns(how: str, schedule: str) -> None:
    policies = ["bounded", "recompute"] if schedule == "paci" else [None]
    for policy in policies:
        same(looped(how, schedule, policy)[0], looped("fresh", schedule, policy)[0])


def test_with_slack_too() -> None:
    same(looped("numpy", "paci", slack=2)[0], looped("fresh", "paci", slack=2)[0])


def test_only_what_is_still_needed_is_copied() -> None:
    """One piece is ROWS / MICRO_BATCHES rows of fp32. After a step stage 0 of 3 has two micro-batches in flight, the
    next one has one of them, and the last has none."""
    piece = 4 * WIDTH * ROWS // MICRO_BATCHES
    assert looped("numpy", "paci")[1]["copied_input_bytes"] == 4 * (2 * piece + 2 * piece)  # x, and shift: copied once
    assert looped("numpy", "1f1b")[1]["copied_input_bytes"] == 0


def one_rank(rank: int, group: Any, transport: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    modules = [Shifted(at) for at in range(STAGES)]
    stage = paci_rt.PipelineStage(modules[rank], rank, STAGES, group=group)
    optimizer = adamw(stage.parameters())
    loss_fn = nn.functional.mse_loss
    schedule = paci_rt.SchedulePACI(stage, MICRO_BATCHES, loss_fn, optimizer=optimizer, transport=transport)
    loop = Rewrites("numpy")
    for step in range(4):
        x, y, shift = loop(step)
        schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if stage.is_last else {}), shift=shift)
        loop.spoil()
    schedule.drain()
    schedule.close()
    return tensors_of([modules[rank]], rank)


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_processes_keep_the_callers_memory_safe_as_well(workers: WorkerPool, transport: str) -> None:
    fresh, _ = looped("fresh", "paci")
    for found in workers.run(one_rank, STAGES, transport):
        same(found, {name: fresh[name] for name in found})


# --- what stages return ---


class Queries(nn.Module):
    """Returns its parameter itself, or a view of it."""

    def __init__(self, at: int, view: bool) -> None:
        super().__init__()
        self.at, self.view = at, view
        self.linear, self.queries = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(ROWS // MICRO_BATCHES, WIDTH))

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Any:
        x = self.linear(x if queries is None else x * queries).tanh()
        if self.at == STAGES - 1:
            return x * self.queries
        return x, self.queries[:] if self.view else self.queries


class State(nn.Module):
    """Returns a buffer, or a plain attribute, that every forward changes."""

    state: Tensor

    def __init__(self, at: int, registered: bool) -> None:
        super().__init__()
        self.at, self.linear = at, nn.Linear(WIDTH, WIDTH)
        if registered:
            self.register_buffer("state", torch.ones(WIDTH))
        else:
            self.state = torch.ones(WIDTH)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Any:
        x = self.linear(x if state is None else x * state).tanh()
        self.state.data.mul_(1.25)
        return x if self.at == STAGES - 1 else (x, self.state)


class PassesOn(nn.Module):
    """Hands on what it was given, the caller's own tensor first of all; the last writes into what it gets."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.linear = at, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, given: Tensor) -> Any:
        if self.at < STAGES - 1:
            return self.linear(x * given).tanh(), given
        scale = given.abs()
        given.mul_(0)  # the stages before have it in their graphs
        return self.linear(x * scale).tanh()


class WritesFirst(nn.Module):
    """All but the first begin with an operation in place on what they get, which has no gradient."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.linear = at, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.at == 0:
            return x.abs()  # nothing to train: its output takes no part in autograd
        if self.at == 1:
            x = nn.functional.relu(x.sub_(0.5), inplace=True)
        return self.linear(x).tanh()  # type: ignore[no-any-return]


MEMBERS: dict[str, Callable[[int], nn.Module]] = {
    "a parameter": lambda at: Queries(at, False),
    "a view of a parameter": lambda at: Queries(at, True),
    "a buffer": lambda at: State(at, True),
    "an attribute": lambda at: State(at, False),
    "what it was given": PassesOn,
    "a received tensor written to": WritesFirst,
}


def model(member: str) -> list[nn.Module]:
    torch.manual_seed(1)
    return [MEMBERS[member](at) for at in range(STAGES)]


def given(member: str, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y, more = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(3))
    return ((x, more) if member == "what it was given" else (x,)), y


def drive(pipe: Any, member: str) -> list[float]:
    history = []
    for step in range(3):
        args, y = given(member, step)
        losses: list[Tensor] = []
        here = args if pipe.has_first else ()
        target = {"target": y} if pipe.has_last else {}
        pipe.step(*here, **target, **({"losses": losses} if pipe.has_last else {}))
        history += [float(loss) for loss in losses]
        before = [arg.clone() for arg in args]
        pipe.eval(*here, **target, **({"losses": losses} if pipe.has_last else {}))
        history += [float(loss) for loss in losses]
        assert all(torch.equal(arg, old) for arg, old in zip(args, before, strict=True))
    pipe.drain()
    pipe.close()
    return history


def locally(member: str, schedule: str) -> tuple[dict[str, Tensor], list[float]]:
    modules = model(member)
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=MICRO_BATCHES,
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda params: adamw(params) if params else None,  # type: ignore[arg-type,return-value]
    )
    history = drive(pipe, member)
    return tensors_of(modules), history


def in_a_process(rank: int, group: Any, member: str, schedule: str, transport: str) -> Any:
    module = model(member)[rank]
    stage = paci_rt.PipelineStage(module, rank, STAGES, group=group)
    make = paci_rt.get_schedule_class(schedule)
    optimizer, loss_fn = adamw(stage.parameters()), nn.functional.mse_loss
    history = drive(make(stage, MICRO_BATCHES, loss_fn, optimizer=optimizer, transport=transport), member)
    return tensors_of([module], rank), history


@pytest.mark.parametrize("transport", ["gloo", "shm"])
@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
@pytest.mark.parametrize("member", MEMBERS)
def test_one_process_and_several_agree(workers: WorkerPool, member: str, schedule: str, transport: str) -> None:
    params, history = locally(member, schedule)
    results = workers.run(in_a_process, STAGES, member, schedule, transport)
    for found, _ in results:
        same(found, {name: params[name] for name in found})
    assert results[-1][1] == history


def test_a_leaf_that_needs_a_gradient_cannot_be_written_to() -> None:
    """torch says so itself, under its pipelines and ours; nothing is changed silently."""
    pipe = paci_rt.LocalPipeline(
        [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))],
        n_microbatches=1,
        loss_fn=nn.functional.mse_loss,
        optimizer=adamw,
    )
    with pytest.raises(Exception, match="in-place operation"):
        pipe.step(torch.ones(2, WIDTH), target=torch.ones(2, WIDTH))
    pipe.close()


# --- what comes back ---


class Returns(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.linear = what, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("state", torch.ones(1, WIDTH))

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        self.state.data.add_(1)  # type: ignore[operator]
        extra = {"parameter": self.linear.weight, "buffer": self.state, "input": x, "view": self.linear.bias[None]}
        return y, extra[self.what]


@pytest.mark.parametrize("what", ["parameter", "buffer", "input", "view"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_outputs_are_what_they_were_and_are_the_callers(what: str, micro_batches: int) -> None:
    torch.manual_seed(1)
    module = Returns(what)
    expected = torch.cat(
        {
            "parameter": [module.linear.weight.detach().clone()] * micro_batches,
            "buffer": [torch.full((1, WIDTH), 2.0 + m) for m in range(micro_batches)],
            "input": [torch.ones(4, WIDTH)],
            "view": [module.linear.bias.detach().clone()[None]] * micro_batches,
        }[what]
    )
    pipe = paci_rt.LocalPipeline(
        [module],
        n_microbatches=micro_batches,
        loss_fn=lambda output, target: nn.functional.mse_loss(output[0], target),
        optimizer=adamw,
    )
    x = torch.ones(4, WIDTH)
    _, extra = pipe.step(x, target=torch.zeros(4, WIDTH))
    assert torch.equal(extra, expected)  # although the update came before it was returned
    kept = tensors_of([module])
    extra.fill_(7.0)
    same(tensors_of([module]), kept)
    assert torch.equal(x, torch.ones(4, WIDTH))
    pipe.close()
