"""``make gpu`` without a GPU: its runner on steps that pass, fail, hang and write nonsense, and what it asks of a
machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gpu
import gpu_environment
from gpu_runner import Outcome, Runner, Step, number, table, verdict
from gpu_steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
FAST: dict[str, Any] = {"measure": "fast", "value": 0.95, "unit": "of copy", "target": ">= 0.92", "ok": True}
SLOW: dict[str, Any] = {"measure": "slow", "value": 0.5, "unit": "", "target": ">= 0.92", "ok": False}


def fake(name: str, *lines: str, limit_s: float = 60.0, **options: Any) -> Step:
    """A step that runs a few lines of Python; ``out`` is the path to write to."""
    program = "\n".join(["import json, os, sys, time", "out = sys.argv[1]", *lines])
    return Step(name=name, does="fake", command=("{python}", "-c", program, "{out}"), limit_s=limit_s, **options)


def writes(name: str, measures: list[dict[str, Any]], exit_code: int = 0) -> Step:
    document = json.dumps({"measures": measures, "rows": [1, 2]})
    return fake(name, f"open(out, 'w').write({document!r})", f"sys.exit({exit_code})")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def runner(tmp_path: Path, said: list[str]) -> Runner:
    return make_runner(tmp_path, said)


def make_runner(tmp_path: Path, said: list[str], budget_s: float = 120.0) -> Runner:
    (tmp_path / "scratch").mkdir()
    return Runner(
        folder=tmp_path,
        scratch=tmp_path / "scratch",
        log=tmp_path / "log",
        python=sys.executable,
        budget_s=budget_s,
        say=said.append,
    )


def only_row(outcome: Outcome) -> dict[str, Any]:
    (row,) = outcome.rows()
    return row


def test_measures_reach_the_table_and_the_document(runner: Runner) -> None:
    passes, misses = runner.run([writes("passes", [FAST]), writes("misses", [SLOW, FAST], exit_code=1)])
    assert (passes.exit_code, passes.failure, passes.document["rows"]) == (0, None, [1, 2])
    assert [row["verdict"] for row in [*passes.rows(), *misses.rows()]] == ["OK", "MISSED", "OK"]
    assert misses.failure is None  # a benchmark that misses its target ends with 1, and its rows say so
    assert only_row(passes)["step"] == "passes"


def test_a_step_that_fails_costs_no_other_its_rows(runner: Runner, said: list[str]) -> None:
    steps = [
        fake("crashes", "print('what went wrong', flush=True)", "sys.exit(3)"),
        fake("silent", "pass"),
        fake("nonsense", "open(out, 'w').write('{')"),
        fake("nameless", "open(out, 'w').write(json.dumps({'measures': [{}]}))"),
        fake("listless", "open(out, 'w').write('[]')"),
        Step(name="absent", does="fake", command=("/nowhere/at/all",), limit_s=5),
        writes("good", [FAST]),
    ]
    outcomes = dict(zip([step.name for step in steps], runner.run(steps), strict=True))
    assert only_row(outcomes["good"])["verdict"] == "OK"
    expected = {
        "crashes": "it wrote no results (exit code 3)",
        "silent": "it wrote no results (exit code 0)",
        "nonsense": "its JSON cannot be read",
        "nameless": "a measure without a name",
        "listless": "no list under 'measures'",
        "absent": "its command did not start",
    }
    for name, why in expected.items():
        row = only_row(outcomes[name])
        assert (row["verdict"], row["ok"], row["measure"]) == ("FAILED", False, f"step {name}")
        assert why in row["note"]
    assert any("| what went wrong" in line for line in said)  # the end of its log, where it is read


def test_exit_codes_that_contradict_the_rows_are_failures(runner: Runner) -> None:
    for step in (writes("lies", [FAST], exit_code=1), writes("aborts", [SLOW], exit_code=-6)):
        outcome = runner.run_step(step)
        assert outcome.failure is not None
        assert outcome.rows()[0]["verdict"] in ("OK", "MISSED")  # what it wrote is shown beside the failure
        assert outcome.rows()[-1]["verdict"] == "FAILED"


def test_a_step_over_its_limit_is_ended_with_all_that_it_started(runner: Runner, tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = fake(
        "hangs",
        "import subprocess",
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"open({str(child)!r}, 'w').write(str(one.pid))",
        "open(out, 'w').write(json.dumps({'measures': []}))",
        "time.sleep(600)",
        limit_s=3.0,
    )
    start = time.monotonic()
    outcome, after = runner.run([hangs, writes("after", [FAST])])
    assert time.monotonic() - start < 60
    assert outcome.exit_code is None
    assert "ended at its limit of 3 s" in only_row(outcome)["note"]
    assert only_row(after)["verdict"] == "OK"
    pid, deadline = int(child.read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be fetched does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_no_step_begins_when_the_time_is_up(tmp_path: Path, said: list[str]) -> None:
    outcome = make_runner(tmp_path, said, budget_s=1.0).run_step(writes("late", [FAST]))
    assert only_row(outcome)["note"] == "no time was left for it"


def test_what_is_left_of_the_whole_time_limits_a_step(tmp_path: Path, said: list[str]) -> None:
    outcome = make_runner(tmp_path, said, budget_s=7.0).run_step(fake("long", "time.sleep(600)", limit_s=600))
    assert "limit of 7 s" in (outcome.failure or "")


def test_steps_see_their_variables_and_no_input(runner: Runner) -> None:
    row = {**FAST, "value": None}
    program = (
        f"row = {row!r}",
        "row['value'] = os.environ['SWITCH'] + sys.stdin.read()",
        "open(out, 'w').write(json.dumps({'measures': [row]}))",
    )
    assert only_row(runner.run_step(fake("reads", *program, environment={"SWITCH": "on"})))["value"] == "on"


def test_every_step_keeps_its_share_whatever_those_before_it_take(tmp_path: Path, said: list[str]) -> None:
    runner = make_runner(tmp_path, said, budget_s=31.0)
    told = "open(out, 'w').write(json.dumps({'measures': [], 'limit_s': float(sys.argv[2])}))"

    def step(name: str, *lines: str, **options: Any) -> Step:
        one = fake(name, told, *lines, **options)
        return Step(name=name, does="", command=(*one.command, "{limit_s}"), limit_s=one.limit_s, share_s=one.share_s)

    first, second, third = runner.run(
        [
            step("hangs", "time.sleep(600)", limit_s=60.0, share_s=3.0),
            step("second", limit_s=60.0, share_s=15.0),
            step("third", limit_s=10.0, share_s=10.0),
        ]
    )
    assert first.exit_code is None and "limit of 6 s" in (first.failure or "")
    assert 13 <= second.document["limit_s"] <= 16  # what the first did not leave is not missed
    assert third.document["limit_s"] == 10
    assert sum(one.share_s for one in STEPS) <= gpu.BUDGET_S
    assert all(one.share_s > 0 for one in STEPS)
    with pytest.raises(ValueError, match="share_s=5: it must be from 0 to limit_s"):
        Step(name="x", does="", command=(), limit_s=4, share_s=5)


def test_verdicts_and_table() -> None:
    informs = {"measure": "seen", "value": 3, "unit": "GB/s", "target": None, "ok": None}
    absent = {**informs, "value": None, "target": ">= 1", "note": "cupy not installed"}
    assert [verdict(row) for row in (FAST, SLOW, informs, absent)] == ["OK", "MISSED", "-", "not measured"]
    lines = table([{**row, "verdict": verdict(row)} for row in (FAST, SLOW, informs, absent)]).splitlines()
    assert lines[0].split() == ["measure", "value", "target", "verdict"]
    assert lines[1].split() == ["fast", "0.95", "of", "copy", ">=", "0.92", "OK"]
    assert lines[4].endswith("not measured (cupy not installed)")
    assert [number(value) for value in (1, 0.0, 1234.5, 3.14159, 0.01234, 1.5e-7, "x")] == [
        "1", "0", "1234", "3.14", "0.0123", "1.50e-07", "x",
    ]  # fmt: skip


def test_steps_must_make_sense() -> None:
    with pytest.raises(ValueError, match="reads 'csv': choose one of measures, nothing"):
        Step(name="x", does="", command=(), limit_s=1, reads="csv")
    with pytest.raises(ValueError, match="limit_s=0"):
        Step(name="x", does="", command=(), limit_s=0)
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for step in STEPS:
        scripts = [part for part in step.command if part.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), step.name
        assert (step.reads == "nothing") != any("{out}" in part for part in step.command), step.name


# --- the command ---


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
    deadline = time.monotonic() + 60
    while not (pid := tmp_path / "pid").exists() or not pid.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 143
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
