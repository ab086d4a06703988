"""Faults in whole runs: each ends in time, names the stage at fault, and leaves nothing. More: benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import faults
from paci_rt.checkpoint import read_index
from support.deadlines import deadline, wait_until

TRAIN = [sys.executable, "-m", "paci_rt", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = ["--stages", "2", "--batch-size", "4", "--seq-len", "8", "--eval-batches", "2", "--eval-interval", "4"]


def case(launcher: str, kind: str, phase: str, *, transport: str = "shm", rank: int = 1, at: int = 0) -> faults.Case:
    return faults.Case(
        number=0,
        launcher=launcher,
        transport=transport,
        schedule="paci",
        stages=2,
        phase=phase,
        kind=kind,
        rank=rank,
        at=at,
        deadline_s=3.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "one",
    [
        case("train", "kill", "training", at=20),
        case("train", "stop", "start"),
        case("train", "stop", "save", transport="gloo", rank=0),
        case("train", "stop", "validation", at=2),
        case("train", "memory", "end"),
        case("train", "kill", "writing", at=7),
        case("train", "stop", "writing", transport="gloo", at=2),
        case("train", "raise", "writing", rank=0, at=3),
        case("train", "term", "writing", at=5),
        case("torchrun", "exit", "writing", transport="gloo", at=1),
        case("train", "term", "training", at=9, transport="gloo"),
        case("train", "cut", "training", at=15, transport="gloo"),
        case("torchrun", "kill", "save"),
        case("torchrun", "stop", "training", at=12, transport="gloo", rank=0),
        case("torchrun", "raise", "validation", at=1),
        case("torchrun", "cut", "warm-up", at=2, transport="gloo"),
    ],
    ids=lambda one: f"{one.launcher}-{one.kind}-{one.phase}-{one.transport}",
)
def test_a_fault_ends_the_run_in_time(one: faults.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MARGIN_S", "HANG_S"):
        monkeypatch.setattr(faults, name, deadline(getattr(faults, name)))
    done = faults.play(one)
    assert not done.problems, f"{done.problems}\n{done.said}"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(faults.ROOT), **more}


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        run = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment())
    try:
        yield run
    finally:
        faults.end_all(run.pid)
        run.wait(timeout=deadline(30))


def children(pid: int) -> list[int]:
    """The processes that run stages, of a launcher."""
    found = []
    for one in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, one.read_text().split()):
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def wait_for(text: str, log: Path) -> None:
    wait_until(lambda: text in log.read_text(errors="replace"), 60, f"{text!r} never came: {log.read_text()[-2000:]}")


def curve(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return {
        "losses": [(point["step"], point["loss"]) for point in found["curve"]],
        "evals": [(point["step"], point["val_loss"]) for point in found["evals"]],
        "train_loss": found["train_loss"],
        "params_sha256": found["params_sha256"],
    }


def faulty(tmp_path: Path, kind: str, phase: str, at: int) -> dict[str, str]:
    fault = {"kind": kind, "rank": 1, "phase": phase, "at": at, "mark": str(tmp_path / "mark")}
    return environment(FAULT=json.dumps(fault))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "phase", "at"),
    [
        ("paci", "training", 50),
        ("1f1b", "save", 2),
        ("paci", "end", 1),
        ("paci", "writing", 9),
        ("1f1b", "writing", 200),
    ],
)
def test_a_run_that_was_started_again_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, schedule: str, phase: str, at: int
) -> None:
    options = [*SMALL, "--steps", "10", "--save-interval", "3", "--schedule", schedule, "--transfer-timeout", "20"]
    limit = {"timeout": deadline(120), "check": True, "capture_output": True}
    plain = [*TRAIN, *options, "--out", str(tmp_path / "plain"), "--json", str(tmp_path / "plain.json")]
    subprocess.run(plain, env=environment(), **limit)
    again = [sys.executable, str(faults.STAGE), "train", *options, "--max-restarts", "2"]
    again += ["--out", str(tmp_path / "again"), "--json", str(tmp_path / "again.json")]
    done = subprocess.run(again, env=faulty(tmp_path, "kill", phase, at), text=True, **limit)
    assert "stage 1 was killed by SIGKILL" in done.stderr
    assert "starting again (1 of 2 restarts)" in done.stderr
    assert curve(tmp_path / "again.json") == curve(tmp_path / "plain.json")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("again", "plain")]
    again_lines, plain_lines = ([json.loads(line) for line in lines] for lines in logs)
    keys = ("step", "loss", "val_loss", "lr")  # the same steps, each once
    assert [[line.get(key) for key in keys] for line in again_lines] == [
        [line.get(key) for key in keys] for line in plain_lines
    ]


@pytest.mark.slow
def test_torchruns_own_restart_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    options = [*SMALL, "--steps", "10", "--save-interval", "3", "--transfer-timeout", "20"]
    options.append("--no-async-checkpoint")  # else the kill may come before a checkpoint is whole
    limit = {"timeout": deadline(150), "check": True, "capture_output": True, "text": True}
    plain = [*TRAIN, *options, "--out", str(tmp_path / "plain"), "--json", str(tmp_path / "plain.json")]
    subprocess.run(plain, env=environment(), **limit)
    torchrun = [*TORCHRUN, "--max-restarts", "1", str(faults.STAGE), "train", *options]
    torchrun += ["--out", str(tmp_path / "again"), "--json", str(tmp_path / "again.json")]
    subprocess.run(torchrun, env=faulty(tmp_path, "kill", "training", 110), **limit)
    again, plain_run = curve(tmp_path / "again.json"), curve(tmp_path / "plain.json")
    assert again["params_sha256"] == plain_run["params_sha256"]
    assert 0 < len(again["losses"]) < 10  # it did not begin anew
    assert again["losses"] == plain_run["losses"][-len(again["losses"]) :]
    lines = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == plain_run["losses"]  # each step once


@pytest.mark.slow
def test_another_runs_checkpoint_is_not_taken_after_a_restart(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options = [*SMALL, "--steps", "4", "--eval-interval", "0", "--transfer-timeout", "20", "--out", out]
    limit = {"timeout": deadline(120), "check": True, "capture_output": True, "text": True}
    subprocess.run([*TRAIN, *options, "--seed", "1"], env=environment(), **limit)
    first = tmp_path / "first.json"
    subprocess.run([*TRAIN, *options[:-2], "--seed", "2", "--json", str(first)], env=environment(), **limit)
    again = [sys.executable, str(faults.STAGE), "train", *options, "--seed", "2", "--max-restarts", "1"]
    second = tmp_path / "second.json"
    subprocess.run([*again, "--json", str(second)], env=faulty(tmp_path, "kill", "training", 9), **limit)
    assert curve(second) == curve(first)


@pytest.mark.slow
def test_sigusr1_shows_what_all_stages_do_and_the_run_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*TRAIN, *SMALL, "--steps", "4000", "--eval-interval", "0", "--transfer-timeout", "20"]
    with started(command, log) as run:
        wait_for("step", log)
        run.send_signal(signal.SIGUSR1)
        wait_for("stage 1 (process", log)
        text = log.read_text()
        for rank in (0, 1):
            assert re.search(rf"stage {rank} \(process \d+\) is there: training, .*{rank}[A-Z_]+\d+", text)
        assert text.count("trainer.py") >= 2  # a Python stack each
        os.kill(children(run.pid)[1], signal.SIGUSR1)  # a stage answers for all as well
        wait_until(lambda: log.read_text().count("what 2 stages do now") == 2, 30, "the stage did not answer")
        wait_until(lambda: log.read_text().count("stage 0 (process") == 2, 30, "it did not answer for all")
        assert run.poll() is None
        os.kill(children(run.pid)[1], signal.SIGSTOP)  # and one that cannot answer does not hold it up
        run.send_signal(signal.SIGUSR1)
        wait_for("is stopped", log)
        os.kill(children(run.pid)[1], signal.SIGCONT)
        before = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=deadline(30)) == 130
        assert time.monotonic() - before < deadline(15)


@pytest.mark.slow
def test_sigterm_drains_saves_and_ends(tmp_path: Path) -> None:
    log, out, logs = tmp_path / "log", tmp_path / "out", tmp_path / "logs"
    command = [*TRAIN, *SMALL, "--steps", "4000", "--out", str(out), "--log", str(logs), "--eval-interval", "0"]
    with started(command, log) as run:
        wait_for("step", log)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=deadline(60)) == 143
    step = read_index(out)["windows"]
    assert f"stopped by SIGTERM after step {step} and saved in {out}: go on with --resume" in log.read_text()
    for rank in (0, 1):
        lines = [json.loads(line) for line in (logs / f"rank-{rank}.jsonl").read_text().splitlines()]
        assert {line["rank"] for line in lines} == {rank}
        phases = [line["phase"] for line in lines if line["event"] == "phase"]
        assert phases[:2] == ["meeting the other stages", "training"]
        assert phases[-1] == "saving the checkpoint"
        assert lines[-1]["event"] == "end"
    assert any(line["event"] == "step" and line["loss"] > 0 for line in lines)


@pytest.mark.slow
def test_torchruns_workers_end_with_their_agent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [*TORCHRUN, "-m", "paci_rt", "train", *SMALL, "--steps", "4000", "--eval-interval", "0"]
    with started(command, log) as run:
        wait_for("step", log)
        workers = [pid for pid in children(run.pid) if b"paci_rt" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        run.kill()
        run.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers), 20, "workers are left")


@pytest.mark.slow
def test_an_error_of_another_rank_is_said_once_under_torchrun(tmp_path: Path) -> None:
    options = [*SMALL, "--steps", "4", "--transfer-timeout", "5"]
    both = [*TORCHRUN, "-m", "paci_rt", "train", *options, "--lr", "-1"]
    limit = {"timeout": deadline(120), "capture_output": True, "text": True}
    done = subprocess.run(both, env=environment(), **limit)
    assert done.returncode == 1 and done.stderr.count("paci-rt: error: --lr is -1.0") == 1
    script = tmp_path / "one.py"
    script.write_text(
        "import os, sys\n"
        "from paci_rt.cli.app import main\n"
        "if __name__ == '__main__':\n"
        "    more = ['--seq-len', '100000'] if os.environ['RANK'] == '1' else []\n"
        f"    sys.exit(main(['train', *{options!r}, *more]))\n"
    )
    done = subprocess.run([*TORCHRUN, str(script)], env=environment(), **limit)
    assert done.returncode == 1 and "paci-rt: error: --seq-len 100000 exceeds" in done.stderr


@pytest.mark.slow
def test_doctor_explains_a_run_that_failed(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    options = ["--steps", "4000", "--eval-interval", "0", "--transfer-timeout", "2", "--transport", "gloo"]
    with started([*TRAIN, *SMALL, *options, "--out", str(out)], log) as run:
        wait_for("step", log)
        os.kill(children(run.pid)[1], signal.SIGSTOP)
        assert run.wait(timeout=deadline(30)) == 1
    command = [sys.executable, "-m", "paci_rt", "doctor", "--run", str(out), "--json", str(tmp_path / "told.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(60), env=environment())
    assert done.returncode == 0, done.stderr
    assert "First was stage 1. Send it SIGCONT" in done.stdout
    assert re.search(
        r"stage 0 waited for stage 1, in 0(RECV|SEND)_[FB]\d+: micro-batch \d+ on the edge from", done.stdout
    )
    assert "rank 0, edge B 1->0, receiver: " in done.stdout
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["guilty"], told["condition"]) == (1, "stopped")
