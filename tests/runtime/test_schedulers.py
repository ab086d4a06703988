"""Every learning-rate scheduler of torch works as in a plain loop and goes on where it was, or is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import paci_rt
from paci_rt import checkpoint

WIDTH, WINDOWS = 4, 8


class Decay:
    """A callable with state of its own, which LambdaLR saves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / (1 + self.calls)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lrs.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3, 6], gamma=0.7),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2, T_mult=2),
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.8**step]),
    "LambdaLR-object": lambda o: lrs.LambdaLR(o, [Decay(), Decay()]),
    "LambdaLR-partial": lambda o: lrs.LambdaLR(o, partial(pow, 0.9)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9 if step % 2 else 0.8),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [0.02, 0.04], total_steps=WINDOWS, three_phase=True),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, [0.02, 0.04], step_size_up=2, mode="exp_range", gamma=0.9),
    "CyclicLR-custom": lambda o: lrs.CyclicLR(o, 1e-3, 0.02, step_size_up=3, scale_fn=lambda x: 0.5**x),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=3), lrs.CosineAnnealingLR(o, 4)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, total_iters=3), lrs.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=5),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "paci-adamw": lambda groups: paci_rt.AdamW(groups, lr=1e-2),
    "paci-sgd": lambda groups: paci_rt.SGD(groups, lr=1e-2, momentum=0.9),
    "torch-adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "tensor-lr": lambda groups: torch.optim.AdamW(with_tensors(groups), lr=torch.tensor(1e-2)),
}


def with_tensors(groups: Any) -> list[dict[str, Any]]:
    """Groups whose learning rate is a tensor, as compiled optimizers take it."""
    return [{key: torch.tensor(value) if key == "lr" else value for key, value in group.items()} for group in groups]


class Layers(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.tanh(layer(x))
        return x


def cut(sizes: list[int]) -> list[nn.Module]:
    stages, at = [], 0
    for size in sizes:
        layers: dict[str, nn.Module] = {}
        for number in range(at, at + size):
            torch.manual_seed(number)
            layers[f"layer{number}"] = nn.Linear(WIDTH, WIDTH)
        stages.append(Layers(layers))
        at += size
    return stages


def groups_of(named: Any) -> list[dict[str, Any]]:
    """Matrices decay; biases do not, and learn at a rate of their own."""
    pairs = list(named)
    return [
        {"params": [param for _, param in pairs if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for _, param in pairs if param.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


def pipeline(scheduler: str, optimizer: str, sizes: list[int], schedule: str = "1f1b") -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        cut(sizes),
        schedule=schedule,
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda named: OPTIMIZERS[optimizer](groups_of(named)),
        lr_scheduler=SCHEDULERS[scheduler],
    )


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def all_options(pipe: paci_rt.LocalPipeline) -> list[list[dict[str, Any]]]:
    return [options(runtime.optimizer.optimizer) for runtime in pipe._executor.runtimes.values()]  # type: ignore[arg-type]


def train(pipe: Any, windows: range) -> None:
    for window in windows:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(window))
        pipe.step(x, target=x.flip(0), return_outputs=False)


def sha(pipe: Any) -> str:
    pipe.drain()
    return paci_rt.params_sha256(sorted(pipe.named_parameters()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_options_are_those_of_a_plain_loop_and_come_back(scheduler: str, optimizer: str, tmp_path: Path) -> None:
    params = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    peers = {
        "paci-adamw": OPTIMIZERS["torch-adamw"],
        "paci-sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    }
    plain = peers.get(optimizer, OPTIMIZERS[optimizer])(groups_of(("", param) for param in params))
    follow = SCHEDULERS[scheduler](plain)
    straight, saved = (pipeline(scheduler, optimizer, sizes) for sizes in ([2, 2], [1, 3]))
    for window in range(WINDOWS):
        train(straight, range(window, window + 1))
        for param in params:
            param.grad = torch.ones_like(param)
        plain.step()
        follow.step()
        for ours in all_options(straight):
            for group, expected in zip(ours, options(plain), strict=True):
                assert {key: group[key] for key in group.keys() & expected.keys()} == {
                    key: expected[key] for key in group.keys() & expected.keys()
                }
    train(saved, range(WINDOWS // 2))
    checkpoint.save(tmp_path, saved)
    for sizes in ([1, 3], [4], [2, 1, 1]):
        resumed = pipeline(scheduler, optimizer, sizes)
        checkpoint.load(tmp_path, resumed)
        assert all(ours == all_options(saved)[0] for ours in all_options(resumed))
        train(resumed, range(WINDOWS // 2, WINDOWS))
        assert sha(resumed) == sha(straight), sizes
        assert all(ours == all_options(straight)[0] for ours in all_options(resumed))


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "SequentialLR", "LambdaLR-object"])
def test_a_full_pipeline_goes_on_as_the_one_that_saved(scheduler: str, tmp_path: Path) -> None:
    writer, reader = (pipeline(scheduler, "paci-adamw", [2, 1, 1], "paci") for _ in range(2))
    train(writer, range(3))
    checkpoint.save(tmp_path, writer)
    checkpoint.load(tmp_path, reader)
    for pipe in (writer, reader):
        train(pipe, range(3, 7))
    assert sha(reader) == sha(writer)


def test_a_scheduler_counts_local_updates() -> None:
    pipe = pipeline("StepLR", "paci-adamw", [2, 2], "async-1f1b")
    train(pipe, range(3))
    pipe.drain()
    assert [scheduler.last_epoch for scheduler in pipe._lr_schedulers] == [6, 6]  # two micro-batches a step


@pytest.mark.parametrize("scheduler", ["StepLR", "ChainedScheduler", "SequentialLR"])
def test_a_scheduler_that_the_loop_steps_too_is_found(scheduler: str) -> None:
    pipe = pipeline(scheduler, "paci-adamw", [2, 2])
    train(pipe, range(1))
    pipe.load_state_dict(pipe.state_dict())  # by right
    train(pipe, range(1, 3))
    pipe._lr_schedulers[0].step()
    with pytest.raises(
        paci_rt.OptimizerOwnedError, match=r"other code has stepped or loaded it.*remove scheduler\.step"
    ):
        train(pipe, range(3, 4))


class Own(lrs.LRScheduler):
    """A scheduler of the user's, with a value for each group that nobody else knows of."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.mine = [0.5, 0.9]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * own**self.last_epoch for base, own in zip(self.base_lrs, self.mine, strict=True)]


def test_a_users_own_class_works_and_moves_only_with_its_groups(tmp_path: Path) -> None:
    def make(sizes: list[int], turned: bool = False) -> paci_rt.LocalPipeline:
        return paci_rt.LocalPipeline(
            cut(sizes),
            schedule="1f1b",
            n_microbatches=2,
            loss_fn=loss_fn,
            optimizer=lambda named: paci_rt.AdamW(groups_of(named)[:: -1 if turned else 1]),
            lr_scheduler=Own,
        )

    saved, straight = make([2, 2]), make([4])
    train(straight, range(4))
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    resumed = make([1, 3])
    checkpoint.load(tmp_path, resumed)
    train(resumed, range(2, 4))
    assert sha(resumed) == sha(straight)
    with pytest.raises(ValueError, match="make the same groups in the same order"):
        checkpoint.load(tmp_path, make([2, 2], turned=True))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return paci_rt.AdamW(module.parameters(), lr=1e-2)


class NeedsEpoch:
    def step(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateless:
    def step(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lrs.ReduceLROnPlateau, r"ReduceLROnPlateau, whose step needs a metric.*call its step\(metric\) yourself"),
        (lambda o: lrs.StepLR(optimizer_of(nn.Linear(1, 1)), 2), r"StepLR of another optimizer \(AdamW\)"),
        (lambda o: lrs.ConstantLR(torch.optim.SGD(nn.Linear(1, 1).parameters())), r"another optimizer \(SGD\)"),
        (lambda o: NeedsEpoch(), r"NeedsEpoch, whose step\(\) needs epoch: a schedule calls step\(\)"),
        (lambda o: Stateless(), r"Stateless, which has no state_dict\(\)"),
        (lambda o: 0.1, r"lr_scheduler is a float, which has no step\(\)"),
        (lambda o: lrs.LambdaLR(o, math.cos), r"LambdaLR whose state_dict\(\) fails \(AttributeError"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(make: Any, words: str) -> None:
    module = nn.Linear(WIDTH, WIDTH)
    stage = paci_rt.PipelineStage(module, 0, 1)
    optimizer = optimizer_of(module)
    with pytest.raises(ValueError, match=words):
        paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=optimizer, lr_scheduler=make(optimizer))
    paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=optimizer).close()  # nothing was taken


def test_a_scheduler_without_its_optimizer_or_for_two_is_refused() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    stage, mine = paci_rt.PipelineStage(module, 0, 1), optimizer_of(module)
    with pytest.raises(ValueError, match=r"optimizer is None: the schedule would step it before you"):
        paci_rt.Schedule1F1B(stage, 2, loss_fn, lr_scheduler=lrs.StepLR(mine, 2))
    with pytest.raises(ValueError, match="lr_scheduler needs optimizer="):
        paci_rt.LocalPipeline(
            [module], schedule="1f1b", n_microbatches=2, loss_fn=loss_fn, lr_scheduler=SCHEDULERS["StepLR"]
        )


class Anything:
    """Has what a schedule calls, and does not say whose it is."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_one_scheduler_for_two_stages_is_refused_and_one_for_some_is_not() -> None:
    def make(*given: Any) -> paci_rt.LocalPipeline:
        return paci_rt.LocalPipeline(
            cut([1, 1]), n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW, lr_scheduler=given
        )

    shared = Anything()
    with pytest.raises(ValueError, match="it would step twice for each update; give each stage its own"):
        make(shared, shared)
    with pytest.raises(ValueError, match="1 lr_schedulers for 2 stages"):
        make(shared)
    one, two = make(None, Anything()), make(None, Anything())
    train(one, range(3))
    two.load_state_dict(one.state_dict())
    assert [None if each is None else each.steps for each in two._lr_schedulers] == [None, 3]


def test_a_plateau_is_stepped_by_hand() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    optimizer = optimizer_of(module)
    stage = paci_rt.PipelineStage(module, 0, 1)
    pipe = paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=optimizer)
    plateau = lrs.ReduceLROnPlateau(optimizer, patience=0, factor=0.0)
    train(pipe, range(1))
    before = sha(pipe)
    for metric in (1.0, 2.0):
        plateau.step(metric)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    train(pipe, range(1, 3))
    assert sha(pipe) == before  # the rate is 0 now
