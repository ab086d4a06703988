"""Where a model is cut that nobody has profiled: by rank in a V and in a circle, and with an order that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paci_rt import checkpoint, schedules
from paci_rt.schedules import StepCosts
from paci_rt.train import cut
from paci_rt.train.config import TrainConfig
from paci_rt.train.model import default_partition
from paci_rt.train.run import execute
from support.profiles import cuts

TIED: dict[str, Any] = {
    "model": "gpt2",
    "layers": 12,
    "width": 192,
    "heads": 3,
    "vocab_size": 12544,
    "accumulation": 8,
    "batch_size": 16,
    "seq_len": 256,
}
"""GPT-2 in small, tied: its head takes as long as four and a half blocks."""
SMALL: dict[str, Any] = {
    "model": "gpt2",
    "layers": 8,
    "width": 16,
    "heads": 2,
    "vocab_size": 300,
    "seq_len": 16,
    "accumulation": 3,
    "batch_size": 6,
    "steps": 4,
    "lr_steps": 4,
    "warmup_steps": 1,
    "eval_batches": 1,
    "eval_interval": 4,
}
"""The same with a head of two blocks, to be trained."""


def rank_work(config: TrainConfig, partition: tuple[int, ...]) -> list[float]:
    """Multiply-adds of each process, in blocks."""
    head = config.shape.head_macs / config.shape.block_macs(config.seq_len)
    work = [count + head * (stage == len(partition) - 1) for stage, count in enumerate(partition)]
    return [sum(work[stage] for stage in config.places.stages_of(rank)) for rank in range(config.stages)]


@pytest.mark.parametrize("schedule", ["paci-v", "zb-v", "v-half"])
def test_rank_0_of_a_v_makes_room_for_the_head(schedule: str) -> None:
    config = TrainConfig(**TIED, schedule=schedule)
    best = min(max(rank_work(config, one)) for one in cuts(12, 4))
    assert max(rank_work(config, config.partition)) == pytest.approx(best)
    assert config.partition[0] + config.partition[3] == 4
    if schedule == "paci-v":  # rank 0 is the fullest, and what its second stage keeps it keeps for the shortest time
        assert config.partition == (1, 4, 4, 3)


def test_a_circle_is_balanced_by_rank() -> None:
    config = TrainConfig(**TIED, schedule="interleaved-1f1b")
    assert max(rank_work(config, config.partition)) < max(rank_work(config, default_partition(config.shape, 4)))


def test_lines_are_cut_as_before_and_what_is_given_stays() -> None:
    for schedule in ("paci", "1f1b", "zb-1p"):
        config = TrainConfig(**TIED, schedule=schedule)
        assert config.partition == default_partition(config.shape, 2, seq_len=256) == (8, 4)
        assert config.step_costs is None
    given = TrainConfig(**TIED, schedule="paci-v", partition=(3, 4, 4, 1))
    assert given.partition == (3, 4, 4, 1)
    assert TrainConfig(**TIED, schedule="zb-v", partition=(1, 2, 3, 6)).partition == (1, 2, 3, 6)


def test_the_order_of_paci_v_is_fitted_to_the_partition() -> None:
    head = 12544 * 192 / TrainConfig(**TIED).shape.block_macs(256)
    for partition in (None, (3, 4, 4, 1)):
        config = TrainConfig(**TIED, schedule="paci-v", partition=partition)
        assert config.step_costs is not None
        blocks = [float(count) for count in config.partition]
        blocks[-1] += head
        for times in config.step_costs[:3]:
            assert times == pytest.approx(blocks)
    mine = StepCosts((1.0,), (2.0,), (1.0,), hop=0.1)
    assert TrainConfig(**TIED, schedule="paci-v", step_costs=mine).step_costs == mine
    recomputing = TrainConfig(**TIED, schedule="paci-v", policy="recompute").step_costs
    assert recomputing is not None and recomputing.input_grad[0] > recomputing.forward[0]


def test_estimates_count_parameters_and_work() -> None:
    run = cut.Run(TrainConfig(**TIED).shape, "paci-v", "bounded", 8, 2, 256, 2, 2, 4)
    first, *middle, last = cut.estimate(run).blocks
    assert len(middle) == 12 and {block.forward_s for block in middle} == {1.0}
    assert first.parameter_bytes == 4 * (12544 * 192 + 1024 * 192)
    assert middle[0].parameter_bytes == 4 * (12 * 192**2 + 13 * 192)
    assert last.parameter_bytes == 4 * (12544 * 192 + 2 * 192)  # a copy of the tied weight, and the last LayerNorm
    assert last.forward_s == pytest.approx(12544 * 192 / (12 * 192**2 + 2 * 256 * 192), rel=0.2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("transport", ["local", "shm"])
def test_flushed_runs_on_these_partitions_are_plain_training(transport: str, tied: bool) -> None:
    """In one process with all blocks, or two stages with a tied weight, whose two gradients are added in that order."""
    options = {**SMALL, "tied": tied, "transfer_timeout": 60.0}
    plain = execute(TrainConfig(**options, schedule="1f1b", stages=2 if tied else 1, transport="local"))
    for schedule in ("zb-v", "v-min", "dualpipe-v", "interleaved-zb") if transport == "local" else ("zb-v",):
        config = TrainConfig(**options, schedule=schedule, transport=transport)
        assert schedule != "zb-v" or config.partition != default_partition(config.shape, 4)
        assert execute(config).params_sha256 == plain.params_sha256, schedule


def test_a_checkpoint_goes_from_one_partition_of_a_v_to_another(tmp_path: Path) -> None:
    options = {**SMALL, "transport": "local"}
    straight = execute(TrainConfig(**options, schedule="zb-v"))
    first = TrainConfig(**{**options, "steps": 2}, schedule="zb-v", out=str(tmp_path / "one"))
    assert first.partition != (5, 1, 1, 1)
    execute(first)
    on = {**options, "partition": (5, 1, 1, 1), "resume": str(tmp_path / "one"), "out": str(tmp_path / "two")}
    assert execute(TrainConfig(**on, schedule="zb-v")).params_sha256 == straight.params_sha256
    checkpoint.verify(tmp_path / "two")


def test_paci_v_on_its_partition_is_the_same_in_processes_and_here() -> None:
    options = {**SMALL, "schedule": "paci-v", "transfer_timeout": 60.0}
    here, there = (execute(TrainConfig(**options, transport=where)) for where in ("local", "shm"))
    assert here.params_sha256 == there.params_sha256
    assert here.max_drift <= here.drift_bound


def test_schedules_of_several_pieces_have_a_cut_at_any_size() -> None:
    for name, family in schedules.FAMILIES.items():
        for stages in (1, 2, 3) if family.chunks > 1 else ():
            config = TrainConfig(schedule=name, stages=stages, model="gpt-tiny", accumulation=6, batch_size=6)
            assert sum(config.partition) == 8 and len(config.partition) == 2 * stages and min(config.partition) >= 1
