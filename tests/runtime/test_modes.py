"""Work that a step leaves owed is done as it was begun, whatever the caller does around what asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import paci_rt
from paci_rt import checkpoint
from paci_rt.runtime.batch import LossOf
from paci_rt.runtime.modes import settings_now
from support.plain import same
from support.toy import make_muon

STAGES, MICRO_BATCHES, WIDTH = 3, 2, 8


class Block(nn.Module):
    """What modes change: dropout, attention, a product, numbers made in the default dtype."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.before, self.after, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((self.training, torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
        x = self.before(x).view(-1, 1, 2, WIDTH // 2)
        x = nn.functional.scaled_dot_product_attention(x, x, x).reshape(-1, WIDTH).to(torch.get_default_dtype())
        return self.drop(self.after(((x + 1000) - 1000).float()))  # type: ignore[no-any-return]


class Loss(nn.Module):
    """A loss with dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.log = nn.Dropout(0.5), list[bool]()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.log.append(self.training)
        return nn.functional.mse_loss(self.drop(output).float(), target)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def evaluating(pipe: Any) -> Iterator[None]:
    for stage in pipe.stages:
        stage.submod.eval()
    pipe._loss_fn.eval()
    try:
        yield
    finally:
        for stage in pipe.stages:
            stage.submod.train()
        pipe._loss_fn.train()


def reseeded() -> AbstractContextManager[None]:
    torch.manual_seed(77)
    return nullcontext()


MODES: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "no_grad": lambda _: torch.no_grad(),
    "set_grad_enabled": lambda _: torch.set_grad_enabled(False),
    "inference_mode": lambda _: torch.inference_mode(),
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda _: torch.autocast("cpu", torch.float16),
    "eval": evaluating,
    "default dtype": lambda _: default_dtype(torch.float64),
    "deterministic": lambda _: deterministic(),
    "sdpa": lambda _: sdpa_kernel([SDPBackend.MATH]),
    "device": lambda _: torch.device("meta"),
    "seed": lambda _: reseeded(),
}


def make(policy: str, schedule: str = "paci") -> paci_rt.LocalPipeline:
    torch.manual_seed(1)
    return paci_rt.LocalPipeline(
        [Block(at) for at in range(STAGES)],
        schedule=schedule,
        n_microbatches=MICRO_BATCHES,
        loss_fn=Loss(),  # type: ignore[arg-type]
        policy=policy,
        optimizer=lambda params: paci_rt.AdamW(params, lr=0.05),
    )


def parameters(pipe: paci_rt.LocalPipeline) -> dict[str, Tensor]:
    return {
        f"{one.stage_index}.{name}": p.detach().clone() for one in pipe.stages for name, p in one.named_parameters()
    }


def batch(at: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(at)
    x, y = (torch.randn(8, WIDTH, generator=generator, dtype=torch.float32) for _ in range(2))
    return x, y


def run(
    policy: str,
    around_step: AbstractContextManager[Any],
    around_drain: Callable[[paci_rt.LocalPipeline], AbstractContextManager[Any]],
    owing: Callable[[paci_rt.LocalPipeline], Any],
    schedule: str = "paci",
) -> dict[str, Tensor]:
    pipe = make(policy, schedule)
    torch.manual_seed(2)
    with around_step:
        for at in range(3):
            x, y = batch(at)
            pipe.step(x, target=y)
    with around_drain(pipe):
        owing(pipe)
    with pipe_closed(pipe):
        return parameters(pipe)


@contextmanager
def pipe_closed(pipe: paci_rt.LocalPipeline) -> Iterator[None]:
    yield
    pipe.close()


def evaluate(pipe: paci_rt.LocalPipeline) -> None:
    x, y = batch(99)
    pipe.eval(x, target=y)


def plainly(pipe: paci_rt.LocalPipeline) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.parametrize("policy", ["bounded", "recompute", "stash"])
@pytest.mark.parametrize("mode", MODES)
def test_a_drain_does_what_is_owed_as_it_was_begun(mode: str, policy: str) -> None:
    wanted = run(policy, nullcontext(), plainly, lambda pipe: pipe.drain())
    same(run(policy, nullcontext(), MODES[mode], lambda pipe: pipe.drain()), wanted)


@pytest.mark.parametrize("policy", ["bounded", "recompute"])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "eval"])
@pytest.mark.parametrize("owing", [evaluate, lambda pipe: pipe.state_dict()], ids=["eval", "state_dict"])
def test_so_does_whatever_drains(mode: str, policy: str, owing: Callable[[Any], Any]) -> None:
    wanted = run(policy, nullcontext(), plainly, lambda pipe: pipe.drain())
    same(run(policy, nullcontext(), MODES[mode], owing), wanted)


def test_so_does_a_checkpoint(tmp_path: Path) -> None:
    wanted = run("recompute", nullcontext(), plainly, lambda pipe: pipe.drain())
    save = lambda pipe: checkpoint.save(tmp_path / "saved", pipe)  # noqa: E731
    same(run("recompute", nullcontext(), MODES["inference_mode"], save), wanted)


@pytest.mark.parametrize("schedule", ["paci", "paci-split"])
@pytest.mark.parametrize("policy", ["bounded", "recompute"])
@pytest.mark.parametrize("mode", ["autocast", "autocast float16", "sdpa", "default dtype"])
def test_what_was_begun_under_a_mode_ends_under_it(mode: str, policy: str, schedule: str) -> None:
    def under(pipe: Any) -> AbstractContextManager[Any]:
        return MODES[mode](pipe)

    wanted = run(policy, MODES[mode](None), under, lambda pipe: pipe.drain(), schedule)
    same(run(policy, MODES[mode](None), plainly, lambda pipe: pipe.drain(), schedule), wanted)
    if mode != "sdpa":
        plain = run(policy, nullcontext(), plainly, lambda pipe: pipe.drain(), schedule)
        assert any(not torch.equal(plain[name], wanted[name]) for name in plain)  # the mode does matter


@pytest.mark.parametrize("policy", ["bounded", "recompute"])
def test_steps_of_two_modes_do_not_mix(policy: str) -> None:
    """Every second step is under autocast; draining after each step or not, forwards and second runs see their own."""
    pipe = make(policy)
    torch.manual_seed(2)
    for at in range(4):
        x, y = batch(at)
        with torch.autocast("cpu", torch.bfloat16, enabled=at % 2 == 1):
            for stage in pipe.stages:
                stage.submod.train(at % 2 == 0)
            pipe.step(x, target=y)
    pipe.drain()
    for stage in pipe.stages:
        log = stage.submod.log
        expected = 2 if policy == "recompute" and not stage.is_last else 1  # the last has nothing to recompute
        assert log.count((True, False, torch.float32)) == log.count((False, True, torch.float32)) == 4 * expected
        assert len(log) == 8 * expected
    pipe.close()


def test_drained_under_another_mode_the_modules_have_that_one_again() -> None:
    pipe = make("recompute")
    x, y = batch(0)
    pipe.step(x, target=y)
    with evaluating(pipe):
        pipe.drain()
        assert not any(module.training for stage in pipe.stages for module in stage.submod.modules())
    assert all(trains for stage in pipe.stages for trains, *_ in stage.submod.log)
    pipe.close()


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: partial(loss), lambda loss: loss.forward])
def test_the_mode_of_a_loss_is_kept_too(wrap: Callable[[Any], Any]) -> None:
    stage = paci_rt.PipelineStage(nn.Linear(WIDTH, WIDTH), 0, 1)
    loss = Loss()
    stage.reruns.watch(partial(wrap(loss)), recompute=True, drifts=False)
    stage.begin(settings_now())
    x, y = batch(0)
    stage.forward(0, (x,), {}, LossOf(wrap(loss), y, stage.device), recompute=True)
    loss.eval()
    stage.begin(settings_now())
    stage.backward(0, ())
    assert loss.log == [True, True]
    assert not loss.training and not loss.drop.training


@pytest.mark.parametrize(
    ("policy", "lookahead"),
    [("bounded", False), ("bounded", True), ("stash", False), ("recompute", False), ("recompute", True)],
)
def test_autocast_never_uses_a_cast_of_old_weights(policy: str, lookahead: bool) -> None:
    """Autocast remembers casts of weights, and does not see that an update, or a version, has changed them."""

    def trained(cache: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        pipe = paci_rt.LocalPipeline(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(STAGES)],
            n_microbatches=1,
            loss_fn=nn.functional.mse_loss,
            policy=policy,
            lookahead=lookahead,
            optimizer=lambda params: paci_rt.AdamW(params, lr=0.05),
        )
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            for at in range(6):
                x, y = batch(at)
                pipe.step(x, target=y)
            pipe.drain()
        found = parameters(pipe)
        pipe.close()
        return found

    same(trained(True), trained(False))


class Products(nn.Module):
    """A matrix product that autocast leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None, :] * self.weight).sum(-1).tanh()


@pytest.mark.parametrize("lookahead", [False, True])
def test_autocast_does_not_reach_the_optimizer(lookahead: bool) -> None:
    """Muon's own products, in updates and in steps looked ahead, stay in fp32."""

    def trained(enabled: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        pipe = paci_rt.LocalPipeline(
            [Products() for _ in range(STAGES)],
            n_microbatches=MICRO_BATCHES,
            loss_fn=nn.functional.mse_loss,
            lookahead=lookahead,
            optimizer=lambda params: make_muon(params),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for at in range(4):
                x, y = batch(at)
                pipe.step(x, target=y)
            pipe.drain()
        found = parameters(pipe)
        pipe.close()
        return found

    same(trained(True), trained(False))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_refused_and_nothing_is_lost(mode: Callable[[], Any]) -> None:
    pipe = make("bounded")
    x, y = batch(0)
    with mode(), pytest.raises(RuntimeError, match=rf"step\(\) under torch.{mode.__name__}\(\).*call eval\(\)"):
        pipe.step(x, target=y)
    pipe.step(x, target=y)
    pipe.close()


def test_a_transform_of_torch_func_is_refused() -> None:
    pipe = make("bounded")
    x, y = batch(0)
    pipe.step(x, target=y)

    def inside(value: Tensor) -> Tensor:
        pipe.drain()
        return value.sum()

    with pytest.raises(RuntimeError, match=r"torch\.func.*outside"):
        torch.func.grad(inside)(torch.ones(2))
    pipe.drain()
    pipe.close()


def test_inputs_made_in_inference_mode_train() -> None:
    with torch.inference_mode():
        x, y = batch(0)
        x, y = x.clone(), y.clone()
    results = []
    for given in ((x, y), batch(0)):
        pipe = make("bounded")
        torch.manual_seed(2)
        pipe.step(given[0], target=given[1])
        pipe.drain()
        results.append(parameters(pipe))
        pipe.close()
    same(*results)
