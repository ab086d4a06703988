"""What a pipeline saves beside parameters: buffers, extra state, options of groups; and that a bad state changes
nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import checkpoint
from support.stateful import BLOCKS, cut, flat, grouped, groups, loss_fn, pipeline, train


@pytest.mark.parametrize("block", BLOCKS)
def test_state_beside_parameters_goes_on_in_any_cut(block: str, tmp_path: Path) -> None:
    straight, saved = pipeline(block, [3]), pipeline(block, [1, 2])
    train(straight, range(6))
    train(saved, range(3))
    checkpoint.save(tmp_path, saved)
    for sizes in ([1, 2], [3], [1, 1, 1]):
        resumed = pipeline(block, sizes)
        checkpoint.load(tmp_path, resumed)
        train(resumed, range(3, 6))
        got, expected = resumed.state_dict(), straight.state_dict()
        for kind in ("params", "buffers", "extra_state", "optimizer"):
            assert flat(got[kind]) == flat(expected[kind]), (sizes, kind)
    state = straight.state_dict()
    assert state["buffers"] or state["extra_state"]
    assert set(state["params"]) | set(state["buffers"]) | set(state["extra_state"]) == set(
        straight.stages[0].submod.state_dict()
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_state_dict_alone_is_enough(block: str) -> None:
    writer, reader = (pipeline(block, [1, 1, 1], "paci") for _ in range(2))
    train(writer, range(3))
    state = copy.deepcopy(writer.state_dict())
    train(reader, range(7, 8))
    reader.load_state_dict(state)
    for pipe in (writer, reader):
        train(pipe, range(3, 6))
    assert flat(reader.state_dict()) == flat(writer.state_dict())


TORCH: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, lr_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    "asgd": lambda params: torch.optim.ASGD(params, lr=1e-2, t0=2),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "radam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "adadelta": torch.optim.Adadelta,
    "nesterov": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "tensor-lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-2)),
}


@pytest.mark.parametrize("kind", TORCH)
def test_any_torch_optimizer_goes_on_in_any_cut(kind: str, tmp_path: Path) -> None:
    straight, saved = (pipeline(sizes=sizes, optimizer=TORCH[kind]) for sizes in ([3], [1, 2]))
    train(straight, range(6))
    train(saved, range(3))
    checkpoint.save(tmp_path, saved)
    for sizes in ([2, 1], [3]):
        resumed = pipeline(sizes=sizes, optimizer=TORCH[kind])
        checkpoint.load(tmp_path, resumed)
        train(resumed, range(3, 6))
        assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"]), sizes


class Shared(torch.optim.SGD):
    """An optimizer with a state that belongs to no parameter, a count in its groups, and both in its step."""

    def step(self, closure: Any = None) -> None:
        self.state["all"] = {"steps": self.state.get("all", {"steps": 0})["steps"] + 1}
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.1 / (group["k"] + self.state["all"]["steps"])
        super().step(closure)


class More(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": 3}


def test_what_an_optimizer_keeps_elsewhere_goes_on_too(tmp_path: Path) -> None:
    straight, saved, resumed = (pipeline(sizes=sizes, optimizer=Shared) for sizes in ([3], [1, 2], [2, 1]))
    train(straight, range(4))
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    checkpoint.load(tmp_path, resumed)
    train(resumed, range(2, 4))
    assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"])
    assert resumed._optimizers[0].optimizer.state["all"] == {"steps": 4}  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"More\.state_dict\(\) has \['seen'\] beside states and groups"):
        pipeline(optimizer=lambda params: More(params, lr=0.1)).state_dict()


def test_options_that_the_user_changed_come_back_by_parameter(tmp_path: Path) -> None:
    saved = pipeline(sizes=[1, 2], optimizer=grouped)
    train(saved, range(1))
    for stage in range(2):
        groups(saved, stage)[0].update(weight_decay=0.7, betas=(0.5, 0.6), lr=0.03)
    checkpoint.save(tmp_path, saved)
    turned = pipeline(sizes=[3], optimizer=lambda params: grouped(params[::-1]))
    checkpoint.load(tmp_path, turned)
    matrices, vectors = groups(turned, 0)
    assert (matrices["weight_decay"], matrices["betas"], matrices["lr"]) == (0.7, (0.5, 0.6), 0.03)
    assert (vectors["weight_decay"], vectors["lr"], vectors["name"]) == (0.0, 1e-2, "plain")
    train(saved, range(1, 3))
    train(turned, range(1, 3))
    assert flat(turned.state_dict()["params"]) == flat(saved.state_dict()["params"])


def test_frozen_parameters_and_their_group_options_survive(tmp_path: Path) -> None:
    def frozen(sizes: list[int]) -> paci_rt.LocalPipeline:
        modules = cut("batch-norm", sizes)
        for module in modules:
            for name, param in module.named_parameters():
                param.requires_grad_("block1.0" not in name)
        return paci_rt.LocalPipeline(
            modules,
            schedule="1f1b",
            n_microbatches=2,
            loss_fn=loss_fn,
            optimizer=lambda named: grouped([param for _, param in named]),
        )

    straight, saved, resumed = frozen([3]), frozen([1, 2]), frozen([2, 1])
    train(straight, range(4))
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    checkpoint.load(tmp_path, resumed)
    train(resumed, range(2, 4))
    assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"])


def test_optimizers_made_of_named_parameters_go_on_with_another_cut(tmp_path: Path) -> None:
    """Torch notes the names in the groups; they are of the stage, not of the state."""

    def make(sizes: list[int]) -> paci_rt.LocalPipeline:
        return paci_rt.LocalPipeline(
            cut("batch-norm", sizes),
            n_microbatches=2,
            schedule="1f1b",
            loss_fn=loss_fn,
            optimizer=lambda named: paci_rt.AdamW(named, lr=1e-2),
        )

    straight, saved = make([3]), make([1, 2])
    train(straight, range(4))
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    for sizes in ([3], [2, 1], [1, 1, 1]):
        resumed = make(sizes)
        checkpoint.load(tmp_path, resumed)
        train(resumed, range(2, 4))
        assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"])


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path: Path, schedule: str) -> None:
    def ours(rate: float) -> paci_rt.LocalPipeline:
        torch.manual_seed(0)
        return paci_rt.LocalPipeline(
            [nn.Linear(4, 4), nn.Linear(4, 2)],
            n_microbatches=2,
            loss_fn=nn.MSELoss(),
            schedule=schedule,
            optimizer=lambda named: paci_rt.SGD(named, lr=rate),
        )

    good = ours(1e-3)
    checkpoint.save(tmp_path, good)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = ours(3e38)
    bad.step(torch.full((4, 4), 10.0), target=torch.ones(4, 2))  # its gradients are finite
    with pytest.raises(paci_rt.CheckpointError, match=r"'weight' is not finite, so nothing was saved"):
        checkpoint.save(tmp_path, bad)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_mask_is_saved_and_a_running_mean_that_is_nan_is_not(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(4)
    norm.register_buffer("mask", torch.full((4,), float("-inf")))
    norm.register_buffer("nothing", torch.empty(0))
    frozen = nn.Parameter(torch.full((2,), float("inf")), requires_grad=False)
    norm.register_parameter("bound", frozen)
    pipeline = paci_rt.LocalPipeline(
        [nn.Linear(4, 4), norm], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW, schedule="gpipe"
    )
    checkpoint.save(tmp_path, pipeline)
    assert norm.running_mean is not None
    norm.running_mean[2] = float("nan")
    with pytest.raises(paci_rt.CheckpointError, match=r"stage 1: 'running_mean' has NaN"):
        checkpoint.save(tmp_path, pipeline)
