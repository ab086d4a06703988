"""What late gradients cost on a small model: the runs that are made, kept and read, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from paci_rt.planner import OverheadRow, OverheadTable
from paci_rt.train import calibrate
from paci_rt.train.calibrate import Calibration, Calibrator, FinishedRuns, merged
from paci_rt.train.config import TrainConfig

SMALL: dict[str, Any] = {
    "stages": 2, "accumulations": (2,), "updates": 4, "rates": (1e-3, 2e-3), "seeds": (1, 2, 3), "pilot_seeds": (9,),
    "width": 16, "heads": 2, "seq_len": 8, "batch_size": 4,
}  # fmt: skip


class Fake:
    """In place of training: losses that fall by 0.4 nats for each e-fold of tokens, a method needing ``f`` of them."""

    def __init__(self, f: float, wild: float = math.inf) -> None:
        self.f, self.wild, self.configs = f, wild, list[TrainConfig]()

    def __call__(self, config: TrainConfig) -> Any:
        self.configs.append(config)
        f = 1.0 if config.schedule == "1f1b" else self.f
        loss = 5 + 0.1 * config.seed - 0.4 * math.log(config.steps / f) - 10 * config.lr
        return type("Result", (), {"val_loss": math.nan if config.lr >= self.wild else loss})


@pytest.mark.parametrize("f", [0.9, 1.0, 1.05, 1.3])
def test_a_known_factor_is_found_with_its_share_and_delay(f: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(f)
    monkeypatch.setattr(calibrate, "execute", fake)
    plan = Calibration(**{**SMALL, "stages": 4, "accumulations": (4, 2), "updates": 200, "batch_size": 8})
    rows = Calibrator(plan, FinishedRuns(None)).rows()
    assert [(row.accumulation, row.at, row.delay, row.share) for row in rows] == [
        (4, "best", 1, 6 / 16), (4, "half", 1, 6 / 16), (2, "best", 2, 6 / 8), (2, "half", 2, 6 / 8),
    ]  # fmt: skip
    for row in rows:
        assert row.f == pytest.approx(f, rel=1e-3) and row.f_low <= row.f <= row.f_high
        assert row.seeds == 3 and row.rate == (2e-3 if row.at == "best" else 1e-3)
    assert {config.transport for config in fake.configs} == {"local"}
    assert {config.shape.layers for config in fake.configs} == {4}
    assert {config.lookahead for config in fake.configs if config.schedule == "paci"} == {True}
    keys = [(one.schedule, one.accumulation, one.lr, one.seed, one.steps) for one in fake.configs]
    assert len(keys) == len(set(keys))
    assert not {one.lr for one in fake.configs if one.seed == 9} - set(plan.rates)


def test_real_runs_are_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    path = tmp_path / "new" / "runs.jsonl"
    plan = Calibration(**{**SMALL, "rates": (2e-3,)})
    rows = Calibrator(plan, FinishedRuns(path), said.append).rows()
    assert [row.at for row in rows] == ["best", "half"] and all(row.f and 0.5 < row.f < 2 for row in rows)
    lines = path.read_text().splitlines()
    assert len(lines) == len(said) >= 2 * 2 * 2 * 3
    assert str(tmp_path) not in path.read_text()
    monkeypatch.setattr(calibrate, "execute", lambda config: pytest.fail("this run is there"))
    assert Calibrator(plan, FinishedRuns(path)).rows() == rows
    monkeypatch.undo()
    path.write_text("\n".join(lines[:-1]) + "\n")
    said.clear()
    assert Calibrator(plan, FinishedRuns(path), said.append).rows() == rows and len(said) == 1


def test_another_text_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for name, text in (("a.txt", "one text " * 500), ("b.txt", "another " * 500), ("c.txt", "one text " * 500)):
        (tmp_path / name).write_text(text)
        runs = FinishedRuns(None)
        monkeypatch.setattr(calibrate, "execute", Fake(1.0))
        Calibrator(Calibration(**SMALL, data=str(tmp_path / name)), runs).rows()
        keys.append(set(runs.losses))
    assert keys[0] == keys[2] and not keys[0] & keys[1]


def test_what_diverges_is_no_rate_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "execute", Fake(1.0, wild=2e-3))
    found = Calibrator(Calibration(**SMALL), FinishedRuns(None))
    assert {row.rate for row in found.rows()} == {1e-3, 5e-4}
    assert any("the lowest of --rates" in note for note in found.notes)
    monkeypatch.setattr(calibrate, "execute", Fake(1.0, wild=1e-9))
    with pytest.raises(ValueError, match="1f1b diverged at every rate of --rates: give lower ones"):
        Calibrator(Calibration(**SMALL), FinishedRuns(None)).rows()
    one = Calibrator(Calibration(**{**SMALL, "rates": (2e-3,)}), FinishedRuns(None)).rows()[0]
    assert one.f is None and "diverged" in one.why


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": 1}, "--stages is 1"),
        ({"seeds": (1, 2)}, "--seeds are 2: give at least 3"),
        ({"seeds": (1, 2, 9)}, "seed 9 is in --seeds and --pilot-seeds"),
        ({"seeds": (1, 1, 2)}, "--seeds is 1,1,2: give each once"),
        ({"rates": (0.0,)}, "--rates has 0.0"),
        ({"rates": (math.nan,)}, "--rates has nan"),
        ({"accumulations": (3,)}, "--batch-size 4 cannot be cut into 3"),
        ({"accumulations": (2, 2)}, "--accumulation is 2,2: give each once"),
        ({"width": 15}, "15"),
        ({"model": "gpt9"}, "gpt9"),
        ({"optimizer": "torch-adamw"}, "use --optimizer adamw"),
        ({"optimizer": "magic"}, "magic"),
        ({"updates": 0}, "--steps is 0"),
        ({"layers": 1}, "2 stages"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_run(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Calibration(**{**SMALL, **change})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["3", '{"key": "a"}', '{"loss": 1}', "no json", '{"key": "a", "loss": "x"}'])
def test_a_damaged_file_of_runs_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"key": "a", "loss": None}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2 is not a run: delete the line"):
        FinishedRuns(path)


@pytest.mark.parametrize("model", ["gpt2-medium", "llama-1b", "encoder-base"])
def test_models_of_every_family_are_cut_small(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(1.0)
    monkeypatch.setattr(calibrate, "execute", fake)
    Calibrator(Calibration(**{**SMALL, "width": None, "heads": None, "model": model}), FinishedRuns(None)).rows()
    shape = fake.configs[0].shape
    assert shape.layers == 2 and shape.width == 64 and shape.data_vocab_size == 256


def test_new_rows_stand_in_place_of_the_same_old_ones() -> None:
    row = OverheadRow(optimizer="adamw", lookahead=True, delay=1, share=0.4, f=1.2, model="m", at="best")
    others = [
        OverheadRow(**{**vars(row), **change})
        for change in ({"optimizer": "lion"}, {"share": 0.3}, {"at": "half"}, {"model": "n"}, {"lookahead": False})
    ]
    new = OverheadRow(**{**vars(row), "f": 1.1})
    assert merged(OverheadTable(rows=(row, *others)), [new]).rows == (new, *others)
    assert merged(None, [new]).rows == (new,)
