"""Whole runs: bits of plain training and of torch's pipelines, drift, memory, tensors between stages."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.marks import slow
from support.plain import plain_training, same
from support.pool import WorkerPool
from support.toy import Run, batch, loss_fn, make_optimizer, module, train_local, train_rank


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "accumulation"), [(1, 1), (1, 3), (2, 4), (3, 5), (4, 2)])
def test_flush_schedules_equal_plain_training_bit_for_bit(schedule: str, stages: int, accumulation: int) -> None:
    for optimizer in ("torch-adamw", "torch-sgd"):
        run = Run(schedule=schedule, stages=stages, accumulation=accumulation, optimizer=optimizer)
        plain, piped = plain_training(run), train_local(run)
        same(piped["params"], plain["params"])
        assert piped["losses"] == plain["losses"]


def test_one_stage_of_paci_is_plain_training() -> None:
    run = Run(schedule="paci", stages=1, accumulation=3, optimizer="torch-adamw")
    same(train_local(run)["params"], plain_training(run)["params"])


def torch_rank(rank: int, group: Any, run: Run) -> dict[str, Any]:
    """The same training under ``torch.distributed.pipelining``."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    submodule = module(rank, run)
    stage = PipelineStage(submodule, rank, run.stages, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, run.accumulation, loss_fn)
    optimizer = make_optimizer(run.optimizer, submodule.parameters())
    for step in range(run.windows):
        x, y = batch(run, step)
        losses: list[Tensor] = []
        target = y if rank == run.stages - 1 else None
        schedule.step(*((x,) if rank == 0 else ()), target=target, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
    return {"params": {f"{rank}.{name}": p.detach().clone() for name, p in submodule.named_parameters()}}


@pytest.mark.parametrize(("stages", "accumulation"), [(2, 4), slow(3, 3), slow(4, 6)])
def test_1f1b_equals_torch_bit_for_bit(workers: WorkerPool, stages: int, accumulation: int) -> None:
    run = Run(schedule="1f1b", stages=stages, accumulation=accumulation, optimizer="torch-adamw")
    theirs = workers.run(torch_rank, stages, run)
    ours = workers.run(train_rank, stages, run)
    for rank in range(stages):
        same(ours[rank]["params"], theirs[rank]["params"])


@pytest.mark.parametrize("stages", [2, slow(3), slow(5), slow(8)])
def test_drift_counted_in_a_run_is_the_formula(stages: int) -> None:
    for accumulation, slack in itertools.product((1, 2, 4, 7), (0, 1, 2)):
        run = Run(
            schedule="paci",
            stages=stages,
            accumulation=accumulation,
            slack=slack,
            windows=4 * stages // accumulation + 4,
        )
        stats = train_local(run)["stats"]
        ahead = [stages - 1 - stage + (slack if stage < stages - 1 else 0) for stage in range(stages)]
        assert [max(stats["drift"][stage]) for stage in range(stages)] == [math.ceil(w / accumulation) for w in ahead]
        assert stats["max_drift"] == stats["drift_bound"]
        assert stats["peak_in_flight"] == {stage: w + 1 for stage, w in enumerate(ahead)}
        assert stats["micro_batches"] == run.windows * accumulation and stats["windows"] == run.windows


@pytest.mark.parametrize("slack", [slow((3, 2, 1, 0)), (0, 1, 2, 0), slow((6, 1, 0, 0))])
def test_slack_by_stage_keeps_its_bounds_exactly(slack: tuple[int, ...]) -> None:
    ahead = [3 - stage + more for stage, more in enumerate(slack)]
    for schedule, accumulation in itertools.product(("paci", "paci-split"), (1, 2, 3, 8)):
        run = Run(schedule=schedule, stages=4, accumulation=accumulation, slack=slack, windows=30 // accumulation + 4)
        stats = train_local(run)["stats"]
        assert stats["slack"] == list(slack)
        assert [max(stats["drift"][stage]) for stage in range(4)] == [math.ceil(w / accumulation) for w in ahead]
        assert stats["max_drift"] == stats["drift_bound"] == math.ceil(ahead[0] / accumulation)
        assert stats["peak_in_flight"] == {stage: w + 1 for stage, w in enumerate(ahead)}
        assert stats["peak_rank_in_flight"][0] == ahead[0] + 1


def test_one_number_of_slack_is_the_same_as_one_a_stage() -> None:
    one, each, listed = (
        train_local(Run(schedule="paci", stages=3, accumulation=2, slack=slack)) for slack in (2, (2, 2, 0), [2, 2, 0])
    )
    same(one["params"], each["params"])
    same(one["params"], listed["params"])
    assert one["stats"]["slack"] == each["stats"]["slack"] == listed["stats"]["slack"] == 2
    other = train_local(Run(schedule="paci", stages=3, accumulation=2, slack=(2, 1, 0)))
    assert any(not torch.equal(other["params"][name], param) for name, param in one["params"].items())


def test_two_buffers_change_memory_and_nothing_else() -> None:
    one = train_local(Run(schedule="paci", stages=3, accumulation=2, buffers=1))
    two = train_local(Run(schedule="paci", stages=3, accumulation=2, buffers=2))
    same(one["params"], two["params"])
    for stage in range(3):
        held, doubled = one["stats"]["memory"][stage], two["stats"]["memory"][stage]
        assert doubled["accumulators"] == 2 * held["accumulators"]
        assert doubled["activations"] == held["activations"]


def test_paci_holds_what_1f1b_holds_to_the_byte() -> None:
    for stages, accumulation in ((2, 2), (4, 4), (4, 8)):
        paci, flush = (
            train_local(Run(schedule=name, stages=stages, accumulation=accumulation, batch=24))["stats"]["memory"]
            for name in ("paci", "1f1b")
        )
        assert paci == flush
        assert all(part["activations"] > 0 for part in paci.values())


class _Two(nn.Module):
    """Passes a float tensor, a mask that needs no gradient and a count through the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = x > 0 if mask is None else mask
        return self.linear(x) * mask, mask, torch.tensor([2], dtype=torch.int64)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x * mask) * scale


def tuple_modules(count: int) -> list[nn.Module]:
    torch.manual_seed(3)
    return [*(_Two() for _ in range(count - 1)), _Head()]


def train_tuples(rank: int, group: Any, stages: int) -> dict[str, Tensor]:
    stage = paci_rt.PipelineStage(tuple_modules(stages)[rank], rank, stages, "cpu", group=group)
    optimizer = paci_rt.SGD(stage.parameters(), lr=0.1)
    pipe = paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=optimizer)
    return _train_tuples(pipe)


def _train_tuples(pipe: Any) -> dict[str, Tensor]:
    run = Run(schedule="paci", stages=3, accumulation=2, batch=100)
    for step in range(3):
        x, y = batch(run, step)
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None)
    pipe.drain()
    return {
        f"{stage.stage_index}.{name}": p.detach().clone()
        for stage in pipe.stages
        for name, p in stage.named_parameters()
    }


def test_tuples_travel_with_tensors_that_need_no_gradient(workers: WorkerPool) -> None:
    local = paci_rt.LocalPipeline(
        tuple_modules(3), n_microbatches=2, loss_fn=loss_fn, optimizer=lambda params: paci_rt.SGD(params, lr=0.1)
    )
    expected = _train_tuples(local)
    params: dict[str, Tensor] = {}
    for rank in workers.run(train_tuples, 3, 3):
        params |= rank
    same(params, expected)
    start = tuple_modules(3)
    moved = [not torch.equal(expected[f"{at}.linear.weight"], start[at].linear.weight) for at in range(3)]
    assert all(moved)
