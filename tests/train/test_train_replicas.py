"""``paci-rt train --replicas``: pipelines that train together."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paci_rt import checkpoint, status
from paci_rt.action import Op
from paci_rt.errors import StageFailed
from paci_rt.launch.blame import waited_for
from paci_rt.launch.watch import REPLICAS_AHEAD, stop_at
from paci_rt.train.config import TrainConfig
from paci_rt.train.run import execute
from support.deadlines import deadline

BASE: dict[str, Any] = {
    "schedule": "1f1b",
    "stages": 2,
    "replicas": 2,
    "accumulation": 2,
    "batch_size": 8,
    "seq_len": 16,
    "steps": 4,
    "eval_batches": 1,
    "eval_interval": 2,
    "transfer_timeout": 60.0,
}


def run(**options: Any) -> Any:
    return execute(TrainConfig(**{**BASE, **options}))


def test_replicas_are_one_pipeline_with_all_micro_batches(tmp_path: Path) -> None:
    """The order of the sum differs, so losses agree to rounding; a checkpoint of the one resumes as the other."""
    two = run(out=str(tmp_path / "two"))
    one = run(replicas=1, accumulation=4, out=str(tmp_path / "one"), transport="local")
    assert [point.loss for point in two.curve] == pytest.approx([point.loss for point in one.curve], rel=1e-5)
    assert two.val_loss == pytest.approx(one.val_loss, rel=1e-5)
    assert two.tokens == one.tokens
    on_from_two = run(steps=6, replicas=1, accumulation=4, resume=str(tmp_path / "two"), transport="local")
    on_from_one = run(steps=6, resume=str(tmp_path / "one"))
    assert on_from_two.val_loss == pytest.approx(on_from_one.val_loss, rel=1e-5)


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_resumed_equals_never_stopped_and_zero1_equals_whole(tmp_path: Path, schedule: str) -> None:
    options = {"schedule": schedule, "steps": 6, "eval_interval": 3, "lr_steps": 6, "warmup_steps": 1}
    whole = run(**options, save_interval=3, out=str(tmp_path / "whole"))
    shards = run(**options, zero1=True, save_interval=3, out=str(tmp_path / "shards"), keep_checkpoints=3)
    assert shards.params_sha256 == whole.params_sha256
    assert shards.memory[0]["optimizer"] == pytest.approx(whole.memory[0]["optimizer"] / 2, rel=0.01)
    half = tmp_path / "shards" / "index-00000003.json"
    assert run(**options, resume=str(half)).params_sha256 == whole.params_sha256  # DP 2 sharded to DP 2 whole
    assert run(**options, zero1=True, resume=str(half)).params_sha256 == whole.params_sha256
    checkpoint.verify(tmp_path / "shards")
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.pt"))
    assert len(names) == 2 * 2  # two checkpoints, one file a stage


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 6}, "--batch-size 6 cannot be cut into 4"),
        ({"transport": "local"}, "--transport local, which has one process"),
        ({"zero1": True, "optimizer": "muon"}, "--zero1 with --optimizer muon"),
        ({"zero1": True, "optimizer": "torch-adamw"}, "--zero1 with --optimizer torch-adamw"),
        ({"zero1": True, "schedule": "paci", "policy": "predict"}, "--zero1 with --policy predict"),
        ({"zero1": True, "replicas": 1}, "--zero1 is for several replicas"),
        ({"overlap": 1}, "--overlap 1 under 1f1b"),
        ({"overlap": 2, "schedule": "paci"}, "give 0 to 1"),
        ({"replicas": 0}, "replicas"),
    ],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        TrainConfig(**{**BASE, **options})


def _victim(ctx: Any, config: TrainConfig, rank: int) -> None:
    from paci_rt.train.run import _stage

    if ctx.rank == rank:
        report = ctx.should_stop

        def stop(step: int) -> bool:
            if step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return bool(report(step))

        ctx.should_stop = stop
    _stage(ctx, config)


def test_a_killed_process_is_named_by_stage_and_replica() -> None:
    from paci_rt import launch

    config = replace(TrainConfig(**BASE), transfer_timeout=30.0, eval_interval=0)
    with pytest.raises(StageFailed, match="stage 0 of replica 1 was killed by SIGKILL"):
        launch.run(_victim, 4, (config, 2), transfer_timeout_s=30.0, timeout_s=deadline(120))


def test_the_leader_decides_further_ahead_where_pipelines_have_replicas() -> None:
    """Another replica may begin steps before it has a message that rank 0 sent after its decision."""
    before = status.board()
    try:
        for replicas, ahead in ((False, 1), (True, REPLICAS_AHEAD)):
            own = status.Board()
            status.use(own)
            if replicas:
                own.take_place(0, 0, 2)
            own.words[status.STOP] = 15
            assert [stop_at(step, leader=True) for step in range(3, 5 + ahead)] == [False] * ahead + [True, True]
    finally:
        status.use(before)


def test_waits_and_names_are_of_the_same_replica() -> None:
    boards = {rank: status.Board() for rank in range(4)}
    for rank, board in boards.items():
        board.take_place(rank // 2, rank % 2, 2)
        board.enter("training")
    boards[2].words[status.CURRENT] = status.OP_CODES[Op.RECV_B] + 3  # of stage 0
    assert waited_for(2, boards[2].read(), 4) == {3}
    assert boards[3].read().name(3) == "stage 1 of replica 1"
    assert status.Board().read().name(3) == "stage 3"
