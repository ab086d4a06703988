"""``paci-rt train --replicas``: pipelines that train together."""

from __future__ import annotations

import json
import math
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
from paci_rt.train.replicas import Together
from paci_rt.train.run import execute
from support.deadlines import deadline, wait_until

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
        (
            {"schedule": "paci", "buffers": 1},
            "--buffers 1 with --replicas 2 under paci.* use --buffers 2, or --overlap 0",
        ),
        (
            {"schedule": "paci", "tied": True, "on_nonfinite": "skip-window"},
            "with tied embeddings and skip-window under paci.* use --on-nonfinite skip-local or raise, --no-tied",
        ),
        (
            {"schedule": "paci", "tied": True, "dtype": "fp16"},
            "--dtype fp16, which needs .* use --dtype bf16, --no-tied",
        ),
    ],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        TrainConfig(**{**BASE, **options})


def test_what_is_near_to_the_refused() -> None:
    for options in (
        {"buffers": 1, "overlap": 0},
        {"buffers": 1, "policy": "predict"},  # waits at once
        {"schedule": "1f1b", "tied": True, "dtype": "fp16"},
        {"stages": 1, "tied": True, "on_nonfinite": "skip-window"},
        {"tied": True, "on_nonfinite": "skip-local"},
    ):
        TrainConfig(**{**BASE, "schedule": "paci", **options})


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


def test_the_log_has_the_loss_of_all_replicas(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    result = execute(TrainConfig(**{**BASE, "out": str(tmp_path / "run")}), on_report=told.append)
    losses = [point.loss for point in result.curve]
    lines = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses
    assert [one["loss"] for one in told if one["kind"] == "step"] == losses
    one = run(replicas=1, accumulation=4, transport="local")
    assert losses == pytest.approx([point.loss for point in one.curve], rel=1e-5)  # sums in another order


def test_reports_of_replicas_come_together_in_order() -> None:
    heard: list[dict[str, Any]] = []
    together = Together(3, heard.append)
    step = {"kind": "step", "loss": 1.0, "lr": 0.5}
    for report in (
        step | {"step": 1},
        {"kind": "share", "step": 2, "loss": 5.0},
        {"kind": "eval", "step": 1},
        {"kind": "share", "step": 1, "loss": 2.0},
        step | {"step": 2},
        {"kind": "saved", "step": 1},
    ):
        together(report)
    assert heard == [{"kind": "saved", "step": 1}]
    together({"kind": "share", "step": 1, "loss": 6.0})
    assert heard[1:] == [step | {"step": 1, "loss": 3.0}, {"kind": "eval", "step": 1}]
    together({"kind": "restart"})  # step 2 was incomplete, and is trained again
    together(step | {"step": 2})
    for loss in (math.inf, 2.0):
        together({"kind": "share", "step": 2, "loss": loss})
    assert heard[3:] == [{"kind": "restart"}, step | {"step": 2, "loss": math.inf}]


def _killed_once(ctx: Any, config: TrainConfig) -> Any:
    """A run whose stage 1 of replica 1 dies before its seventh window, once."""
    from paci_rt.train.run import _stage

    stop = ctx.should_stop

    def asked(step: int) -> bool:
        if step == 6 and ctx.rank == 3 and not ctx.restarts:
            checkpoint_of(config, 4)
            os.kill(os.getpid(), signal.SIGKILL)
        return bool(stop(step))

    ctx.should_stop = asked
    return _stage(ctx, config)


def checkpoint_of(config: TrainConfig, step: int) -> None:
    """Wait for the checkpoint after ``step``, which a thread writes."""
    wait_until(lambda: (Path(str(config.out)) / f"index-{step:08}.json").exists(), 60, "no checkpoint")


def test_a_restart_repeats_what_all_replicas_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"schedule": "paci", "zero1": True, "tied": True, "layers": 4, "width": 32, "heads": 2}
    options |= {"clip_grad_norm": 0.5, "steps": 8, "save_interval": 2, "keep_checkpoints": 4}
    plain = run(**options, out=str(tmp_path / "plain"))
    monkeypatch.setattr("paci_rt.train.run._stage", _killed_once)
    again = run(**options, out=str(tmp_path / "again"), max_restarts=1)
    assert again.windows < plain.windows
    assert again.params_sha256 == plain.params_sha256
    assert [one.loss for one in again.curve] == [one.loss for one in plain.curve]
    assert [one.val_loss for one in again.evals] == [one.val_loss for one in plain.evals]
    assert again.train_loss == plain.train_loss
    clock = [one.elapsed_s for one in again.curve]
    assert clock == sorted(clock)
    lines = [json.loads(text) for text in (tmp_path / "plain" / "log.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "loss" in line]
    assert norms[0] is None and all(norm > 0 for norm in norms[1:])  # the first update comes in the second window
    kept, wanted = ((tmp_path / name / "config.toml").read_text().splitlines() for name in ("again", "plain"))
    changed = [line for line in kept if line not in wanted]
    assert [line.split(" = ")[0] for line in changed] == ["out", "max_restarts"]  # as given, without a resume
