"""Evaluation among training micro-batches: it changes nothing, and says what a drained one says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import schedules
from paci_rt.action import Action, Op
from paci_rt.errors import ScheduleError
from paci_rt.runtime.evaluation import evaluating
from paci_rt.schedules import Shape
from paci_rt.schedules.evaluation import prove, sees_weights_of_a_drain
from paci_rt.schedules.lowering import Lowering, TiedWeight
from paci_rt.schedules.validate import play_streams
from paci_rt.train.config import TrainConfig
from paci_rt.transport import LocalTransport

WIDTH = 8


class Noisy(nn.Module):
    """Draws from every generator while it trains and while it evaluates, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.own = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        scale = random.random() + float(np.random.rand()) + float(torch.rand(1, generator=self.own))
        x = nn.functional.dropout(self.norm(torch.tanh(self.inner(x))), 0.3, training=self.training)
        return x * (1 + 0.01 * scale) + 0.001 * torch.rand_like(x)


def modules(stages: int, kind: str) -> list[nn.Module]:
    torch.manual_seed(7)
    if kind == "noisy":
        return [Noisy() for _ in range(stages)]
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(stages)]


def batch(at: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(at)
    return torch.randn(12, WIDTH, generator=made), torch.randn(12, WIDTH, generator=made)


def optimizer(params: Any) -> torch.optim.Optimizer:
    return paci_rt.AdamW(params, lr=1e-2)


def pipeline(kind: str = "plain", stages: int = 4, **options: Any) -> paci_rt.LocalPipeline:
    made: dict[str, Any] = {"n_microbatches": 6, "loss_fn": nn.MSELoss(), "optimizer": optimizer}
    return paci_rt.LocalPipeline(modules(stages * options.get("chunks", 1), kind), **(made | options))


def state(pipe: paci_rt.LocalPipeline) -> dict[str, Tensor]:
    return {
        f"{stage.stage_index}.{name}": value.clone()
        for stage in pipe.stages
        for name, value in stage.submod.state_dict().items()
    }


def trained(windows: int, validated: tuple[int, ...], **options: Any) -> tuple[Any, dict[int, Tensor], list[Tensor]]:
    """State after some windows, losses of the evaluations by the window that they came before, losses of training."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    pipe = pipeline(**options)
    found: dict[int, Tensor] = {}
    training: list[Tensor] = []
    for k in range(windows):
        losses: list[Tensor] = []
        among: list[list[Tensor]] = [[], []]
        if k in validated:
            for at, place in enumerate(among):
                x, y = batch(1000 + at)
                pipe.eval(x, target=y, losses=place, drained=False)
                x.zero_(), y.zero_()  # the caller's to overwrite
        x, y = batch(k)
        pipe.step(x, target=y, losses=losses)
        training += losses
        if k in validated:
            assert all(len(place) == 6 for place in among)
            found[k] = torch.stack([*among[0], *among[1]])
    pipe.drain()
    assert pipe.stats()["windows"] == windows * pipe._windows_per_step
    return state(pipe), found, training


def drained(windows: int, **options: Any) -> Tensor:
    """What a drained evaluation says after some windows."""
    pipe = pipeline(**options)
    for k in range(windows):
        x, y = batch(k)
        pipe.step(x, target=y)
    pipe.drain()
    found = []
    with evaluating(pipe.stages):
        for at in range(2):
            losses: list[Tensor] = []
            x, y = batch(1000 + at)
            pipe.eval(x, target=y, losses=losses)
            found += losses
    return torch.stack(found)


AMONG = {name: one for name, one in schedules.FAMILIES.items() if one.flush or one.chunks == 1}


def every_schedule() -> Iterator[Any]:
    for name, family in AMONG.items():
        chunks = family.chunks
        options = {"schedule": name, "chunks": chunks, "stages": 3}
        yield pytest.param(options, id=name)
        for policy in family.policies[1:]:
            stages = 2 if policy == "2bw" and family.one_micro_batch_windows else 3
            yield pytest.param(options | {"policy": policy, "stages": stages}, id=f"{name}-{policy}")
        if family.takes_slack:
            yield pytest.param(options | {"slack": 1}, id=f"{name}-slack")
    yield pytest.param({"schedule": "paci", "n_microbatches": 6, "stages": 6}, id="paci-just-exact")
    yield pytest.param({"schedule": "paci", "lookahead": False}, id="paci-without-lookahead")
    yield pytest.param({"schedule": "paci", "buffers": 2}, id="paci-two-buffers")
    for name in ("paci", "1f1b", "paci-split"):  # norms travel with messages, or before the updates
        options = {"schedule": name, "max_grad_norm": 0.05, "on_nonfinite": "skip-window"}
        yield pytest.param(options, id=f"{name}-clipped")


@pytest.mark.parametrize("options", list(every_schedule()))
def test_evaluation_changes_no_bit_and_says_what_a_drained_one_says(options: dict[str, Any]) -> None:
    without, _, losses = trained(5, (), **options)
    with_it, found, losses_with_it = trained(5, (0, 2, 3), **options)
    assert without.keys() == with_it.keys()
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert torch.equal(torch.stack(losses), torch.stack(losses_with_it))
    family = schedules.get(options["schedule"])
    if family.one_micro_batch_windows:  # stages see weights of different updates
        assert torch.equal(found[0], drained(0, **options))
        assert not torch.equal(found[2], drained(2, **options))
        return
    for k, values in found.items():
        assert torch.equal(values, drained(k, **options)), k


@pytest.mark.parametrize("schedule", ["paci", "1f1b", "zb-h1", "pipedream-2bw", "async-1f1b"])
def test_dropout_statistics_and_random_numbers_are_those_of_training_alone(schedule: str) -> None:
    without, _, losses = trained(4, (), schedule=schedule, kind="noisy")
    with_it, _, losses_with_it = trained(4, (1, 2), schedule=schedule, kind="noisy")
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert torch.equal(torch.stack(losses), torch.stack(losses_with_it))


@pytest.mark.parametrize("schedule", ["paci", "1f1b", "interleaved-1f1b", "zb-2p"])
def test_tied_weights_are_those_of_a_drain(schedule: str) -> None:
    chunks = 2 if schedule == "interleaved-1f1b" else 1
    tie = TiedWeight(owner_stage=0, owner="0.weight", reader_stage=3 * chunks - 1, reader="0.weight")

    def made(**options: Any) -> paci_rt.LocalPipeline:
        slices = modules(3 * chunks, "plain")
        slices[-1].load_state_dict(slices[0].state_dict())
        return paci_rt.LocalPipeline(
            slices, schedule=schedule, chunks=chunks, n_microbatches=6, loss_fn=nn.MSELoss(), optimizer=optimizer,
            tied_weights=[tie], **options,
        )  # fmt: skip

    def run(windows: int, validate: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        pipe, within, after = made(), list[Tensor](), list[Tensor]()
        x, y = batch(77)
        for k in range(windows):
            if validate and k == windows - 1:
                pipe.eval(x, target=y, losses=within, drained=False)
            pipe.step(batch(k)[0], target=batch(k)[1])
        pipe.drain()
        pipe.eval(x, target=y, losses=after)
        return state(pipe), torch.stack(within or after), torch.stack(after)

    with_it, within, _ = run(4, True)
    without, _, _ = run(4, False)
    assert all(torch.equal(without[name], with_it[name]) for name in without)
    assert torch.equal(within, run(3, False)[2])


def test_where_windows_are_short_stages_differ_by_at_most_the_drift_bound() -> None:
    """Each E's weights, counted: two stages never see versions further apart than the bound."""
    for stages, accumulation in ((4, 1), (4, 2), (4, 3), (4, 4), (6, 2), (3, 5)):
        pipe = pipeline(stages=stages, n_microbatches=accumulation, trace=True)
        for k in range(9):
            x, y = batch(k)
            pipe.eval(x, target=y, losses=[], drained=False)
            pipe.step(x, target=y)
        seen: dict[int, set[int]] = {}
        for event in pipe.events:
            action = Action.parse(event.action)
            if action.op is Op.E:
                seen.setdefault(action.index, set()).add(event.version)
        assert len(seen) == 9 * accumulation
        spread = max(max(versions) - min(versions) for versions in seen.values())
        exact = all(versions == {index // accumulation} for index, versions in seen.items())
        lowering = pipe.asked_for.lowering
        assert spread <= pipe.stats()["drift_bound"]
        assert exact is sees_weights_of_a_drain(lowering) is (accumulation >= stages)


@pytest.mark.parametrize("capacity", [1, 2, None])
def test_streams_with_evaluations_run_to_their_end(capacity: int | None) -> None:
    played = 0
    for family in AMONG.values():
        for ranks in (1, 2, 5):
            for accumulation in (1, 2, 7):
                for slack in (0, 2) if family.takes_slack else (0,):
                    chunks = family.chunks
                    shape = {"num_stages": ranks * chunks, "accumulation": accumulation, "chunks": chunks}
                    shape["placement"] = family.placement
                    try:
                        lowering = Lowering(family=family, shape=Shape(**shape, slack=slack if ranks > 1 else 0))
                        streams = [lowering.stream(rank, 5) for rank in range(ranks)]
                        play_streams(streams, lowering, capacity)
                    except ValueError:
                        continue  # a shape that the schedule, or so small a channel, does not take
                    try:
                        prove(lowering, 3, capacity)
                    except ScheduleError:
                        assert slack and capacity
                        continue
                    played += 1
    assert played > 90


def test_channels_that_are_too_small_are_refused_before_anything_runs() -> None:
    pipe = pipeline(stages=2, n_microbatches=1, slack=2, transport=LocalTransport(capacity=2))
    x, y = batch(0)
    for _ in range(3):
        pipe.eval(x, target=y, losses=[], drained=False)
    with pytest.raises(ScheduleError, match="the schedule deadlocks with channels of 2 messages"):
        pipe.step(x, target=y)
    pipe.drain()
    pipe.step(x, target=y)


def test_a_drain_runs_what_waits_for_a_step() -> None:
    pipe, x, y = pipeline(), *batch(50)
    within: list[Tensor] = [torch.zeros(())]
    pipe.step(*batch(0)[:1], target=batch(0)[1])
    pipe.eval(x, target=y, losses=within, drained=False)
    assert within == []
    pipe.drain()
    after: list[Tensor] = []
    pipe.eval(x, target=y, losses=after)
    assert torch.equal(torch.stack(within), torch.stack(after))
    assert pipe.eval(x).shape == (12, WIDTH)


def test_statistics_are_about_training() -> None:
    pipe = pipeline(trace=True)
    for k in range(4):
        x, y = batch(k)
        for _ in range(20 if k == 2 else 0):
            pipe.eval(x, target=y, losses=[], drained=False)
        pipe.step(x, target=y)
    pipe.drain()
    stats = pipe.stats()
    of = {
        op: sum(event.end_s - event.start_s for event in pipe.events if Action.parse(event.action).op is op)
        for op in Op
    }
    training = sum(seconds for op, seconds in of.items() if op is not Op.E)
    assert stats["evaluation_s"] == pytest.approx(of[Op.E], rel=0.1)
    assert stats["compute_s"] == pytest.approx(training, rel=0.1)
    assert of[Op.E] > 0.3 * training
    assert stats["compute_s"] <= stats["wall_s"]
    assert stats["windows"] == 4 and stats["micro_batches"] == 24
    pipe.reset_stats()
    assert pipe.stats()["evaluation_s"] == 0


def test_where_it_has_no_place_it_is_refused_and_drained_it_runs() -> None:
    assert set(schedules.FAMILIES) - set(AMONG) == {"paci-v"}
    pipe = pipeline(schedule="paci-v", stages=2, chunks=2)
    x, y = batch(0)
    pipe.step(x, target=y)
    losses: list[Tensor] = []
    with pytest.raises(ValueError, match=r"eval\(drained=False\) under paci-v: .* leave drained=False out"):
        pipe.eval(x, target=y, losses=losses, drained=False)
    pipe.eval(x, target=y, losses=losses)
    assert len(losses) == 6
    pipe.step(x, target=y)
    pipe.drain()
    assert TrainConfig(schedule="paci-v").eval_drained and not TrainConfig(schedule="paci").eval_drained


def test_what_is_refused() -> None:
    pipe, x, y = pipeline(), *batch(0)
    with pytest.raises(ValueError, match=r"eval\(drained=False\) gives losses and nothing else"):
        pipe.eval(x, drained=False)
    with pytest.raises(ValueError, match=r"eval\(drained=False\) gives losses and nothing else"):
        pipe.eval(x, target=y, drained=False)
    losses: list[Tensor] = []
    pipe.eval(x, target=y, losses=losses, drained=False)
    with pytest.raises(ValueError, match="waits for another one"):
        pipe.eval(x, target=y, losses=losses, drained=False)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="different settings of torch"):
        pipe.step(x, target=y)
    pipe.step(x, target=y)
    assert len(losses) == 6


def test_a_failure_leaves_modules_in_training_mode() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("in evaluation")
            return x * 1.0

    slices = [nn.Linear(WIDTH, WIDTH), nn.Sequential(Fails(), nn.Linear(WIDTH, WIDTH))]
    pipe = paci_rt.LocalPipeline(slices, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=optimizer)
    x, y = batch(0)
    pipe.eval(x, target=y, losses=[], drained=False)
    with pytest.raises(paci_rt.ActionError, match=r"action 1E0 failed: RuntimeError: in evaluation"):
        pipe.step(x, target=y)
    assert all(module.training for one in slices for module in one.modules())


def test_a_pipeline_that_never_trains_evaluates_at_once() -> None:
    pipe = paci_rt.LocalPipeline(modules(2, "plain"), n_microbatches=2)
    assert pipe.eval(batch(0)[0], drained=False).shape == (12, WIDTH)
