"""Replicas with modules that do other things: parameters that only some use, modules that change, scaled losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.replicated import Replicated, gathered, groups_of, require_equal
from support.toy import Run

WIDTH = 6


class Experts(nn.Module):
    """Which of three experts a micro-batch goes to is said by its first number; the third is never asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.wide = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)  # a flat group of its own, used by one replica alone

    def forward(self, x: Tensor) -> Tensor:
        which = int(x[0, 0] > 0)
        found = self.experts[which](x)
        if which:
            found = found + self.wide(x.double()).to(x.dtype)
        return found.tanh()


def rows(step: int, replica: int) -> Tensor:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(10 * step + replica))
    x[:, 0] = 1.0 if (replica + step // 3) % 2 else -1.0
    return x


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def plain() -> dict[str, Tensor]:
    model = Experts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        sums: list[dict[str, Tensor]] = []
        for replica in range(2):
            for part in rows(step, replica).tensor_split(2):
                loss_fn(model(part), part).backward()
            sums.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        for name, param in model.named_parameters():
            terms = [one[name] for one in sums if name in one]
            if terms:
                param.grad = (terms[0] + terms[1] if len(terms) == 2 else terms[0]) / 4
        optimizer.step()
        model.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def _experts(rank: int, group: Any) -> dict[str, Any] | None:
    groups = groups_of(Replicated(run=Run(schedule="1f1b", stages=1, accumulation=2)))
    if rank > 1:
        return None
    stage = paci_rt.PipelineStage(Experts(), 0, 1, group=groups[rank])
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    schedule = paci_rt.Schedule1F1B(stage, 2, loss_fn, optimizer=optimizer, replica_group=groups[2])
    for step in range(5):
        x = rows(step, rank)
        schedule.step(x, target=x)
    schedule.close()
    return {"params": {name: p.detach() for name, p in stage.named_parameters()}, "replica": rank}


def test_parameters_that_only_some_replicas_use(workers: Any) -> None:
    expected = plain()
    for one in gathered(workers.run(_experts, 4)):
        require_equal(one, expected)
    assert torch.equal(expected["experts.2.weight"], Experts().experts[2].weight)  # not even decayed


def _changing(rank: int, group: Any, schedule: str) -> dict[str, Any] | None:
    """All replicas freeze a layer after two steps, and another becomes trained again."""
    groups = groups_of(Replicated(run=Run(schedule=schedule, stages=1, accumulation=2)))
    if rank > 1:
        return None
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    module[2].bias.requires_grad_(False)
    stage = paci_rt.PipelineStage(module, 0, 1, group=groups[rank])
    optimizer = paci_rt.AdamW(stage.parameters(), lr=1e-2)
    made = paci_rt.get_schedule_class(schedule)(
        stage, 2, loss_fn, optimizer=optimizer, replica_group=groups[2], transfer_timeout_s=20.0
    )
    before = {}
    for step in range(5):
        if step == 2:
            made.drain()
            module[0].weight.requires_grad_(False)
            module[2].bias.requires_grad_(True)
            before = {name: p.detach().clone() for name, p in stage.named_parameters()}
        x = rows(step, rank)
        made.step(x, target=x)
    made.drain()
    made.close()
    params = {name: p.detach() for name, p in stage.named_parameters()}
    assert torch.equal(before["0.weight"], params["0.weight"])
    assert not torch.equal(before["2.bias"], params["2.bias"])
    return {"params": params, "replica": rank}


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_modules_that_change_on_all_replicas_alike(workers: Any, schedule: str) -> None:
    found = gathered(workers.run(_changing, 4, schedule))
    require_equal(found[0], found[1])


def _scaled(rank: int, group: Any, other: bool) -> Any:
    groups = groups_of(Replicated(run=Run(schedule="1f1b", stages=1, accumulation=2)))
    if rank > 1:
        return None
    torch.manual_seed(1)
    stage = paci_rt.PipelineStage(nn.Linear(WIDTH, WIDTH).half(), 0, 1, group=groups[rank])
    scaler = paci_rt.LossScaler(init_scale=1024.0, growth_interval=2)
    if other and rank == 1:
        scaler.load_state_dict({"scale": 512.0, "good_windows": 0})
    schedule = paci_rt.Schedule1F1B(
        stage,
        2,
        loss_fn,
        optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2),
        replica_group=groups[2],
        loss_scale=scaler,
        transfer_timeout_s=20.0,
    )
    try:
        for step in range(5):
            x = rows(step, rank).half() * (3e4 if (rank, step) == (1, 3) else 1.0)
            schedule.step(x, target=x.flip(0))
    except paci_rt.PaciError as error:
        return str(error)
    finally:
        schedule.close()
    params = {name: p.detach() for name, p in stage.named_parameters()}
    return {"params": params, "replica": rank, "scale": scaler.get_scale(), "stats": schedule.stats()}


def test_loss_scales_move_alike(workers: Any) -> None:
    results = workers.run(_scaled, 4, False)
    found = gathered(results)
    require_equal(found[0], found[1])
    assert results[0]["scale"] == results[1]["scale"]
    assert results[0]["stats"]["skipped_windows"] == results[1]["stats"]["skipped_windows"] == {0: 1}


def test_other_loss_scales_are_told(workers: Any) -> None:
    for said in workers.run(_scaled, 4, True)[:2]:
        assert "disagree about the loss scale" in said, said
