"""``benchmarks/update_overlap.py`` on the CPU, and what it makes of given seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import update_overlap
from paci_rt.train.gpt import MODELS, build_stage
from update_overlap import Setting, make_pipeline, overlap_measures, random_batch, windows_without_waiting

SMALL = [
    "--device",
    "cpu",
    "--model",
    "gpt-tiny",
    "--sequences",
    "1",
    "--tokens",
    "8",
    "--windows",
    "1",
    "--rounds",
    "2",
]


def setting(device: str) -> Setting:
    return Setting(device=device, model="gpt-tiny", sequences=1, tokens=8, accumulation=4, windows=1, rounds=1)


def test_the_script_runs_and_judges_nothing_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overlap.json"
    assert update_overlap.main([*SMALL, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [row["ok"] for row in document["measures"]] == [None] * 4
    assert len(document["rounds_s"]) == 2
    assert capsys.readouterr().out.endswith("OK\n")


def test_exposed_time_is_a_share_of_a_micro_batch() -> None:
    # Windows of 4 micro-batches of 100 ms; an update of 30 ms, of which 1 or 3 ms show.
    seconds = {"without": 0.4, "with": 0.401, "without in line": 0.5, "with in line": 0.53, "with, host": 0.1}
    rows = {row["measure"]: row for row in overlap_measures([seconds], setting("cuda"))}
    assert rows["micro-batch"]["value"] == pytest.approx(100)
    assert rows["update in line"]["value"] == pytest.approx(30)
    assert rows["update overlapped, exposed"]["value"] == pytest.approx(1)
    assert rows["update overlapped, exposed"]["ok"] is True
    (late,) = [
        row for row in overlap_measures([{**seconds, "with": 0.403}], setting("cuda")) if "exposed" in row["measure"]
    ]
    assert (late["ok"], late["target"]) == (False, "<= 2")


def test_a_stage_that_updates_where_none_is_wanted_is_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_overlap, "Unmoved", update_overlap.paci_rt.AdamW)
    with pytest.raises(RuntimeError, match="updates were not compared with none"):
        update_overlap.timings(setting("cpu"))


def test_what_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(setting: Setting) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(update_overlap, "timings", full)
    path = tmp_path / "overlap.json"
    assert update_overlap.main([*SMALL, "--json", str(path)]) == 1
    (row,) = json.loads(path.read_text())["measures"]
    assert (row["measure"], row["ok"]) == ("update overlapped, exposed", False)
    assert row["note"] == "RuntimeError: out of memory"


def test_a_window_that_waits_is_told_and_the_mode_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    pipeline = make_pipeline([build_stage(MODELS["gpt-tiny"], 0, 1)], "paci", 2, "cpu")
    batch = random_batch(256, 2, 8, "cpu")
    assert windows_without_waiting(pipeline, batch, 1) is None
    assert modes == ["error", "default"]
    step = pipeline.step

    def waits(*args: Any, **options: Any) -> Any:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nsomewhere")
        return step(*args, **options)

    monkeypatch.setattr(pipeline, "step", waits)
    assert windows_without_waiting(pipeline, batch, 1) == "RuntimeError: called a synchronizing CUDA operation"
    assert modes[-1] == "default"


def test_options_that_cannot_be() -> None:
    wrong = [["--device", "cpu", "--model", "gpt-tiny", "--tokens", "1000"], ["--rounds", "0"]]
    wrong += [] if torch.cuda.is_available() else [["--device", "cuda"]]
    for arguments in wrong:
        with pytest.raises(SystemExit) as stopped:
            update_overlap.main(arguments)
        assert stopped.value.code == 2
