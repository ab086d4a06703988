"""Faults in runs of several replicas: the stage and the replica at fault are named, and the last checkpoint goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import faults
from paci_rt import checkpoint
from support.deadlines import deadline, wait_until

TIMEOUT_S = 4
OPTIONS = ["--stages", "2", "--replicas", "2", "--batch-size", "8", "--accumulation", "2", "--seq-len", "8"]
OPTIONS += ["--eval-batches", "1", "--eval-interval", "0", "--save-interval", "5", "--steps", "4000"]
SCHEDULES = {
    "paci": ["--schedule", "paci"],
    "paci, ZeRO-1": ["--schedule", "paci", "--zero1"],
    "1f1b, ZeRO-1": ["--schedule", "1f1b", "--zero1"],
}


@contextmanager
def running(tmp_path: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], list[int], Path]]:
    """A run that has saved once: its launcher, the processes of its stages by rank, and what it says."""
    log, out = tmp_path / "log", tmp_path / "out"
    command = [sys.executable, "-m", "paci_rt", "train", *OPTIONS, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(faults.ROOT)}
    with log.open("wb") as stream:
        run = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment)
    try:
        wait_until(lambda: any(out.glob("index*.json")), 120, "no checkpoint ever came")
        yield run, stages_of(run.pid), log
    finally:
        faults.end_all(run.pid)
        run.wait(timeout=deadline(30))


def stages_of(pid: int) -> list[int]:
    found = []
    for one in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, one.read_text().split()):
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return sorted(found)


def goes_on(out: Path, *more: str) -> None:
    """The checkpoint is whole, and so many steps further it is another one."""
    checkpoint.verify(out)
    steps = checkpoint.read_index(out)["windows"] + 2
    options = [*OPTIONS[:-2], "--steps", str(steps), "--resume", str(out), *more]
    command = [sys.executable, "-m", "paci_rt", "train", *options, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(faults.ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=deadline(180))
    assert checkpoint.read_index(out)["windows"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sent", "rank", "words"), [(signal.SIGKILL, 2, "was killed by SIGKILL"), (signal.SIGSTOP, 1, "is stopped")]
)
def test_the_stage_and_the_replica_at_fault_are_named(
    tmp_path: Path, schedule: str, sent: signal.Signals, rank: int, words: str
) -> None:
    more = [*SCHEDULES[schedule], "--transfer-timeout", str(TIMEOUT_S)]
    with running(tmp_path, *more) as (run, stages, log):
        assert len(stages) == 4
        os.kill(stages[rank], sent)
        before = time.monotonic()
        assert run.wait(timeout=deadline(60)) == 1
        assert time.monotonic() - before < deadline(TIMEOUT_S + 15)
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in stages), 20, "stages are left")
    said = log.read_text()
    stage, replica = rank % 2, rank // 2
    assert f"stage {stage} of replica {replica}" in said and words in said, said
    assert "Traceback" not in said, said
    goes_on(tmp_path / "out", *SCHEDULES[schedule])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigterm_saves_once_for_all_replicas(tmp_path: Path, schedule: str) -> None:
    with running(tmp_path, *SCHEDULES[schedule]) as (run, stages, log):
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=deadline(60)) == 143
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in stages), 20, "stages are left")
    out = tmp_path / "out"
    assert f"stopped by SIGTERM after step {checkpoint.read_index(out)['windows']} and saved in" in log.read_text()
    goes_on(out, *SCHEDULES[schedule])
