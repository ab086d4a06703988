"""Modules, parameters and optimizer groups that change after the schedule was made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import paci_rt
from support.changing import ACCUMULATION, Change, adamw, batch, loss_fn, make_stages, pipelined, plain
from support.plain import same

FLUSH = ["1f1b", "zb-h1", "gpipe"]


def name_of(value: Any) -> str | None:
    return getattr(value, "__name__", None)


def freeze_and_thaw(step: int, stages: Any, optimizers: Any) -> None:
    if step == 1:
        stages[0][0].weight.requires_grad_(False)
        stages[1][2].bias.requires_grad_(False)
    if step == 3:
        stages[0][0].weight.requires_grad_(True)


def freeze_a_stage(step: int, stages: Any, optimizers: Any) -> None:
    stages[0].requires_grad_(step not in (1, 2))


def late_group(step: int, stages: Any, optimizers: Any) -> None:
    """A layer whose parameters the optimizer gets later, with a rate of their own."""
    if step == 0:
        stages[1][2].requires_grad_(False)
        optimizers[1].param_groups[0]["params"] = list(stages[1][0].parameters())
    if step == 2:
        stages[1][2].requires_grad_(True)
        optimizers[1].add_param_group({"params": list(stages[1][2].parameters()), "lr": 1e-3})


def replaced_parameter(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        new = nn.Parameter(stages[0][0].weight.detach() * 2)
        stages[0][0].weight = new
        optimizers[0].param_groups[0]["params"][0] = new


def added_layer(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        torch.manual_seed(7)
        stages[1].append(nn.Linear(3, 3))
        optimizers[1].add_param_group({"params": list(stages[1][-1].parameters())})


def removed_layer(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        del stages[0][2]


class Adapter(nn.Module):
    """As LoRA puts it around a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def injected_adapter(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        torch.manual_seed(7)
        adapter = stages[1][0] = Adapter(stages[1][0])
        optimizers[1].add_param_group({"params": [*adapter.down.parameters(), *adapter.up.parameters()]})


def assigned(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        values = {name: value * 0.5 for name, value in stages[0].state_dict().items()}
        stages[0].load_state_dict(values, assign=True)
        optimizers[0].param_groups[0]["params"][:] = list(stages[0].parameters())


def pruned(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        prune.l1_unstructured(stages[0][0], "weight", amount=5)
        optimizers[0].param_groups[0]["params"][:] = list(stages[0].parameters())


def parametrized(step: int, stages: Any, optimizers: Any) -> None:
    if step == 2:
        parametrizations.weight_norm(stages[1][0])
        optimizers[1].param_groups[0]["params"][:] = list(stages[1].parameters())


CHANGES = [
    freeze_and_thaw,
    freeze_a_stage,
    late_group,
    replaced_parameter,
    added_layer,
    removed_layer,
    injected_adapter,
    assigned,
    pruned,
    parametrized,
]


@pytest.mark.parametrize("change", CHANGES, ids=name_of)
@pytest.mark.parametrize("schedule", FLUSH)
def test_followed_to_the_bit(change: Change, schedule: str) -> None:
    same(pipelined(change, schedule), plain(change))


OURS = [lambda params: paci_rt.AdamW(params, lr=1e-2), lambda params: paci_rt.Lion(params, lr=1e-3)]


@pytest.mark.parametrize("make", [adamw, *OURS])
@pytest.mark.parametrize("change", [freeze_and_thaw, late_group, added_layer], ids=name_of)
def test_a_step_after_a_change_is_that_of_a_schedule_made_anew(change: Change, make: Any) -> None:
    """With the state of the parameters that stay."""
    results = []
    for anew in (False, True):
        stages = make_stages()
        optimizers = [make(stage.parameters()) for stage in stages]
        pipe: Any = None
        for step in range(4):
            change(step, stages, optimizers)
            if pipe is None or anew:
                if pipe is not None:
                    pipe.close()
                pipe = paci_rt.LocalPipeline(
                    stages, schedule="1f1b", n_microbatches=ACCUMULATION, loss_fn=loss_fn, optimizer=optimizers
                )
            x, y = batch(step)
            pipe.step(x, target=y)
        results.append({f"{at}.{name}": p for at, s in enumerate(stages) for name, p in s.named_parameters()})
    same(*results)


def test_no_optimizer_leaves_the_gradients_of_a_replaced_parameter() -> None:
    stages, twin = make_stages(), make_stages()
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=ACCUMULATION, loss_fn=loss_fn)
    x, y = batch(0)
    pipe.step(x, target=y)
    for module in (*stages, *twin):
        module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()}, assign=True)
    for param in (param for stage in stages for param in stage.parameters()):
        assert param.grad is None
    pipe.step(x, target=y)
    for x_part, y_part in zip(x.tensor_split(ACCUMULATION), y.tensor_split(ACCUMULATION), strict=True):
        loss_fn(twin[1](twin[0](x_part)), y_part).backward()
    for ours, theirs in zip(stages, twin, strict=True):
        for param, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(param.grad, expected.grad / ACCUMULATION)  # type: ignore[arg-type,operator]


def test_a_new_submod_is_bound() -> None:
    stages, others = make_stages(), make_stages()
    for param in others[0].parameters():
        param.data.mul_(0.5)
    twin = copy.deepcopy(others[0])
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=1, loss_fn=loss_fn)
    x, y = batch(0)
    pipe.step(x, target=y)
    pipe.stages[0].submod = others[0]
    stages[1].zero_grad()
    pipe.step(x, target=y)
    loss_fn(make_stages()[1](twin(x)), y).backward()
    for param, expected in zip(others[0].parameters(), twin.parameters(), strict=True):
        assert torch.equal(param.grad, expected.grad)  # type: ignore[arg-type]
    assert pipe.stages[0].split_layers == ["0"] and "forward" not in stages[0][0].__dict__  # type: ignore[index]


# --- refused, where the optimizer does not follow ---


def assign_only(stages: Any) -> None:
    stages[0].load_state_dict(copy.deepcopy(stages[0].state_dict()), assign=True)


def replace_only(stages: Any) -> None:
    stages[0][0].weight = nn.Parameter(torch.zeros(6, 4))


def add_only(stages: Any) -> None:
    stages[1].append(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (assign_only, r"stage 0: parameter '0\.weight' was replaced.*misses trainable parameters.*without assign=True"),
        (replace_only, r"stage 0: parameter '0\.weight' was replaced since the schedule was made"),
        (add_only, r"stage 1: parameter '3\.weight' was added.*'3\.bias' was added.*misses trainable parameters"),
        (lambda stages: stages[0].half(), r"'0\.weight' no longer lives in the schedule's flat buffer"),
        (lambda stages: setattr(stages[1][0].weight, "data", torch.zeros(6, 6)), r"'0\.weight' no longer lives"),
        (lambda stages: nn.utils.weight_norm(stages[0][0]), r"'0\.weight_g' was added.*'0\.weight_v' was added"),
    ],
)
@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_what_cannot_be_followed_is_named(change: Callable[[Any], None], message: str, schedule: str) -> None:
    stages = make_stages()
    pipe = paci_rt.LocalPipeline(
        stages, schedule=schedule, n_microbatches=ACCUMULATION, loss_fn=loss_fn, optimizer=adamw
    )
    x, y = batch(0)
    pipe.step(x, target=y)
    change(stages)
    for _ in range(2):  # again and again
        with pytest.raises(paci_rt.StageError, match=message):
            pipe.step(x, target=y)
    pipe.close()


def test_after_a_refusal_the_remedy_works() -> None:
    stages = make_stages()
    optimizers = [adamw(stage.parameters()) for stage in stages]
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=optimizers)
    x, y = batch(0)
    add_only(stages)
    with pytest.raises(paci_rt.StageError, match=r"'3\.weight'"):
        pipe.step(x, target=y)
    optimizers[1].add_param_group({"params": list(stages[1][3].parameters())})  # type: ignore[index]
    before = stages[1][3].weight.detach().clone()  # type: ignore[index]
    pipe.step(x, target=y)
    assert not torch.equal(before, stages[1][3].weight)  # type: ignore[index]


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Linear | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.linear is None:
            self.linear = nn.Linear(x.shape[-1], 4)
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_parameter_that_comes_in_the_middle_of_a_step_is_named() -> None:
    stages = make_stages()
    stages[0].insert(0, Lazy())  # type: ignore[operator]
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=2, loss_fn=loss_fn)
    x, y = batch(0)
    with pytest.raises(paci_rt.StageError, match=r"parameter '0\.linear\.weight' came, or was unfrozen, in the middle"):
        pipe.step(x, target=y)
    stages[0].zero_grad()
    pipe.step(x, target=y)  # from now on it is one of the stage's
    assert stages[0][0].linear.weight.grad is not None  # type: ignore[index]


# --- with micro-batches in flight ---


@pytest.mark.parametrize("policy", ["bounded", "stash", "recompute"])
def test_work_in_flight_is_finished_as_it_was_begun(policy: str) -> None:
    """Freezing between steps gives the weights of freezing after a drain."""

    def trained(change: Change, *, drain: bool) -> Any:
        stages = make_stages()
        pipe = paci_rt.LocalPipeline(
            stages, schedule="paci", n_microbatches=2, loss_fn=loss_fn, optimizer=adamw, policy=policy
        )
        for step in range(4):
            if step == 2 and drain:
                pipe.drain()
            change(step, stages, [])
            x, y = batch(step)
            pipe.step(x, target=y)
        pipe.drain()
        return {f"{at}.{name}": p.detach() for at, s in enumerate(stages) for name, p in s.named_parameters()}

    def change(step: int, stages: Any, _: Any) -> None:
        if step == 2:
            stages[0][0].weight.requires_grad_(False)

    same(trained(change, drain=False), trained(change, drain=True))


def test_drain_after_freezing_keeps_the_gradients_that_were_owed() -> None:
    results = []
    for freeze_first in (False, True):
        stages = make_stages()
        pipe = paci_rt.LocalPipeline(
            stages, schedule="paci", n_microbatches=2, loss_fn=loss_fn, optimizer=adamw, lookahead=False
        )
        x, y = batch(0)
        pipe.step(x, target=y)
        if freeze_first:
            stages[0].requires_grad_(False)
        pipe.drain()
        assert all(param.requires_grad is not freeze_first for param in stages[0].parameters())
        results.append({name: param.detach() for name, param in stages[0].named_parameters()})
    same(*results)


def test_one_process_of_several_asks_for_a_drain() -> None:
    """What a stage alone can say: the others do not know of the change."""
    stages = make_stages()
    pipe = paci_rt.LocalPipeline(stages, schedule="paci", n_microbatches=2, loss_fn=loss_fn, optimizer=adamw)
    pipe._watch._all_here = False
    x, y = batch(0)
    pipe.step(x, target=y)
    stages[0][0].weight.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(
        paci_rt.StageError, match=r"'0\.weight' was frozen while micro-batches are in flight: call drain"
    ):
        pipe.step(x, target=y)
    pipe.drain()
    pipe.step(x, target=y)
    pipe.drain()


def test_a_replaced_parameter_of_a_forward_that_runs_again_is_named() -> None:
    stages = make_stages()
    optimizers = [adamw(stage.parameters()) for stage in stages]
    pipe = paci_rt.LocalPipeline(
        stages, schedule="paci", n_microbatches=2, loss_fn=loss_fn, optimizer=optimizers, policy="recompute"
    )
    x, y = batch(0)
    pipe.step(x, target=y)
    old = stages[0][0].weight  # type: ignore[index]
    stages[0][0].weight = nn.Parameter(torch.zeros(6, 4))  # type: ignore[index]
    with pytest.raises(paci_rt.StageError, match=r"'0\.weight' was replaced while.*policy 'recompute'"):
        pipe.drain()
    stages[0][0].weight = old  # type: ignore[index]
    pipe.drain()
