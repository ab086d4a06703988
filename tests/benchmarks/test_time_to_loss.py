"""``time_to_loss.py``: what it reads off runs with known losses and times, and what it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import time_to_loss
from paci_rt.train.config import TrainConfig
from time_to_loss import Kept, Runs, row

SEEDS = (1, 2, 3)


class Known:
    """Losses that fall by 0.4 nats for each e-fold of tokens; PACI takes ``f`` times the tokens and 0.05 s each."""

    def __init__(self, f: float) -> None:
        self.f, self.order = f, list[tuple[str, int, int]]()

    def __call__(self, config: TrainConfig) -> dict[str, float]:
        self.order.append((config.schedule, config.steps, config.seed))
        needed, each_s = (self.f, 0.05) if config.schedule == "paci" else (1.0, 0.08)
        loss = 5 + 0.1 * config.seed - 0.4 * math.log(config.steps / needed)
        return {"loss": loss, "seconds": config.steps * each_s * config.seed}


def runs(execute: Callable[[TrainConfig], dict[str, float]]) -> Runs:
    configs = [TrainConfig(schedule=name, steps=100, seed=seed) for seed in SEEDS for name in ("1f1b", "paci")]
    return Runs(configs, execute)


@pytest.mark.parametrize("f", [0.9, 1.0, 1.2])
def test_sooner_is_throughput_over_f(f: float) -> None:
    found = row(runs(Known(f)), "paci", "1f1b")
    assert found["throughput"] == pytest.approx([1.6] * 3)
    assert found["f"] == pytest.approx([f] * 3)
    assert found["sooner"] == pytest.approx([1.6 / f] * 3)


def test_schedules_take_turns_and_no_run_is_made_twice() -> None:
    known = Known(1.2)
    made = runs(known)
    made.take(["1f1b", "paci"], [100])
    assert known.order == [(name, 100, seed) for seed, name in zip((1, 1, 2, 2, 3, 3), _TURNS, strict=True)]
    row(made, "paci", "1f1b")
    assert len(set(known.order)) == len(known.order)
    assert {steps for name, steps, _ in known.order if name == "paci"} == {100, 110, 125}


def test_an_interrupted_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    first, again = Known(1.2), Known(1.2)
    found = row(runs(Kept(file, first)), "paci", "1f1b")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]))
    assert row(runs(Kept(file, again)), "paci", "1f1b") == found
    assert again.order == first.order[-2:]


_TURNS = ("1f1b", "paci", "paci", "1f1b", "1f1b", "paci")


def test_who_diverges_has_a_throughput_and_no_time() -> None:
    known = Known(1.0)

    def wild(config: TrainConfig) -> dict[str, float]:
        return {**known(config), **({"loss": math.nan} if config.schedule == "paci" and config.seed == 2 else {})}

    found = row(runs(wild), "paci", "1f1b")
    assert found["throughput"][0] == pytest.approx(1.6)
    assert found["f"] == found["sooner"] == [None] * 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lr-steps", "10"], "--lr-steps cannot be given"),
        (["--seeds", "2"], "at least 3"),
        (["--schedules", "1f1b"], "twice"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["time_to_loss.py", *options])
    with pytest.raises(SystemExit) as ended:
        time_to_loss.parse_arguments()
    assert ended.value.code == 2 and says in capsys.readouterr().err
