"""A forward that runs twice counts once, and sees what it saw; checkpointing inside a module is such a forward."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paci_rt
from support.plain import same

STAGES, MICRO_BATCHES, WIDTH = 3, 2, 6


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Spectral(nn.Module):
    """Power iteration: a forward reads and writes two buffers, of which autograd saves one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()  # type: ignore[no-any-return]


class Codebook(nn.Module):
    """A moving average in a large buffer, written through ``.data``; and a counter that decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(4096, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.full((5000, WIDTH), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * (1 + self.count % 3) + self.mean[: len(x)] * self.constant[0]
        self.mean.data[: len(x)].lerp_(y.detach(), 0.5)  # type: ignore[index]
        self.count += 1
        return y.tanh()


class Made(nn.Module):
    """Makes a buffer in its first forward and replaces it in every other."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if "state" not in self._buffers:
            self.register_buffer("state", x.detach().mean())
        y = self.linear(x) + self.state
        self.state = self.state * 0.5 + y.detach().mean()
        return y.tanh()


class Chance(nn.Module):
    """Draws from every generator there is, and drops its layer by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        scale = random.random() + np.random.rand()
        return self.drop(self.linear(x)).tanh() * scale if random.random() < 0.7 else x * scale


class Late(nn.Module):
    """Draws from Python's and NumPy's generators only after many forwards, which a counter of its own counts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scale = random.random() + np.random.standard_normal() if self.calls > 12 else 1.0
        return self.linear(x).tanh() * scale if self.calls % 3 else self.linear(2 * x)  # type: ignore[no-any-return]


class OwnGenerators(nn.Module):
    """Has made its generators itself, one of them in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.python, self.numpy = random.Random(3), [np.random.default_rng(4), np.random.RandomState(5)]

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "torchs"):
            self.torchs = torch.Generator().manual_seed(6)
        scale = self.python.random() + self.numpy[0].random() + self.numpy[1].rand()
        return self.linear(x).tanh() * torch.rand(x.shape, generator=self.torchs) * scale


class Remembers(nn.Module):
    """Each forward depends on what the one before has left in an attribute, and takes another away."""

    last: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(WIDTH, WIDTH), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + (0.0 if self.last is None else self.last)
        self.last = y.detach().mean()
        if "first" in self.__dict__:
            del self.first
            y = y * 2
        return y.tanh()


Maker = Callable[[], nn.Module]


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def train(modules: list[nn.Module], steps: int = 3, micro_batches: int = MICRO_BATCHES, **options: Any) -> Any:
    pipe = paci_rt.LocalPipeline(
        modules,
        n_microbatches=micro_batches,
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda params: paci_rt.SGD(params, lr=0.05, momentum=0.5),
        **options,
    )
    seed(2)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(4 * micro_batches, WIDTH, generator=generator) for _ in range(2))
        pipe.step(x, target=y)
    pipe.drain()
    pipe.close()
    return {
        f"{at}.{name}": value.detach().clone()
        for at, module in enumerate(modules)
        for name, value in module.state_dict().items()
    }


def stages(maker: Maker, count: int = STAGES) -> list[nn.Module]:
    seed(1)
    return [maker() for _ in range(count)]


@pytest.mark.parametrize("maker", [Norm, Spectral, Codebook, Made, Chance, Late, OwnGenerators, Remembers])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_run_twice_all_is_as_run_once(maker: Maker, schedule: str) -> None:
    """Weights do not change between the two runs here: not a bit differs, buffers included."""
    steps = 3 if maker is Chance else 8  # or else all three stages drop their layers together
    same(
        train(stages(maker), schedule=schedule, policy="recompute", steps=steps),
        train(stages(maker), schedule=schedule, policy="bounded", steps=steps),
    )


@pytest.mark.parametrize("maker", [Norm, Codebook, Made])
def test_buffers_move_as_often_as_forwards_run(maker: Maker) -> None:
    """Under changing weights too: each forward of the first stage counts once."""
    modules = stages(maker)
    train(modules, schedule="paci", policy="recompute")
    state = modules[0].state_dict()
    if maker is Norm:
        assert int(state["layers.1.num_batches_tracked"]) == 3 * MICRO_BATCHES
    elif maker is Codebook:
        assert int(state["count"]) == 3 * MICRO_BATCHES
    once = stages(maker)
    train(once, schedule="paci", policy="recompute", steps=1)
    again = stages(maker)
    train(again, schedule="paci", policy="bounded", steps=1, lookahead=False)
    # In its first window the first stage has seen no update: its buffers are those of a single run.
    same({"0": next(iter(once[0].buffers()))}, {"0": next(iter(again[0].buffers()))})


def test_a_large_buffer_that_stands_still_is_copied_once() -> None:
    stage = paci_rt.PipelineStage(Codebook(), 0, 3)
    for m in range(3):
        stage.forward(m, (torch.ones(4, WIDTH),), {}, recompute=True)
    held = [stage.in_flight[m].held.buffers[stage.submod] for m in range(3)]  # type: ignore[union-attr]
    assert held[0]["constant"] is held[1]["constant"] is held[2]["constant"]
    assert [int(copies["count"]) for copies in held] == [0, 1, 2]  # type: ignore[arg-type]
    counted = [stage.in_flight[m].kept_bytes for m in range(3)]
    constant, mean, count, x = 4 * 5000 * WIDTH, 4 * 4096 * WIDTH, 8, 4 * 4 * WIDTH
    assert counted == [constant + mean + count + x, mean + count + x, mean + count + x]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.linear(x)  # type: ignore[no-any-return]


class ForgetsItsLayer(nn.Module):
    """Its second run is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.linear(x) if self.calls[0] < 3 else x.detach()


@pytest.mark.parametrize(
    ("maker", "text"),
    [
        (InPlace, "stage 0 runs its forward a second time.*modified in place.*policy 'bounded' or 'stash'"),
        (ForgetsItsLayer, "stage 0 runs its forward a second time, and output 0 no longer takes part in autograd"),
    ],
)
def test_what_cannot_be_run_twice_is_refused(maker: Maker, text: str) -> None:
    with pytest.raises(Exception, match=text):
        train([maker(), nn.Linear(WIDTH, WIDTH)], schedule="gpipe", policy="recompute")


# --- activation checkpointing inside a module ---


class Checkpointed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        if self.how in ("reentrant", "not reentrant"):
            x = checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")
        elif self.how == "own":
            x = OwnCheckpoint.apply(x, self.inner, *self.inner.parameters())  # type: ignore[no-untyped-call]
        else:
            x = self.inner(x)
        return self.after(x)  # type: ignore[no-any-return]


class OwnCheckpoint(torch.autograd.Function):
    """As libraries write their own; its name says it, but nothing else does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: nn.Module, *params: Tensor) -> Tensor:
        ctx.inner, ctx.state = inner, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return inner(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            inputs = x.detach().requires_grad_()
            output = ctx.inner(inputs)
        torch.set_rng_state(now)
        torch.autograd.backward(output, grad)
        return (inputs.grad, None, *(None for _ in ctx.inner.parameters()))


def checkpointed(how: str) -> list[nn.Module]:
    return stages(lambda: Checkpointed(how))


def weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if "running" not in name and "tracked" not in name}


HOW = ["reentrant", "not reentrant", "own"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_checkpointing_without_drift_is_plain(how: str, schedule: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpoints activations")
        ours = train(checkpointed(how), schedule=schedule)
    same(weights(ours), weights(train(checkpointed("none"), schedule=schedule)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("lookahead", [False, True])
def test_checkpointing_under_paci_means_recompute(how: str, micro_batches: int, lookahead: bool) -> None:
    with pytest.warns(UserWarning, match="stage 0 checkpoints activations.*policy='recompute'.*policy='stash'") as seen:
        ours = train_momentum(checkpointed(how), "bounded", lookahead, micro_batches)
    said = [str(one.message) for one in seen if "checkpoints activations" in str(one.message)]
    assert len(said) == len(set(said)) == STAGES - 1  # once a stage; the last one has no drift
    same(weights(ours), weights(train_momentum(checkpointed("none"), "recompute", lookahead, micro_batches)))
    counted = {name: value for name, value in ours.items() if "tracked" in name and name[0] != str(STAGES - 1)}
    assert {int(value) for value in counted.values()} == {5 * micro_batches}  # each forward once


@pytest.mark.parametrize("how", HOW)
def test_checkpointing_under_stash_is_plain(how: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpoints activations")
        ours = train_momentum(checkpointed(how), "stash", False, 1)
    same(weights(ours), weights(train_momentum(checkpointed("none"), "stash", False, 1)))


def train_momentum(modules: list[nn.Module], policy: str, lookahead: bool, micro_batches: int) -> dict[str, Tensor]:
    return train(  # type: ignore[no-any-return]
        modules, steps=5, micro_batches=micro_batches, schedule="paci", policy=policy, lookahead=lookahead
    )


@pytest.mark.parametrize("told", [True, False])
def test_checkpointing_that_is_turned_on_later(told: bool) -> None:
    """Hugging Face's modules have an attribute that says so; where nothing does, the first backward shows it."""

    def run(later: str, policy: str) -> dict[str, Tensor]:
        modules = checkpointed("none")
        pipe = paci_rt.LocalPipeline(
            modules,
            n_microbatches=1,
            loss_fn=nn.functional.mse_loss,
            policy=policy,
            lookahead=False,
            optimizer=lambda params: paci_rt.SGD(params, lr=0.05),
        )
        seed(2)
        for step in range(8):
            if step == 4:
                pipe.drain()
                for module in modules:
                    module.how = later  # type: ignore[assignment]
                    if told:
                        module.gradient_checkpointing = True  # type: ignore[assignment]
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(4, WIDTH, generator=generator) for _ in range(2))
            pipe.step(x, target=y)
        pipe.drain()
        pipe.close()
        return weights({f"{at}.{name}": one for at, m in enumerate(modules) for name, one in m.state_dict().items()})

    with pytest.warns(UserWarning, match="stage 0 checkpoints") as seen:
        run("not reentrant", "bounded")
    first = 4 if told else 5
    assert f"from micro-batch {first} on" in str(next(one.message for one in seen if "stage 0" in str(one.message)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_without_a_linear_layer_that_is_turned_on_later(reentrant: bool) -> None:
    """Nothing of ours runs in that backward, but the nodes that it makes are counted."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.on = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), False

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant) if self.on else self.inner(x)  # type: ignore[no-any-return]

        def inner(self, x: Tensor) -> Tensor:
            return (x @ self.weight).tanh()

    modules = [nn.Linear(WIDTH, WIDTH), Weight(), nn.Linear(WIDTH, WIDTH)]
    pipe = paci_rt.LocalPipeline(
        modules,
        n_microbatches=1,
        loss_fn=nn.functional.mse_loss,
        lookahead=False,
        optimizer=lambda params: paci_rt.SGD(params, lr=0.05),
    )
    x = torch.randn(4, WIDTH)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpoints activations")
        for _ in range(4):
            pipe.step(x, target=x)
    modules[1].on = True  # type: ignore[assignment]

    def go_on() -> None:
        for _ in range(4):
            pipe.step(x, target=x)

    with pytest.warns(UserWarning, match="stage 1 checkpoints activations"):
        go_on()
    pipe.close()
