"""What ``paci-rt train`` does about gradients that are not finite: it ends, and the last good checkpoint stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paci_rt.cli.app import main
from paci_rt.train.config import TrainConfig

SMALL = ["--steps", "6", "--seq-len", "16", "--batch-size", "4", "--eval-batches", "1", "--eval-interval", "0"]
DIVERGES = ["--optimizer", "sgd", "--momentum", "0", "--lr", "1e4"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return str(file)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("schedule", ["paci", "1f1b", "zb-h1"])
def test_a_run_that_diverges_ends_and_leaves_the_last_good_checkpoint(
    schedule: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ["train", "--transport", "local", "--schedule", schedule, "--data", text, "--out", str(out), *SMALL]
    assert main([*base, "--optimizer", "sgd"]) == 0
    good = contents(out)
    assert main([*base, *DIVERGES]) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not finite" in said and "micro-batch" in said and "'transformer." in said
    assert contents(out) == good


@pytest.mark.parametrize("lr", ["1e20", "1e30"])
def test_weights_that_are_no_use_are_not_saved_although_they_are_finite(lr: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = ["train", "--transport", "local", "--data", text, "--out", str(out), *SMALL, "--optimizer", "sgd"]
    assert main([*base, "--steps", "1", "--lr", lr, "--warmup-steps", "0"]) != 0
    assert not list(out.glob("*.json")) and not list(out.glob("*.safetensors"))


def test_a_run_that_skips_goes_on_and_counts(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    base = ["train", "--transport", "local", "--data", text, "--json", str(report), *SMALL]
    assert main([*base, *DIVERGES, "--on-nonfinite", "skip-window"]) == 0
    shown = capsys.readouterr()
    assert "skipped, " in shown.out and "not finite" in shown.out
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["skipped_windows"]["0"] == found["skipped_windows"]["1"] >= 1
    assert main([*base, "--clip-grad-norm", "0.1"]) == 0
    found = json.loads(report.read_text())
    assert found["clipped_windows"] == {"0": 6, "1": 6}
    assert sum(found["norm_lags"]["0"].values()) == 6
    assert found["config"]["clip_grad_norm"] == 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": float("inf")}, "--lr is inf: give a number of at least 0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"lr": -1e-3}, "--lr is -0.001"),
        ({"lr": 1e39}, "--lr is 1e\\+39"),
        ({"min_lr": float("inf")}, "--min-lr is inf"),
        ({"weight_decay": float("inf")}, "--weight-decay is inf"),
        ({"beta1": float("nan")}, "--beta1 is nan"),
        ({"momentum": float("inf")}, "--momentum is inf"),
        ({"clip_grad_norm": 0.0}, "--clip-grad-norm is 0.0"),
        ({"clip_grad_norm": float("inf")}, "--clip-grad-norm is inf"),
        ({"clip_grad_norm": float("nan")}, "--clip-grad-norm is nan"),
        ({"skip_spikes": 3.0}, "--skip-spikes 3.0 with --on-nonfinite raise"),
        ({"skip_spikes": -1.0, "on_nonfinite": "skip-local"}, "--skip-spikes is -1.0"),
        ({"on_nonfinite": "ignore"}, "unknown --on-nonfinite 'ignore'"),
        ({"on_nonfinite": "skip-window", "schedule": "pipedream"}, "under policy 'stash'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        TrainConfig(**options)
    assert "\n" not in str(caught.value)
