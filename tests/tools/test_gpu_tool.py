"""``make gpu`` without a GPU: what it asks of a machine, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu
import gpu_environment
from gpu_runner import Step
from gpu_steps import STEPS
from support.deadlines import deadline, wait_until
from support.gpu_step import FAST, SLOW, alive, fake, writes

ROOT = Path(__file__).resolve().parents[2]


GOOD: dict[str, Any] = {
    "interpreter": "python",
    "modules": {
        "torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.5.2", "setuptools": "80.9.0", "pybind11": "3.0.1",
        "pytest": "9.0", "packaging": "25.0", "cupy": "14.2.0",
    },
    "torch_cuda": "13.0",
    "gpus": [{"name": "NVIDIA H100"}],
    "nvcc": {"path": "/usr/bin/nvcc", "version": "13.0"},
    "cxx": "/usr/bin/c++",
    "tools": {"cmake": "/usr/bin/cmake", "ninja": "/usr/bin/ninja"},
    "revision": "abc",
    "date": "2026-11-26T00:00:00+00:00",
    "driver": "580.1",
    "python": "3.12.3",
}  # fmt: skip


def without(**changes: Any) -> dict[str, Any]:
    modules = {**GOOD["modules"], **changes.pop("modules", {})}
    return {**GOOD, "modules": modules, **changes}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (without(), None),
        (without(modules={"torch": None}), ("has no torch", "pip install torch")),
        (without(modules={"torch": "2.5.1"}), ("2.6 or later",)),
        (without(torch_cuda=None, gpus=[]), ("built without CUDA", "CUDA build")),
        (without(gpus=[], torch_error="RuntimeError: no driver"), ("sees no GPU (RuntimeError: no driver)", "driver")),
        (without(modules={"triton": None}), ("Triton is not installed", "pip install")),
        (without(modules={"triton": "3.5.1"}), ("3.6 or later",)),
        (without(modules={"triton": "3.10.0"}), None),
        (without(nvcc=None), ("no nvcc", "install the CUDA toolkit")),
        (without(cxx=None), ("no C++ compiler", "apt install g++")),
        (without(tools={"cmake": None, "ninja": "x"}), ("no cmake", "pip install cmake")),
        (without(tools={"cmake": "x", "ninja": None}), ("no ninja", "pip install ninja")),
        (without(modules={"pybind11": None}), ("pybind11 is not installed", "pip install pybind11")),
        (without(modules={"pytest": None}), ("pytest is not installed",)),
        (without(modules={"setuptools": "70.0"}), ("setuptools is 70.0", "setuptools>=77")),
        ({**GOOD, "probe_error": "exit code 1", "modules": {}}, ("could not be asked", "PYTHON=")),
        (without(modules={"cupy": None}), None),  # a rival in the benchmarks, no more
    ],
)
def test_what_is_missing_is_said_with_its_remedy(found: dict[str, Any], words: tuple[str, ...] | None) -> None:
    wrong = gpu_environment.problems(found)
    if words is None:
        assert wrong == []
        return
    (one,) = wrong
    assert all(word in one for word in words), one
    assert "\n" not in one


@pytest.mark.slow
def test_examining_this_machine_gives_facts() -> None:
    found = gpu_environment.examine(sys.executable, ROOT)
    assert found["python"] == sys.version.split()[0]
    assert found["modules"]["torch"]
    assert len(found["revision"].rstrip("+")) in (40, len("unknown"))
    assert gpu_environment.examine("/nowhere/python", ROOT)["probe_error"]
    assert gpu_environment.probe("/bin/false")["probe_error"] == "exit code 1"


def test_the_versions_that_a_report_must_have_are_in_its_heading() -> None:
    text = gpu_environment.heading(GOOD)
    for part in (
        "NVIDIA H100",
        "driver 580.1",
        "CUDA 13.0",
        "torch 2.11.0+cu130",
        "Triton 3.6.0",
        "Python 3.12.3",
        "abc",
    ):
        assert part in text


def run_main(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], arguments: list[str], steps: list[Step]) -> int:
    monkeypatch.setattr(gpu_environment, "examine", lambda python, root: found)
    for name in ("PATH", "PYTHONPATH", "PYTHONUNBUFFERED"):  # main sets them for its steps
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return gpu.main(arguments, steps)


def test_the_command_writes_a_document_and_its_exit_code_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert run_main(monkeypatch, GOOD, [], [writes("good", [FAST])]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("OK")
    assert "NVIDIA H100" in text
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert (document["verdict"], document["environment"]["modules"]["torch"]) == ("OK", "2.11.0+cu130")
    assert document["steps"][0]["document"]["rows"] == [1, 2]
    assert document["measures"][0]["measure"] == "fast"
    assert "===== good" in (tmp_path / "out" / "gpu.log").read_text()
    for bad in (writes("misses", [SLOW], exit_code=1), fake("crashes", "sys.exit(3)"), writes("empty", [])):
        assert run_main(monkeypatch, GOOD, [], [bad]) == 1
        assert json.loads((tmp_path / "out" / "gpu.json").read_text())["verdict"] == "FAILED"
        assert capsys.readouterr().out.rstrip().endswith("FAILED")


def test_what_was_measured_is_there_before_the_run_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "gpu.json"
    looks = fake(
        "looks",
        f"early = json.load(open({str(path)!r}))",
        "seen = [row['measure'] for row in early['measures']]",
        "row = {'measure': early['verdict'], 'value': len(seen), 'ok': seen == ['fast'], 'target': 'one', 'unit': ''}",
        "open(out, 'w').write(json.dumps({'measures': [row]}))",
    )
    assert run_main(monkeypatch, GOOD, ["--out", str(path.parent)], [writes("good", [FAST]), looks]) == 0
    assert [row["measure"] for row in json.loads(path.read_text())["measures"]] == ["fast", "UNFINISHED"]
    said = capsys.readouterr().out
    assert said.index("fast") < said.index("[2/2] looks")  # each step's rows behind it


def test_ended_from_outside_it_ends_its_step(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    step = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    script.write_text(
        f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu, gpu_environment
from gpu_runner import Step
gpu_environment.examine = lambda python, root: {GOOD!r}
gpu.ROOT = __import__("pathlib").Path({str(tmp_path)!r})
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
gpu.main(["--out", "out"], [Step(name="waits", does="", command=("{{python}}", "-c", {step!r}), limit_s=60)])
"""
    )
    process = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text(), 60, "the step has not begun")
    process.terminate()
    assert process.wait(timeout=deadline(30)) == 143
    assert not alive(int(pid.read_text()))
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["verdict"] == "UNFINISHED"


def test_a_machine_that_cannot_run_it_is_told_why_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touched = tmp_path / "touched"
    step = fake("touches", f"open({str(touched)!r}, 'w')")
    assert run_main(monkeypatch, without(nvcc=None, cxx=None), ["--out", str(tmp_path / "out")], [step]) == 2
    errors = capsys.readouterr().err
    assert "cannot run: there is no nvcc" in errors
    assert "cannot run: there is no C++ compiler" in errors
    assert not touched.exists()
    assert len(json.loads((tmp_path / "out" / "gpu.json").read_text())["problems"]) == 2


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert run_main(monkeypatch, without(nvcc=None), ["--dry-run"], list(STEPS)) == 0
    text = capsys.readouterr().out
    for step in STEPS:
        assert f"{step.name:10s} {step.share_s:4.0f} to {step.limit_s:.0f} s  {step.does}" in text
    assert "PACI_RT_CUDA=on PACI_RT_TESTING=on python setup.py build_ext --inplace" in text
    assert not (tmp_path / "out").exists()


def test_a_copy_without_git_can_be_told_its_revision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu_environment.revision(tmp_path) == "unknown"
    for known, expected in (("unknown", "revision 123 (as stated);"), ("abc", "revision abc;")):
        found = without(revision=known)
        assert run_main(monkeypatch, found, ["--revision", "123", "--dry-run"], [writes("good", [FAST])]) == 0
        assert expected in capsys.readouterr().out


def test_options_that_cannot_be_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--only", "tests,nothing"], "there is no step 'nothing'; there are build, tests"),
        (["--budget-s", "0"], "must be positive"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_main(monkeypatch, GOOD, arguments, list(STEPS))
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert [step.name for step in gpu.parse(["--only", "kernels,build"], STEPS).steps] == ["build", "kernels"]


def test_nothing_takes_longer_than_nine_minutes() -> None:
    assert gpu.BUDGET_S <= 9 * 60 - 15  # to look at the machine first, and to write the report
