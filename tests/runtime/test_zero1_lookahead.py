"""Look-ahead where replicas share out the optimizer's state: the bits of look-ahead with whole state on each.

Losses are compared too. They are those of forwards at the weights ahead, and every replica has its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support import bad_numbers
from support.replicated import Replicated, drive, gathered, groups_of, make, require_equal, train_replica
from support.toy import Run

LONG = Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48, lookahead=True)
ALONE = replace(LONG, stages=1, windows=5)
SHARED = replace(LONG, accumulation=3, slack=1, batch=24)  # the first stage makes its weights ahead for four forwards

RUNS = {
    "no overlap": Replicated(run=LONG, overlap=0),
    "overlap": Replicated(run=LONG),
    "nadam": Replicated(run=replace(LONG, optimizer="nadam")),
    "lion": Replicated(run=replace(LONG, optimizer="lion")),
    "sgd": Replicated(run=replace(LONG, optimizer="sgd")),
    "shared": Replicated(run=SHARED, overlap=0),
    "shared, bf16": Replicated(run=SHARED, overlap=0, dtype="bfloat16"),
    "two updates late": Replicated(run=replace(LONG, accumulation=1, slack=1, batch=12)),
    "split": Replicated(run=replace(LONG, schedule="paci-split", accumulation=3, batch=24), overlap=1),
    "recompute": Replicated(run=replace(LONG, policy="recompute")),
    "in a V": Replicated(run=replace(LONG, schedule="paci-v", chunks=2, stages=4)),
    "many messages, bf16": Replicated(run=replace(LONG, wide=True, windows=4), dtype="bfloat16"),
    "many messages": Replicated(run=replace(ALONE, wide=True, windows=4), overlap=1),
    "three replicas": Replicated(run=ALONE, replicas=3),
    "four replicas, bf16": Replicated(run=ALONE, replicas=4, dtype="bfloat16"),
    "one replica": Replicated(run=replace(LONG, batch=24), replicas=1),
    "clipped": Replicated(run=LONG, clip=0.05, overlap=0),
    "clipped, overlap": Replicated(run=LONG, clip=0.05),
    "a frozen stage": Replicated(run=LONG, overlap=0, frozen=0),
    "a frozen stage, overlap": Replicated(run=LONG, frozen=0, clip=0.05),
    "rates that change": Replicated(run=LONG, lr_scheduler=True, scale_grads=False),
}


def require_same(whole: list[Any], shards: list[Any]) -> None:
    """Every process had the same losses, looked ahead as often, and every replica has the same weights."""
    for one, other in zip(filter(None, whole), filter(None, shards), strict=True):
        losses = [torch.tensor(each["losses"], dtype=torch.float64).view(torch.int64) for each in (one, other)]
        assert torch.equal(*losses)  # bits, since those of a window that does not count are not finite
        assert one["stats"]["lookahead_forwards"] == other["stats"]["lookahead_forwards"]
    for one, other in zip(gathered(whole), gathered(shards), strict=True):
        require_equal(one, other)


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_as_with_whole_state(workers: Any, name: str) -> None:
    given = RUNS[name]
    whole = workers.run(train_replica, 4, given)
    require_same(whole, workers.run(train_replica, 4, replace(given, shard=True)))
    assert any(one["stats"]["lookahead_forwards"] for one in filter(None, whole))
    if given.clip is not None:
        assert any(sum(one["stats"]["clipped_windows"].values()) for one in whole)


def test_it_is_not_what_comes_without(workers: Any) -> None:
    given = Replicated(run=LONG, overlap=0, shard=True)
    plain = workers.run(train_replica, 4, replace(given, run=replace(LONG, lookahead=False)))
    found = gathered(workers.run(train_replica, 4, given))
    assert not torch.equal(found[0]["0.0.weight"], gathered(plain)[0]["0.0.weight"])


@pytest.mark.parametrize("policy", ["skip-window", "skip-local"])
@pytest.mark.parametrize(("run", "overlap"), [(LONG, 0), (LONG, 2), (SHARED, 0), (SHARED, 1)])
def test_windows_that_do_not_count(workers: Any, policy: str, run: Run, overlap: int) -> None:
    """One replica's gradients are not finite: it stays at the present weights, and helps the other."""
    given = Replicated(run=run, on_nonfinite=policy, spoil=(1, 2, 1), overlap=overlap)
    whole = workers.run(train_replica, 4, given)
    require_same(whole, workers.run(train_replica, 4, replace(given, shard=True)))
    assert all(max(one["stats"]["skipped_windows"].values()) == 1 for one in whole)


def _taken_back(rank: int, group: Any, shard: bool, overlap: int, dtype: str) -> Any:
    """The first stage's own gradient is not finite on one replica: the last stage has updated by then."""
    groups = groups_of(Replicated(run=LONG))
    replica, at = divmod(rank, 2)
    spoiled: dict[str, Any] = {"stage": 0, "at": 9} if replica == 1 else {}
    run = bad_numbers.Bad(stages=2, accumulation=4, dtype=dtype, **spoiled)
    stage = paci_rt.PipelineStage(bad_numbers.modules(run)[at], at, 2, group=groups[replica])
    schedule = paci_rt.SchedulePACI(
        stage,
        4,
        nn.MSELoss(),
        optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2),
        replica_group=groups[2 + at],
        shard_optimizer=shard,
        overlap=overlap,
        slack=1,
        on_nonfinite="skip-window",
        max_grad_norm=1.0,
        lookahead=True,
        transfer_timeout_s=30.0,
    )
    try:
        return {**bad_numbers.drive(schedule, run), "replica": replica}
    finally:
        schedule.close()


@pytest.mark.parametrize(("overlap", "dtype"), [(0, "float32"), (0, "bfloat16"), (2, "float32")])
def test_updates_that_are_taken_back(workers: Any, overlap: int, dtype: str) -> None:
    whole, shards = (workers.run(_taken_back, 4, shard, overlap, dtype) for shard in (False, True))
    require_same(whole, shards)
    for found in (whole, shards):
        assert [max(one["stats"]["taken_back_windows"].values()) for one in found] == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(workers: Any, dtype: str) -> None:
    """A copy of the weights in their own dtype, and room for one part of another replica: its sums and its weights."""
    run = replace(ALONE, wide=True, windows=2)
    given = Replicated(run=run, replicas=2, dtype=dtype, overlap=1)
    whole = workers.run(train_replica, 4, given)[0]["stats"]["memory"][0]
    shard = workers.run(train_replica, 4, replace(given, shard=True))[0]["stats"]["memory"][0]
    assert shard["optimizer"] == pytest.approx(whole["optimizer"] / 2, rel=0.01)
    assert shard["weights"] == whole["weights"]
    parameters = shard["weights"] / (4 if dtype == "float32" else 2)
    assert shard["versions"] == pytest.approx(shard["weights"] * 1.5 + parameters * 4 / 2, rel=0.01)
    assert whole["versions"] == pytest.approx(whole["weights"], rel=0.01)


def _moved(rank: int, group: Any, one: Replicated, other: Replicated) -> Any:
    """Train as ``one``, and go on as ``other`` from its state."""
    groups, more = groups_of(one), groups_of(other)
    torch.manual_seed(0)
    state = None
    if rank < one.replicas * one.run.stages:
        first, replica = make(groups, one)
        drive(first, one, replica)
        state = first.state_dict()
        first.close()
    states: list[Any] = [None] * 4
    torch.distributed.all_gather_object(states, state, group=group)
    if rank >= other.replicas * other.run.stages:
        return None
    second, replica = make(more, other)
    second.load_state_dict(states[rank % other.run.stages])
    try:
        return drive(second, other, replica)
    finally:
        second.close()


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 3)])
def test_state_goes_on_in_other_parts(workers: Any, before: int, after: int) -> None:
    ways = (
        [(False, False), (True, True), (True, False), (False, True)]
        if before == after
        else [(False, False), (True,) * 2]
    )
    found = [
        workers.run(
            _moved,
            4,
            Replicated(run=ALONE, replicas=before, shard=one),
            Replicated(run=ALONE, replicas=after, shard=other),
        )
        for one, other in ways
    ]
    for one in found[1:]:
        require_same(found[0], one)


class Experts(nn.Module):
    """Which of two experts a micro-batch goes to is said by its first number; a third is never asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0] > 0)](x).tanh()


class Little(nn.Module):
    """Two flat groups of one weight each: of most replicas no part of either."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x + self.shift.float()).tanh()


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _own_module(
    rank: int, group: Any, kind: type[nn.Module], replicas: int, shard: bool, optimizer: str, ahead: bool
) -> Any:
    groups = groups_of(Replicated(run=ALONE, replicas=replicas))
    if rank >= replicas:
        return None
    stage = paci_rt.PipelineStage(kind(), 0, 1, group=groups[rank])
    schedule = paci_rt.SchedulePACI(
        stage,
        4,
        mean_square,
        optimizer=getattr(paci_rt, optimizer)(stage.parameters(), lr=1e-2),
        replica_group=groups[replicas],
        shard_optimizer=shard,
        overlap=2,
        lookahead=ahead,
        transfer_timeout_s=30.0,
    )
    losses: list[Tensor] = []
    history: list[float] = []
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        x[:, 0] = 1.0 if (rank + step // 3) % 2 else -1.0
        schedule.step(x, target=x.flip(0), losses=losses)
        history += [float(loss) for loss in losses]
    schedule.drain()
    params = {name: param.detach().clone() for name, param in stage.named_parameters()}
    found = {"params": params, "losses": history, "stats": schedule.stats(), "replica": rank}
    schedule.close()
    return found


@pytest.mark.parametrize(("optimizer", "ahead"), [("AdamW", True), ("AdamW", False), ("Lion", True)])
@pytest.mark.parametrize(("kind", "replicas"), [(Experts, 2), (Little, 4)])
def test_gradients_and_parts_that_only_some_have(
    workers: Any, kind: Any, replicas: int, optimizer: str, ahead: bool
) -> None:
    """Replicas that ask other experts wait for weights in other parts, so they have none in common."""
    ways = [workers.run(_own_module, 4, kind, replicas, shard, optimizer, ahead) for shard in (False, True)]
    require_same(*ways)
    assert bool(ways[1][0]["stats"]["lookahead_forwards"]) is ahead
    if kind is Experts:
        assert torch.equal(ways[1][0]["params"]["experts.2.weight"], Experts().experts[2].weight)
