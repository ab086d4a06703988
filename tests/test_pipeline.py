"""What a user meets: steps, evaluation, state, and mistakes that are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import same
from support.toy import Run, batch, loss_fn, make_optimizer, module


def test_without_an_optimizer_gradients_are_left_as_torch_leaves_them() -> None:
    run = Run(schedule="1f1b", stages=2, accumulation=3)
    modules = [module(stage, run) for stage in range(2)]
    reference = nn.Sequential(*copy.deepcopy(modules))
    pipe = paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=3, loss_fn=loss_fn)
    for step in range(2):  # the second step adds to the first, as long as nobody zeroes
        x, y = batch(run, step)
        pipe.step(x, target=y)
        fresh: dict[str, Tensor] = {}
        copied = copy.deepcopy(reference)
        copied.zero_grad()
        for x_part, y_part in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
            loss_fn(copied(x_part), y_part).backward()
        for name, param in copied.named_parameters():
            fresh[name] = param.grad / 3  # type: ignore[operator]
        for (name, param), ours in zip(
            reference.named_parameters(), (p for m in modules for p in m.parameters()), strict=True
        ):
            param.grad = fresh[name] if param.grad is None else param.grad + fresh[name]
            assert ours.grad is not None and torch.equal(ours.grad, param.grad)


def test_outputs_losses_and_evaluation() -> None:
    run = Run(schedule="paci", stages=3, accumulation=4)
    modules = [module(stage, run) for stage in range(3)]
    pipe = paci_rt.LocalPipeline(
        modules, n_microbatches=4, loss_fn=loss_fn, optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    x, y = batch(run, 0)
    losses: list[Tensor] = [torch.zeros(())]
    with torch.no_grad():
        expected = nn.Sequential(*modules)(x)
    output = pipe.step(x, target=y, losses=losses)
    # A matrix product over a quarter of the rows may round differently: one unit in the last place of fp32.
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6) and len(losses) == 4 and not losses[0].requires_grad
    assert pipe.step(x, target=y, return_outputs=False) is None
    evaluated = pipe.eval(x, target=y, losses=losses)
    assert torch.allclose(evaluated, nn.Sequential(*modules)(x).detach(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(torch.stack(losses).mean(), loss_fn(evaluated, y))
    assert pipe.stats()["micro_batches"] == 8  # evaluation is not counted as training


def test_a_drain_in_between_restarts_cleanly_and_state_round_trips() -> None:
    run = Run(schedule="paci", stages=3, accumulation=2, windows=6)

    def make() -> paci_rt.LocalPipeline:
        return paci_rt.LocalPipeline(
            [module(stage, run) for stage in range(3)],
            n_microbatches=2,
            loss_fn=loss_fn,
            optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        )

    whole, first = make(), make()
    for step in range(3):
        x, y = batch(run, step)
        whole.step(x, target=y)
        first.step(x, target=y)
    whole.drain()
    state = copy.deepcopy(first.state_dict())
    assert state["windows"] == 3
    second = make()
    second.load_state_dict(state)
    for step in range(3, 6):
        x, y = batch(run, step)
        whole.step(x, target=y)
        second.step(x, target=y)
    same(second.state_dict()["params"], whole.state_dict()["params"])
    with pytest.raises(ValueError, match="missing"):
        second.load_state_dict({**state, "params": {}})


class _InPlaceMistake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.linear(x))
        y.mul_(2.0)  # sigmoid's backward needs its output
        return y


def test_autograds_check_of_the_users_own_in_place_mistakes_still_works() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)
    pipe = paci_rt.LocalPipeline(
        [_InPlaceMistake(), nn.Linear(16, 5)],
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.SGD(params, lr=0.1),
    )
    x, y = batch(run, 0)
    with pytest.raises(paci_rt.ActionError, match=r"action 0B0 failed: RuntimeError: .*inplace operation") as caught:
        pipe.step(x, target=y)
    assert ">0B0<" in str(caught.value) and caught.value.action == "0B0"
    with pytest.raises(paci_rt.PaciError, match="failed earlier"):
        pipe.step(x, target=y)


@pytest.mark.parametrize("optimizer", ["adamw", "torch-adamw"])
def test_updates_leave_version_counters_alone(optimizer: str) -> None:
    run = Run(schedule="paci", stages=2, accumulation=2, optimizer=optimizer)
    modules = [module(stage, run) for stage in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules, n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: make_optimizer(optimizer, params)
    )
    weight = next(modules[0].parameters())
    version, before = weight._version, weight.detach().clone()
    for step in range(3):
        x, y = batch(run, step)
        pipe.step(x, target=y)
    pipe.drain()
    assert weight._version == version and not torch.equal(weight, before)


def pipeline(**changes: Any) -> paci_rt.LocalPipeline:
    run = Run(schedule="paci", stages=2, accumulation=2)
    options: dict[str, Any] = {
        "n_microbatches": 2,
        "loss_fn": loss_fn,
        "optimizer": lambda params: paci_rt.SGD(params, lr=0.1),
        **changes,
    }
    return paci_rt.LocalPipeline([module(stage, run) for stage in range(2)], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_microbatches": 0}, "n_microbatches is 0"),
        ({"slack": -1}, "slack is -1"),
        ({"schedule": "1f1b", "slack": 1}, "takes no slack"),
        ({"schedule": "packi"}, "unknown schedule 'packi': did you mean 'paci'"),
        ({"optimizer": None}, "optimizer is None"),
        ({"loss_fn": None}, "loss_fn is None, and an optimizer was given"),
        ({"optimizer": []}, "0 optimizers for 2 stages"),
        ({"buffers": 3}, "buffers"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**changes)


def test_bad_batches_are_named_and_nothing_runs() -> None:
    pipe = pipeline()
    x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
    for args, kwargs, message in (
        ((), {"target": y}, "no inputs given"),
        ((x,), {}, "no target given"),
        ((x[:1],), {"target": y}, r"args\[0\] has shape \(1, 16\)"),
        ((x,), {"target": y[:1]}, "target has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.step(*args, **kwargs)
    with pytest.raises(TypeError, match="losses is a tuple"):
        pipe.step(x, target=y, losses=())  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(RuntimeError, match="eval"):
        pipe.step(x, target=y)
    pipe.step(x, target=y)  # still whole


def test_a_loss_that_is_no_scalar_is_named() -> None:
    pipe = pipeline(loss_fn=lambda output, target: output)
    x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
    with pytest.raises(paci_rt.StageError, match="scalar"):
        pipe.step(x, target=y)


def test_stepping_the_optimizer_is_refused_with_the_reason() -> None:
    for kind in ("adamw", "torch-adamw"):
        optimizers: list[torch.optim.Optimizer] = []

        def make(
            params: Any, kind: str = kind, made: list[torch.optim.Optimizer] = optimizers
        ) -> torch.optim.Optimizer:
            made.append(make_optimizer(kind, params))
            return made[-1]

        pipe = pipeline(optimizer=make)
        with pytest.raises(paci_rt.OptimizerOwnedError, match="schedule"):
            optimizers[0].step()
        x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
        pipe.step(x, target=y)


def test_optimizer_parameters_must_be_the_stages() -> None:
    stranger = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameter"):
        pipeline(optimizer=lambda params: paci_rt.SGD([*params, ("stranger", stranger.weight)], lr=0.1))
    with pytest.raises(ValueError, match=r"weight|bias"):
        pipeline(optimizer=lambda params: paci_rt.SGD(params[:-1], lr=0.1))


def test_a_pipeline_that_could_not_be_made_lets_go_of_what_it_took() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)
    modules = [module(stage, run) for stage in range(2)]
    optimizers = [torch.optim.SGD(modules[0].parameters(), lr=0.1), torch.optim.SGD(modules[0].parameters(), lr=0.1)]
    with pytest.raises(ValueError, match="parameter"):  # the second optimizer has the wrong stage's parameters
        paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=loss_fn, optimizer=optimizers)
    optimizers[0].step()  # the user's own again


def test_a_stage_belongs_to_one_schedule_at_a_time() -> None:
    stage = paci_rt.PipelineStage(nn.Linear(16, 5), 0, 1)
    x, y = batch(Run(schedule="paci", stages=1, accumulation=2), 0)

    def schedule() -> paci_rt.SchedulePACI:
        return paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=paci_rt.SGD(stage.parameters(), lr=0.1))

    first = schedule()
    with pytest.raises(paci_rt.StageError, match="already belongs"):
        schedule()
    first.step(x, target=y)
    first.close()
    with pytest.raises(paci_rt.StageError, match="closed"):
        first.step(x, target=y)
    schedule().step(x, target=y)


def test_a_module_moved_off_its_flat_buffer_is_named() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)
    modules = [module(stage, run) for stage in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules, n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    modules[1][0].weight.data = modules[1][0].weight.data.clone()  # type: ignore[index]
    x, y = batch(run, 0)
    with pytest.raises(paci_rt.StageError, match=r"0\.weight"):
        pipe.step(x, target=y)


def test_events_are_recorded_and_parse_back() -> None:
    pipe = pipeline(trace=True)
    x, y = batch(Run(schedule="paci", stages=2, accumulation=2), 0)
    pipe.step(x, target=y)
    pipe.drain()
    assert sorted(event.action for event in pipe.events) == sorted(
        ["0F0", "0F1", "0B0", "0B1", "0U0", "1F0", "1B0", "1F1", "1B1", "1U0"]
    )
    assert all(event.end_s >= event.start_s for event in pipe.events)


def test_unequal_names_across_stages_are_made_unique() -> None:
    names = [name for name, _ in pipeline().named_parameters()]
    assert "stages.0.0.weight" in names and "stages.1.0.weight" in names and len(set(names)) == len(names)
