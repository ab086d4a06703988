"""The command line: bad values, results, and a clean end of runs that fail."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paci_rt import cli
from paci_rt.cli import findings
from paci_rt.cli.progress import Progress
from support.deadlines import deadline, wait_until

LIMIT_S = 120.0
TRAIN_KEYS = {
    "schedule", "stages", "accumulation", "steps", "tokens", "train_loss", "val_loss", "wall_s", "tokens_per_s",
    "utilization", "max_drift", "drift_bound", "peak_memory_bytes", "params_sha256",
}  # fmt: skip
SMALL = ["--steps", "3", "--batch-size", "2", "--accumulation", "2", "--seq-len", "16", "--eval-batches", "1"]
LONG = ["--steps", "100000", "--batch-size", "2", "--accumulation", "2", "--seq-len", "16", "--eval-interval", "0"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 200)
    return str(path)


def error_of(capsys, *argv: str) -> str:
    """Run a command that must refuse its arguments; returns its one line."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"paci-rt: error: [^\n]+\n", err)
    assert os.listdir() == []
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("train --stepz 3", "unknown option --stepz: did you mean '--steps'?"),
        ("train 3", "unexpected argument '3'"),
        ("train --steps three", "--steps: invalid int value: 'three'"),
        ("train --steps 0", "--steps is 0: give an integer of at least 1"),
        ("train --accumulation 0", "--accumulation is 0"),
        ("train --stages 9", "9 stages, but gpt-tiny has only 8 blocks"),
        ("train --schedule packi", "did you mean 'paci'?"),
        ("train --model gpt-tinny", "did you mean 'gpt-tiny'?"),
        ("train --partition 4;4", "'4;4' is not a list of integers"),
        ("train --device cuda", "--device cuda"),
        ("train --data nowhere.txt", "--data nowhere.txt does not exist"),
        ("train --out /proc/nowhere", "--out /proc/nowhere cannot be written"),
        ("train --json /proc/nowhere.json", "--json /proc/nowhere.json cannot be written"),
        ("train --json .", "--json . is a folder"),
        ("train --resume nowhere", "nowhere"),
        ("compare --schedules paci,gpip", "did you mean 'gpipe'?"),
        ("compare --schedules paci,paci", "names paci twice"),
        ("compare --target-loss low", "'low' is neither auto nor a positive number"),
        ("compare --seeds 0", "--seeds is 0"),
        ("compare --out /proc/nowhere", "--out /proc/nowhere cannot be written"),
        ("doctor --json /proc/nowhere.json", "cannot be written"),
        ("", "no command given: say train, prepare, eval, sample, export, compare, report, simulate, plan, calib"),
    ],
)
def test_bad_values_end_in_one_line(capsys, argv, words):
    assert words in error_of(capsys, *argv.split())


def test_a_port_in_use(capsys, text_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_of(capsys, "train", *SMALL, "--data", text_file, "--port", str(port))
    assert f"port {port} cannot be used" in line


@pytest.mark.parametrize("command", ["train", "compare", "simulate", "plan", "doctor"])
def test_help(capsys, command):
    for argv in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: paci-rt {command} [options]" in out
    assert "--json FILE" in out


@pytest.mark.parametrize("command", ["eval RUN", "sample CHECKPOINT --prompt TEXT", "export CHECKPOINT --to DIR"])
def test_help_of_commands_on_a_checkpoint(capsys, command):
    with pytest.raises(SystemExit) as caught:
        cli.main([command.split()[0], "--help"])
    assert caught.value.code == 0
    assert f"usage: paci-rt {command} [options]" in capsys.readouterr().out


@pytest.mark.slow
def test_train_gives_the_same_parameters_wherever_its_stages_live(capsys, text_file):
    """In one process, in spawned processes, under torchrun; then goes on from the checkpoint."""
    argv = ["train", *SMALL, "--data", text_file, "--eval-interval", "0"]
    assert cli.main([*argv, "--transport", "local", "--json", "new/local.json", "--save-trace", "trace.json"]) == 0
    out, err = capsys.readouterr()
    assert "params_sha256" in out
    assert "paci  step 3/3" in err
    assert cli.main([*argv, "--json", "gloo.json", "--out", "saved"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "paci_rt"]
    subprocess.run(
        [*torchrun, *argv, "--json", "torchrun.json"], check=True, capture_output=True, timeout=deadline(LIMIT_S)
    )
    results = [json.loads(Path(name).read_text()) for name in ("new/local.json", "gloo.json", "torchrun.json")]
    assert all(result.keys() >= TRAIN_KEYS for result in results)
    assert len({result["params_sha256"] for result in results}) == 1
    assert len({result["val_loss"] for result in results}) == 1
    assert all((result["max_drift"], result["drift_bound"], result["tokens"]) == (1, 1, 96) for result in results)
    names = {event["name"] for event in json.loads(Path("trace.json").read_text())["traceEvents"]}
    assert names >= {"0F0", "1F5", "1B5", "0U2"}
    more = [*argv, "--resume", "saved", "--stages", "1", "--steps", "4", "--json", "more.json"]
    assert cli.main(more) == 0
    assert json.loads(Path("more.json").read_text())["windows"] == 1


def test_compare(capsys, text_file):
    pytest.importorskip("matplotlib")
    argv = ["compare", "--schedules", "paci,1f1b", "--transport", "local", *SMALL, "--data", text_file]
    assert cli.main([*argv, "--eval-interval", "1", "--out", "demo", "--json", "compare.json"]) == 0
    out, err = capsys.readouterr()
    assert "times as fast" in out or "first, after" in out
    assert "paci  step 0/3  validation loss" in err
    result = json.loads(Path("compare.json").read_text())
    assert result.keys() >= {"runs", "target_loss", "speedup_vs"}
    assert [run["schedule"] for run in result["runs"]] == ["paci", "1f1b"]
    assert all(run.keys() >= TRAIN_KEYS | {"time_to_target_s"} for run in result["runs"])
    last = max(run["val_loss"] for run in result["runs"])
    assert last <= result["target_loss"] < last + 0.1
    files = {
        "report.md",
        "loss_vs_tokens.png",
        "loss_vs_time.png",
        "timeline.png",
        "trace-paci.json",
        "trace-1f1b.json",
        "comparison.json",
    }
    assert set(os.listdir("demo")) == files


def children_of(pid: int) -> list[int]:
    """Stage processes of a running ``paci-rt``, in the order of their start."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == pid and state != "Z" and b"spawn_main" in command:
                found.append(int(entry.name))
    return sorted(found)


@contextmanager
def long_run(text_file: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run that would take hours, once its first window is over; and its stages."""
    command = [sys.executable, "-m", "paci_rt", "train", *LONG, "--data", text_file, "--json", "result.json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "  loss " in line:
                    break
            stages = children_of(process.pid)
            assert len(stages) == 2
            yield process, stages
        finally:
            process.kill()


def ends(process: subprocess.Popen[str], stages: list[int]) -> str:
    """Wait for the end; returns what was written to stderr."""
    _, err = process.communicate(timeout=deadline(LIMIT_S))
    there = [Path(f"/proc/{pid}/exe") for pid in stages]
    wait_until(lambda: not children_of(process.pid) and not any(one.exists() for one in there), 20, "stages are left")
    assert not Path("result.json").exists()
    return err


@pytest.mark.slow
def test_a_killed_stage_ends_the_run(text_file):
    with long_run(text_file) as (process, stages):
        os.kill(stages[1], signal.SIGKILL)
        err = ends(process, stages)
    assert process.returncode == 1
    assert "paci-rt: error: stage 1 was killed by SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_ends_the_run_without_noise(text_file):
    with long_run(text_file) as (process, stages):
        os.killpg(process.pid, signal.SIGINT)
        err = ends(process, stages)
    assert process.returncode == 130
    assert err.endswith("paci-rt: interrupted\n")
    assert "Traceback" not in err


def test_an_error_inside_a_stage_comes_with_its_action(capsys, text_file, monkeypatch):
    from paci_rt.train import build

    def broken(logits, target):
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(build, "cross_entropy", broken)
    argv = ["train", *SMALL, "--data", text_file, "--transport", "local", "--eval-interval", "0"]
    assert cli.main([*argv, "--json", "result.json"]) == 1
    err = capsys.readouterr().err
    assert "paci-rt: error: action 1F0 failed: ZeroDivisionError: nothing to divide by" in err
    assert "in broken" in err
    assert os.listdir() == []


def step(number: int, steps: int = 20) -> dict:
    return {
        "kind": "step", "step": number, "steps": steps, "loss": 2.5, "tokens": number * 64, "elapsed_s": float(number),
        "tokens_per_s": 1234.0, "utilization": 0.97,
    }  # fmt: skip


def test_plain_progress():
    stream = io.StringIO()
    with Progress("paci", stream=stream, interval_s=3600) as progress:
        for number in range(1, 21):
            progress(step(number))
        progress({"kind": "eval", "step": 20, "steps": 20, "val_loss": 2.25})
        progress({"kind": "something else"})
    assert stream.getvalue().splitlines() == [
        "paci  step  1/20  loss 2.500  1,234 tokens/s  utilization 0.97  1 s",
        "paci  step 20/20  loss 2.500  1,234 tokens/s  utilization 0.97  20.0 s",
        "paci  step 20/20  validation loss 2.250",
    ]


def test_live_progress():
    pytest.importorskip("tqdm")
    stream = io.StringIO()
    with Progress("paci", stream=stream, live=True) as progress:
        progress({"kind": "eval", "step": 10, "steps": 20, "val_loss": 2.25})
        for number in range(11, 21):
            progress(step(number))
    drawn = re.split(r"[\r\n]+", stream.getvalue().strip())
    assert drawn[0].startswith("paci  50%")
    assert "20/20" in drawn[-1]
    assert "loss 2.500, 1,234 tok/s, util 0.97, val 2.250" in drawn[-1]


def test_doctor(capsys):
    assert cli.main(["doctor", "--json", "doctor.json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(Path("doctor.json").read_text())
    assert found.keys() >= {"native", "torch", "gloo", "cuda", "nccl", "triton", "gpus", "cores", "memory_bytes"}
    assert found["gloo"]["tried"]
    assert found["native"]["isa"] in found["native"]["isas"]
    assert found["cores"] >= 1
    assert "native core  ok" in out
    assert "This machine can train." in out
    for name, what in found["advice"].items():
        assert f"{name}: {what}" in out


def test_doctor_says_what_to_do(monkeypatch):
    missing = {"available": False, "error": "No module named 'paci_rt._C'", "isa": None, "isas": [], "cuda": False}
    monkeypatch.setattr(findings.native, "info", lambda: {**missing, "threads": 1})
    listing = "0, NVIDIA H100, 81559, 9.0, 570.1\n1, NVIDIA T, [N/A], [N/A], 570.1\n"
    gpus = findings.parse_gpus(listing)
    assert [gpu["memory_bytes"] for gpu in gpus] == [81559 << 20, None]
    monkeypatch.setattr(findings, "find_gpus", lambda: gpus)
    monkeypatch.setattr(findings.torch.version, "cuda", None)
    found = findings.examine(try_gloo=False)
    assert not found["usable"]
    assert "pip install -e ." in found["advice"]["native core"]
    assert "built for the CPU" in found["advice"]["torch"]
    text = findings.report_text(found)
    assert "NVIDIA H100, 79.65 GiB, compute capability 9.0" in text
    assert "This machine cannot train yet." in text


@pytest.mark.slow
def test_doctor_and_help_start_no_gpu_library():
    code = (
        "import sys\n"
        "from paci_rt import cli\n"
        "cli.main(['doctor', '--quick'])\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'triton', 'cupy', 'pynvml'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=deadline(LIMIT_S))
