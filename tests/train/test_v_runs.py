"""The commands over runs in a V: train, resume on a line and back, sample, eval, export, compare, replicas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from paci_rt import checkpoint, cli
from paci_rt.train.config import TrainConfig
from paci_rt.train.run import execute

FLUSHED = ("zb-v", "v-half", "v-min", "dualpipe-v")
BASE: dict[str, Any] = {
    "stages": 2,
    "accumulation": 3,
    "batch_size": 6,
    "seq_len": 16,
    "steps": 6,
    "lr_steps": 6,
    "warmup_steps": 1,
    "eval_batches": 1,
    "eval_interval": 3,
    "transfer_timeout": 60.0,
}


def run(**options: Any) -> Any:
    return execute(TrainConfig(**{**BASE, **options}))


@pytest.mark.parametrize("a", [1, 2, 3])
def test_paci_v_has_a_loss_for_every_step_and_tells_none_twice(a: int, tmp_path: Path) -> None:
    here, there = (run(schedule="paci-v", accumulation=a, transport=where) for where in ("local", "shm"))
    assert here.params_sha256 == there.params_sha256 and here.val_loss == there.val_loss
    assert [point.step for point in here.curve] == list(range(1, 7)) == [point.step for point in there.curve]
    assert [point.loss for point in here.curve] == [point.loss for point in there.curve]
    line = run(schedule="1f1b", accumulation=a, transport="local")
    assert here.curve[0].loss == line.curve[0].loss  # a whole window of the weights at the beginning
    assert here.train_loss == pytest.approx(line.train_loss, rel=0.05) and here.windows == 6
    assert here.max_drift <= here.drift_bound


@pytest.mark.parametrize("options", [{}, {"model": "gpt-tiny", "tied": True, "clip_grad_norm": 0.5}])
def test_a_checkpoint_goes_from_a_v_to_a_line_and_back(options: dict[str, Any], tmp_path: Path) -> None:
    straight = run(schedule="1f1b", **options, transport="local")
    run(schedule="zb-v", **options, steps=2, out=str(tmp_path / "v"))
    run(schedule="1f1b", **options, steps=4, resume=str(tmp_path / "v"), stages=3, out=str(tmp_path / "line"))
    back = run(schedule="v-min", **options, resume=str(tmp_path / "line"), stages=1, out=str(tmp_path / "back"))
    assert back.params_sha256 == straight.params_sha256
    assert back.val_loss == straight.val_loss


def test_paci_v_resumes_after_a_line_and_a_line_after_it(tmp_path: Path) -> None:
    run(schedule="paci-v", steps=2, out=str(tmp_path / "v"), tied=True)
    on = run(schedule="paci", steps=4, resume=str(tmp_path / "v"), out=str(tmp_path / "line"), tied=True)
    back = run(schedule="paci-v", resume=str(tmp_path / "line"), out=str(tmp_path / "back"), tied=True)
    again = run(schedule="paci-v", resume=str(tmp_path / "line"), tied=True, transport="local")
    assert back.params_sha256 == again.params_sha256 and on.steps == 4
    checkpoint.verify(tmp_path / "back")


def test_resumed_is_never_stopped(tmp_path: Path) -> None:
    """A checkpoint drains, as it does for every schedule, and so does the run that is not stopped there."""
    whole = run(schedule="paci-v", save_interval=3, out=str(tmp_path / "whole"), keep_checkpoints=3)
    half = tmp_path / "whole" / "index-00000003.json"
    on = run(schedule="paci-v", resume=str(half), save_interval=3, out=str(tmp_path / "on"))
    assert on.params_sha256 == whole.params_sha256 and on.val_loss == whole.val_loss


@pytest.mark.parametrize("schedule", ["zb-v", "paci-v"])
@pytest.mark.parametrize("zero1", [False, True])
def test_replicas(schedule: str, zero1: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": schedule, "batch_size": 12}
    two = run(**options, replicas=2, zero1=zero1, out=str(tmp_path / "two"))
    one = run(**options, accumulation=6, transport="local")
    if schedule == "zb-v":  # the order of the sum differs, so losses agree to rounding
        assert [point.loss for point in two.curve] == pytest.approx([point.loss for point in one.curve], rel=1e-5)
        assert two.val_loss == pytest.approx(one.val_loss, rel=1e-5)
    else:  # with half as many micro-batches a window, more of them come before an update of theirs
        assert two.val_loss == pytest.approx(one.val_loss, rel=0.02)
    checkpoint.verify(tmp_path / "two")
    assert (
        run(**options, steps=8, lr_steps=8, resume=str(tmp_path / "two"), accumulation=6, transport="local").steps == 8
    )


@pytest.mark.parametrize("schedule", ["zb-v", "dualpipe-v", "paci-v"])
def test_what_was_trained_in_a_v_is_sampled_evaluated_and_exported(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    out, report = tmp_path / "run", tmp_path / "report.json"
    argv = ["train", "--schedule", schedule, "--stages", "2", "--accumulation", "3", "--batch-size", "6"]
    argv += ["--seq-len", "16", "--steps", "4", "--data", str(text), "--out", str(out), "--json", str(report)]
    assert cli.main(argv) == 0
    capsys.readouterr()
    assert cli.main(["sample", str(out), "--prompt", "To be", "--tokens", "8"]) == 0
    assert "To be" in capsys.readouterr().out
    found = tmp_path / "eval.json"
    argv = ["eval", str(out), "--data", str(text), "--json", str(found)]
    assert cli.main(argv) == 0
    assert json.loads(found.read_text())["val_loss"] == pytest.approx(
        json.loads(report.read_text())["val_loss"], rel=0.2
    )
    assert cli.main(["export", str(out), "--to", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_compare_takes_lines_and_vs(tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    argv = ["compare", "--schedules", "1f1b,zb-v,v-half,paci,paci-v", "--stages", "2", "--accumulation", "3"]
    argv += ["--batch-size", "6", "--seq-len", "16", "--steps", "4", "--eval-interval", "2", "--transport", "local"]
    argv += ["--activation-limit", "1.5", "--out", str(tmp_path / "compared"), "--json", str(out)]
    assert cli.main(argv) == 0
    runs = {one["schedule"]: one for one in json.loads(out.read_text())["runs"]}
    assert set(runs) == {"1f1b", "zb-v", "v-half", "paci", "paci-v"}
    assert runs["zb-v"]["params_sha256"] == runs["1f1b"]["params_sha256"] == runs["v-half"]["params_sha256"]
    assert runs["paci-v"]["config"]["activation_limit"] == 1.5 and runs["paci"]["config"]["activation_limit"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"schedule": "paci-v", "stages": 8},
            "--stages 8 with 2 pieces of the model each: gpt-tiny has only 8 blocks; ",
        ),
        ({"schedule": "zb-v", "chunks": 1}, "--chunks is 1: zb-v has two stages a rank"),
        ({"schedule": "v-min", "chunks": 3}, "--chunks is 3: v-min has two stages a rank"),
        ({"schedule": "dualpipe-v", "slack": 1}, "slack is 1: dualpipe-v takes no slack"),
        ({"schedule": "paci-v", "slack": 2}, "slack is 2: paci-v takes no slack"),
        ({"schedule": "zb-v", "policy": "stash"}, "'stash' under zb-v"),
        ({"schedule": "paci-v", "replicas": 2, "batch_size": 12, "overlap": 1}, "--overlap 1 under paci-v"),
    ],
)
def test_what_a_v_cannot_have_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        TrainConfig(**{**BASE, **options})
    assert "\n" not in str(caught.value)
