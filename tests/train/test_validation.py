"""How often a run validates changes neither what it trains nor how fast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paci_rt.train import progress
from paci_rt.train.config import TrainConfig
from paci_rt.train.results import RunResult
from paci_rt.train.run import execute


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("".join(f"line {at} says {at * at % 97}\n" for at in range(2000)))
    return str(file)


def config_of(text: str, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"data": text, "stages": 2, "accumulation": 2, "steps": 5, "batch_size": 4, "seq_len": 12}
    options |= {"eval_batches": 2, "transport": "local", "lr_steps": 5, "warmup_steps": 0}
    return TrainConfig(**(options | changes))


def run(config: TrainConfig) -> RunResult:
    result = execute(config)
    assert result is not None
    return result


def losses_of(result: RunResult) -> list[float]:
    return [point.loss for point in result.curve]


@pytest.mark.parametrize("schedule", ["paci", "1f1b", "pipedream-2bw", "interleaved-1f1b"])
def test_the_interval_changes_no_bit_and_losses_are_those_of_shorter_runs(text: str, schedule: str) -> None:
    config = config_of(text, schedule=schedule)
    often, never = run(replace(config, eval_interval=1)), run(replace(config, eval_interval=0))
    assert often.params_sha256 == never.params_sha256
    assert losses_of(often) == losses_of(never)
    assert [point.step for point in often.evals] == [0, 1, 2, 3, 4, 5]
    assert [point.step for point in never.evals] == [5]
    assert often.evaluation_s > 0
    for point in often.evals[1:4]:
        assert run(replace(config, eval_interval=0, steps=point.step)).val_loss == point.val_loss


def test_drained_validations_are_exact_and_may_change_what_is_trained(text: str) -> None:
    config = config_of(text, stages=4, accumulation=2, eval_interval=2)
    drained, never = run(replace(config, eval_drained=True)), run(replace(config, eval_interval=0))
    assert drained.evaluation_s == 0
    assert drained.params_sha256 != never.params_sha256  # as it was before
    assert [point.step for point in drained.evals] == [0, 2, 4, 5]


def test_stages_in_processes_say_what_one_process_says(text: str) -> None:
    config = config_of(text, stages=3, accumulation=4, eval_interval=2)
    here, there = run(config), run(replace(config, transport="shm"))
    assert here.params_sha256 == there.params_sha256
    assert [point.val_loss for point in here.evals] == [point.val_loss for point in there.evals]
    clock = [point.elapsed_s for point in there.evals]
    assert clock == sorted(clock) and clock[0] >= 0 and clock[-1] <= there.wall_s


def test_a_validation_beside_a_checkpoint_is_drained_with_it(text: str, tmp_path: Path) -> None:
    config = config_of(text, eval_interval=2, save_interval=2, out=str(tmp_path / "saved"))
    saved = run(config)
    resumed = run(replace(config, resume=str(tmp_path / "saved" / "index-00000004.json")))
    assert resumed.params_sha256 == saved.params_sha256
    assert [point.step for point in saved.evals] == [0, 2, 4, 5]
    assert saved.evals[-1].val_loss == resumed.evals[-1].val_loss


def test_the_clock_leaves_out_what_validations_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    left_out = [3.0]
    clock = progress.TrainingClock(barrier=lambda: None, left_out=lambda: left_out[0])
    assert clock.seconds() == 0 and clock.stopped
    clock.start()
    now[0] += 10
    reading = clock.reading()
    now[0] += 2
    left_out[0] += 2
    assert (clock.seconds(), reading(110.5)) == (10.0, 10.5)
    clock.stop()
    now[0] += 50
    assert clock.seconds() == 10
    clock.start()
    now[0] += 1
    assert clock.seconds() == 11
