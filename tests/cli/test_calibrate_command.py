"""``paci-rt calibrate`` and the table that it hands to ``paci-rt plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paci_rt import cli
from paci_rt.train import gpt_blocks
from paci_rt.train.gpt import MODELS

CALIBRATE = ["calibrate", "--stages", "2", "--updates", "4", "--seeds", "1,2,3", "--rates", "1e-3", "--width", "16"]
CALIBRATE += ["--heads", "2", "--seq-len", "8", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stored() -> str:
    measured = gpt_blocks.profile_gpt(MODELS["gpt-tiny"], rows=1, seq_len=8, repeats=1).to_json()
    for block in measured["blocks"]:
        middle = block["role"] == "middle"
        block |= dict.fromkeys(("forward_s", "input_grad_s", "weight_grad_s"), 0.01 if middle else 1e-4)
    Path("profile.json").write_text(json.dumps({**measured, "update_s_per_byte": 1e-9}))
    return "profile.json"


def test_a_calibration_decides_a_plan(capsys: pytest.CaptureFixture[str], stored: str) -> None:
    assert cli.main([*CALIBRATE, "--out", "own.json", "--json", "rows.json", "--optimizer", "lion"]) == 0
    out = capsys.readouterr().out
    assert "Token overhead of PACI over 1f1b, lion, gpt-tiny cut to 2 blocks of width 16, 2 stages" in out
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [row["at"] for row in rows] == ["best", "half"] and rows[0]["share"] == 0.25
    assert json.loads(Path("own.json").read_text())["rows"] == rows
    plan = ["plan", "--profile", stored, "--stages", "2", "--batch-size", "2", "--json", "plan.json"]
    plan += ["--optimizer", "lion", "--schedules", "paci,1f1b", "--slack", "0", "--policies", "bounded"]
    assert cli.main([*plan, "--token-overhead", "own.json"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("plan.json").read_text())
    assert found["schedule"] == "paci" and found["predicted"]["overhead"]["known"]
    assert "times those of 1f1b for the same loss" in out and "P=2 a=2 gpt-tiny cut to 2 blocks" in out
    assert "times as soon at a loss as 1f1b" in out and "--optimizer lion" in found["command"]
    # Measured again, the same rows are replaced; those of another optimizer stay.
    assert cli.main([*CALIBRATE, "--out", "own.json", "--optimizer", "sgd"]) == 0
    assert [row["optimizer"] for row in json.loads(Path("own.json").read_text())["rows"]] == ["sgd"] * 2 + ["lion"] * 2


def table(optimizer: str) -> str:
    """A file of one row."""
    row = {"optimizer": optimizer, "policy": "bounded", "lookahead": True, "delay": 1, "share": 0.4}
    row |= {"f": 1.1, "f_low": 1.0, "f_high": 1.2}
    return json.dumps({"format": "paci-rt token overhead", "version": 1, "rows": [row]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "token overhead bad.json is not JSON"),
        ('{"format": "paci-rt profile"}', "format is 'paci-rt profile'"),
        ('{"format": "paci-rt token overhead", "version": 1, "rows": [{}]}', "rows[0].optimizer is missing"),
        (table("adamwx"), "token overhead bad.json: rows[0].optimizer is 'adamwx': no plan would use that row"),
        (table("torch-adamw"), "rows[0].optimizer is 'torch-adamw': no plan would use that row"),
    ],
)
def test_bad_tables_are_one_line(text: str, said: str, stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text(text)
    assert cli.main(["plan", "--profile", stored, "--token-overhead", "bad.json"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--optimizer", "adam"], "--optimizer"),
        (["plan", "--optimizer", "torch-adamw", "--lookahead"], "use --optimizer adamw"),
        (["plan", "--token-overhead", "none.json"], "token overhead none.json cannot be read"),
        ([*CALIBRATE, "--out", "."], "--out . is a folder"),
        ([*CALIBRATE, "--out", "o.json", "--accumulation", "3"], "--batch-size 4 cannot be cut into 3"),
        ([*CALIBRATE, "--out", "o.json", "--data", "none.txt"], "none.txt"),
        ([*CALIBRATE, "--out", "o.json", "--seeds", "1,x"], "not a list of integers"),
        (["calibrate", "--stages", "2"], "--out"),
    ],
)
def test_bad_values_are_one_line_and_nothing_is_written(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_file_that_is_no_table_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text('{"precious": 1}')
    assert cli.main([*CALIBRATE, "--out", "mine.json"]) == 2
    assert "token overhead mine.json: format is missing" in capsys.readouterr().err
    assert Path("mine.json").read_text() == '{"precious": 1}'
