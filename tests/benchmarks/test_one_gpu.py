"""benchmarks/one_gpu.py: its command on the CPU, and in small on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import one_gpu
from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--stages", "3", "--hidden", "16", "--layers", "1", "--tokens", "4", "--windows", "1", "--repeats", "1"]
ROW_KEYS = {
    *("schedule", "stages", "accumulation", "sms_per_stage", "micro_batches_per_s", "utilization", "period_ms"),
    *("host_ms", "host_bound", "took_ms", "exposed_update_ms", "hop_ms", "predicted_micro_batches_per_s"),
    *("prediction_error", "peak_memory_bytes", "peak_activations", "max_drift", "limit", "relative_to_1f1b"),
    *("relative_utilization", "repeats"),
}


# --- the command ---


@pytest.mark.slow
def test_on_the_cpu_it_runs_and_judges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "one_gpu.json"
    assert one_gpu.main(["--device", "cpu", *TINY, "--accumulation", "3,4", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "on the CPU stages take turns" in said and said.rstrip().endswith("OK")
    document = json.loads(path.read_text())
    assert {"benchmark", "machine", "place", "options", "step_costs_ms", "rows", "measures"} == document.keys()
    assert [(row["schedule"], row["accumulation"]) for row in document["rows"]] == [
        (name, accumulation) for accumulation in (3, 4) for name in ("1f1b", "zb-h1", "zb-2p", "paci")
    ]
    for row in document["rows"]:
        assert row.keys() == ROW_KEYS
        assert row["micro_batches_per_s"] > 0 and 0 < row["utilization"] <= 1
        assert row["host_ms"] is row["host_bound"] is row["peak_memory_bytes"] is None
        assert row["took_ms"].keys() == ({"F", "I", "W"} if row["schedule"].startswith("zb") else {"F", "B"})
    assert len(document["step_costs_ms"]["forward"]) == 3
    assert all(measure["ok"] is None for measure in document["measures"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is missing")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert one_gpu.main(["--json", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "--device cuda: torch" in said.err and "run this where there is one" in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "1"], "1 is too small: give at least 2"),
        (["--schedules", "interleaved-1f1b"], "interleaved-1f1b has several stages per rank"),
        (["--schedules", "pipedream"], "schedules are compared here on the same stages and windows"),
        (["--schedules", "pasi"], "paci"),
        (["--schedules", "pipedream-2bw", "--accumulation", "2"], "--schedules pipedream-2bw with --accumulation 2:"),
        (["--latency-us", "-1"], "-1 is too small: give at least 0"),
        (["--device", "cpu", "--latency-us", "5"], "links have a latency on a GPU only"),
        (["--device", "cpu", "--min-sms", "8"], "a CPU has no multiprocessors to split"),
        (["--repeats", "0"], "0 is too small: give at least 1"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        one_gpu.main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err


def row(schedule: str, ratio: float, host_ms: float | None, accumulation: int = 8) -> dict[str, Any]:
    return {
        "schedule": schedule,
        "stages": 8,
        "accumulation": accumulation,
        "relative_to_1f1b": ratio,
        "limit": (accumulation + 7) / accumulation,
        "period_ms": 20.0,
        "host_ms": host_ms,
        "host_bound": None if host_ms is None else host_ms > 0.9 * 20.0,
    }


def verdicts(*rows: dict[str, Any], latency_us: int = 0) -> list[bool | None]:
    return [measure["ok"] for measure in one_gpu.measures_of(rows, latency_us=latency_us)]


def test_verdicts() -> None:
    assert verdicts(row("1f1b", 1.0, 5.0), row("paci", 1.71, 5.0)) == [True, True, True]
    assert verdicts(row("paci", 1.69, 5.0)) == [False, True]
    assert verdicts(row("paci", 1.71, 18.5)) == [True, False]  # the host was not ahead
    assert verdicts(row("paci", 1.2, 5.0, accumulation=24), row("zb-2p", 1.2, 5.0)) == [None, True, None, True]
    assert verdicts(row("paci", 1.2, 5.0), latency_us=100) == [None, True]
    assert verdicts(row("paci", 1.0, None)) == [None]  # the CPU
    (ratio,) = one_gpu.measures_of([row("paci", 1.0, None)], latency_us=0)
    assert ratio["target"] is None


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_small(tmp_path: Path) -> None:
    """Too small for the host to be ahead; in a process of its own, since the number of hardware queues is set at the
    start of CUDA."""
    path = tmp_path / "one_gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "one_gpu.py"), "--stages", "4", "--accumulation", "4"]
    command += ["--hidden", "256", "--layers", "2", "--tokens", "256", "--latency-us", "50", "--windows", "1"]
    command += ["--repeats", "1", "--json", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=deadline(300), env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(path.read_text())
    assert document["place"]["sms_per_stage"] > 0 and document["place"]["hardware_queues"] == "32"
    assert {"gpu", "cuda", "triton", "torch"} <= document["machine"].keys() and document["place"]["driver"]
    for row in document["rows"]:
        assert row.keys() == ROW_KEYS
        assert row["host_ms"] > 0 and row["peak_memory_bytes"] > 0 and row["hop_ms"] >= 0.04
