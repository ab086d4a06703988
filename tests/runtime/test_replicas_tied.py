"""Tied weights of pipelines with replicas: the reader's gradients enter the owner's sum before it travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import paci_rt
from support.replicated import Replicated, gathered, groups_of, require_equal
from support.toy import Run

VOCABULARY, WIDTH, WINDOWS = 12, 6, 6
TIE = paci_rt.TiedWeight(owner_stage=0, owner="0.weight", reader_stage=1, reader="1.weight")


def modules() -> list[nn.Module]:
    torch.manual_seed(3)
    first = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False))
    last[1].weight.data.copy_(first[0].weight.data)
    return [first, last]


def rows(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randint(VOCABULARY, (16,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def drive(schedule: Any, *, parts: int, part: int) -> dict[str, Tensor]:
    for step in range(WINDOWS):
        x, y = (one.tensor_split(parts)[part] for one in rows(step))
        schedule.step(*((x,) if schedule.has_first else ()), target=y if schedule.has_last else None)
    schedule.drain()
    found = {}
    for stage in schedule.stages:
        for name, param in stage.named_parameters():
            found[f"{stage.stage_index}.{name}"] = param.detach().clone()
    return found


def on_rank(rank: int, group: Any, schedule: str, overlap: int, shard: bool, same_rows: bool) -> dict[str, Any]:
    groups = groups_of(Replicated(run=Run(schedule=schedule, stages=2, accumulation=4)))
    replica, at = divmod(dist.get_rank(), 2)
    stage = paci_rt.PipelineStage(modules()[at], at, 2, group=groups[replica])
    options: dict[str, Any] = {} if schedule in ("1f1b", "zb-h1") else {"lookahead": True}
    made = paci_rt.get_schedule_class(schedule)(
        stage,
        4,
        nn.CrossEntropyLoss(),
        optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2),
        tied_weights=[TIE],
        replica_group=groups[2 + at],
        overlap=overlap,
        shard_optimizer=shard,
        transfer_timeout_s=30.0,
        max_grad_norm=None if same_rows else 1.0,
        **options,
    )
    try:
        params = drive(made, parts=1 if same_rows else 2, part=0 if same_rows else replica)
        return {"params": params, "replica": replica}
    finally:
        made.close()


@pytest.mark.parametrize(
    ("schedule", "overlap"), [("1f1b", 0), ("zb-h1", 0), ("paci", 0), ("paci", 2), ("paci-split", 3)]
)
def test_copies_and_replicas_have_the_same_bits(workers: Any, schedule: str, overlap: int) -> None:
    found = gathered(workers.run(on_rank, 4, schedule, overlap, False, False))
    for one in (found[1], *gathered(workers.run(on_rank, 4, schedule, overlap, True, False))):
        require_equal(found[0], one)
    for one in found:
        assert torch.equal(one["0.0.weight"], one["1.1.weight"])
    assert not torch.equal(found[0]["0.0.weight"], modules()[0][0].weight)


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_replicas_of_the_same_rows_are_one_pipeline_bit_for_bit(workers: Any, schedule: str) -> None:
    found = gathered(workers.run(on_rank, 4, schedule, 0, False, True))
    pipe = paci_rt.LocalPipeline(
        modules(),
        schedule=schedule,
        n_microbatches=4,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        tied_weights=[TIE],
    )
    alone = drive(pipe, parts=1, part=0)
    for one in found:
        require_equal(one, alone)


def test_skipping_windows_under_paci_is_refused(workers: Any) -> None:
    for said in workers.run(_skipping, 4):
        assert "tied weights and replicas under a schedule that does not flush" in said


def _skipping(rank: int, group: Any) -> str:
    groups = groups_of(Replicated(run=Run(schedule="paci", stages=2, accumulation=4)))
    replica, at = divmod(dist.get_rank(), 2)
    stage = paci_rt.PipelineStage(modules()[at], at, 2, group=groups[replica])
    try:
        paci_rt.SchedulePACI(
            stage,
            4,
            nn.CrossEntropyLoss(),
            optimizer=paci_rt.AdamW(stage.parameters()),
            tied_weights=[TIE],
            replica_group=groups[2 + at],
            on_nonfinite="skip-window",
        )
    except ValueError as error:
        return str(error)
    return ""
