"""The runner of ``make gpu`` on steps that pass, fail, hang and write nonsense."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import gpu
from gpu_runner import Runner, Step, number, table, verdict
from gpu_steps import STEPS
from support.deadlines import deadline, wait_until
from support.gpu_step import FAST, SLOW, alive, fake, make_runner, only_row, writes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def runner(tmp_path: Path, said: list[str]) -> Runner:
    return make_runner(tmp_path, said)


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


@pytest.mark.slow
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
    assert time.monotonic() - start < deadline(60)
    assert outcome.exit_code is None
    assert "ended at its limit of 3 s" in only_row(outcome)["note"]
    assert only_row(after)["verdict"] == "OK"
    pid = int(child.read_text())
    wait_until(lambda: not alive(pid), 10, "the child is alive")


def test_no_step_begins_when_the_time_is_up(tmp_path: Path, said: list[str]) -> None:
    outcome = make_runner(tmp_path, said, budget_s=1.0).run_step(writes("late", [FAST]))
    assert only_row(outcome)["note"] == "no time was left for it"


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert 16 - deadline(3) <= second.document["limit_s"] <= 16  # what the first did not leave is not missed
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
