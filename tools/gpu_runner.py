"""Runs steps one after another, each under a time limit of its own, and puts what they measured into one table.

Steps are data (:class:`Step`, listed in ``gpu_steps.py``). A step is a command; what it found it writes as JSON to the
file that ``{out}`` stands for, with a list under ``measures``:

    {"measures": [{"measure": "accumulate bf16", "value": 0.95, "unit": "of copy", "target": ">= 0.92", "ok": true}]}

``ok`` is null for what only informs. A step that fails, hangs or writes nothing costs its own rows and no others.
Nothing here imports torch or paci_rt, which only the first step builds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEAST_S = 5.0
"""A step is not begun with less time than this."""

GRACE_S = 5.0
"""Between asking a step that is over its limit to end and ending it."""

TAIL_LINES = 25
TAIL_CHARS = 4000

OK, MISSED, FAILED, INFORMS, ABSENT = "OK", "MISSED", "FAILED", "-", "not measured"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a run.

    Attributes:
        name: one word, for ``--only`` and the files.
        does: what it is for, in a line.
        command: ``{python}`` stands for the interpreter, ``{out}`` for the file to write results to, and ``{limit_s}``
            for the seconds that the step has.
        limit_s: seconds after which it is ended.
        share_s: seconds that are kept for it of the whole run's, whatever the steps before it take.
        reads: what is in ``{out}``: ``measures`` (JSON, see above) or ``nothing``.
        environment: variables beside the inherited ones.
    """

    name: str
    does: str
    command: tuple[str, ...]
    limit_s: float
    share_s: float = 0.0
    reads: str = "measures"
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reads not in READERS:
            raise ValueError(f"step {self.name!r} reads {self.reads!r}: choose one of {', '.join(READERS)}")
        if self.limit_s <= 0:
            raise ValueError(f"step {self.name!r} has limit_s={self.limit_s}: it must be positive")
        if not 0 <= self.share_s <= self.limit_s:
            raise ValueError(f"step {self.name!r} has share_s={self.share_s}: it must be from 0 to limit_s")

    def filled(self, python: str, out: Path, limit_s: float) -> list[str]:
        """The command with its words filled in."""
        words = {"{python}": python, "{out}": str(out), "{limit_s}": f"{limit_s:.0f}"}
        filled = []
        for part in self.command:
            for word, value in words.items():
                part = part.replace(word, value)
            filled.append(part)
        return filled


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step.

    Attributes:
        seconds: that it took.
        exit_code: None where it was ended or never began.
        failure: why its results are missing or cannot be trusted; None where all is well.
        measures: rows that it wrote.
        document: all that it wrote.
    """

    step: Step
    seconds: float
    exit_code: int | None
    failure: str | None = None
    measures: list[dict[str, Any]] = field(default_factory=list)
    document: Any = None

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table: what was measured, and a failure if there is one."""
        rows = [{"step": self.step.name, **measure, "verdict": verdict(measure)} for measure in self.measures]
        if self.failure is not None:
            failed = {"measure": f"step {self.step.name}", "value": None, "unit": "", "target": None, "ok": False}
            rows.append({"step": self.step.name, **failed, "note": self.failure, "verdict": FAILED})
        return rows


def verdict(measure: Mapping[str, Any]) -> str:
    """One word for a measure."""
    if measure.get("ok") is None:
        return INFORMS if measure.get("target") is None else ABSENT
    return OK if measure["ok"] else MISSED


# --- what steps write ---


def read_measures(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """A benchmark's JSON; raises ValueError where it is not as the top of this file says."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON cannot be read ({error})") from error
    measures = document.get("measures") if isinstance(document, dict) else None
    if not isinstance(measures, list):
        raise ValueError("its JSON has no list under 'measures'")
    for measure in measures:
        if not isinstance(measure, dict) or not isinstance(measure.get("measure"), str):
            raise ValueError(f"a measure without a name in its JSON: {measure!r}")
        if measure.get("ok") not in (None, True, False):
            raise ValueError(f"measure {measure['measure']!r} has ok={measure['ok']!r}: true, false or null")
    return measures, document


def read_nothing(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """For steps that only must end with exit code 0."""
    return [], None


READERS: dict[str, Callable[[Path], tuple[list[dict[str, Any]], Any]]] = {
    "measures": read_measures,
    "nothing": read_nothing,
}


# --- running ---


class Runner:
    """Runs steps.

    Args:
        folder: the steps' working directory.
        scratch: where they write their results.
        log: file that everything they print is appended to.
        python: interpreter.
        budget_s: seconds for all of them together.
        say: prints a line.
    """

    def __init__(
        self,
        *,
        folder: Path,
        scratch: Path,
        log: Path,
        python: str,
        budget_s: float,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self._folder, self._scratch, self._log, self._python, self._say = folder, scratch, log, python, say
        self._end = time.monotonic() + budget_s

    def run(
        self, steps: Sequence[Step], *, after: Callable[[list[Outcome]], None] = lambda outcomes: None
    ) -> list[Outcome]:
        """All steps in order, even if some fail.

        Args:
            steps: what to run.
            after: called behind each step with what is there so far.
        """
        outcomes: list[Outcome] = []
        for number, step in enumerate(steps, start=1):
            self._say(f"[{number}/{len(steps)}] {step.name}: {step.does}")
            outcome = self.run_step(step, kept_s=sum(later.share_s for later in steps[number:]))
            outcomes.append(outcome)
            missed = sum(verdict(measure) == MISSED for measure in outcome.measures)
            if outcome.failure is not None:
                self._say(f"      FAILED after {outcome.seconds:.1f} s: {outcome.failure}")
            else:
                self._say(f"      {f'{missed} MISSED' if missed else 'ok'}, {outcome.seconds:.1f} s")
            after(outcomes)
        return outcomes

    def run_step(self, step: Step, *, kept_s: float = 0.0) -> Outcome:
        """One step, within its own limit and what is left of the whole run's, of which ``kept_s`` are for others."""
        left_s = self._end - time.monotonic()
        # What is kept for others never takes a step's own share.
        limit_s = min(step.limit_s, left_s, max(left_s - kept_s, step.share_s))
        if limit_s < min(LEAST_S, step.limit_s):
            return Outcome(step=step, seconds=0.0, exit_code=None, failure="no time was left for it")
        out = self._scratch / f"{step.name}.out"
        out.unlink(missing_ok=True)
        command = step.filled(self._python, out, limit_s)
        start, begins = time.monotonic(), self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("a", encoding="utf-8") as log:
            print(f"\n===== {step.name}: {' '.join(command)}", file=log, flush=True)
            try:
                exit_code = self._wait(command, {**os.environ, **step.environment}, log, limit_s)
            except OSError as error:
                failure = f"its command did not start: {error}"
                return Outcome(step=step, seconds=time.monotonic() - start, exit_code=None, failure=failure)
        seconds = time.monotonic() - start
        measures, document, failure = self._results(step, out, exit_code)
        if exit_code is None:
            failure = f"it was ended at its limit of {limit_s:.0f} s"
        if failure is not None or any(verdict(measure) == MISSED for measure in measures):
            self._say(tail(self._log, begins))
        return Outcome(
            step=step, seconds=seconds, exit_code=exit_code, failure=failure, measures=measures, document=document
        )

    def _wait(self, command: list[str], environment: dict[str, str], log: Any, limit_s: float) -> int | None:
        """Run a command in a process group of its own; None where it had to be ended."""
        # A group, so that what the step has started ends with it.
        process = subprocess.Popen(
            command,
            cwd=self._folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process)

    def _results(self, step: Step, out: Path, exit_code: int | None) -> tuple[list[dict[str, Any]], Any, str | None]:
        """Measures, document, and what is wrong with them."""
        if step.reads != "nothing" and not out.exists():
            return [], None, f"it wrote no results (exit code {exit_code})"
        try:
            measures, document = READERS[step.reads](out)
        except ValueError as error:
            return [], None, f"{error} (exit code {exit_code})"
        missed = any(verdict(measure) == MISSED for measure in measures)
        # Benchmarks and pytest end with 1 where something was missed, which the rows say already.
        if exit_code not in (0, None) and not (exit_code == 1 and missed):
            return measures, document, f"it ended with exit code {exit_code}"
        return measures, document, None


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process started with a session of its own, and all that it has started; nothing where all are gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        deadline = time.monotonic() + GRACE_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    process.wait()


def tail(log: Path, begins: int) -> str:
    """The last lines that a step printed, indented."""
    with log.open("rb") as file:
        file.seek(begins)
        text = file.read().decode("utf-8", errors="replace")[-TAIL_CHARS:]
    return "\n".join("      | " + line for line in text.splitlines()[-TAIL_LINES:])


# --- the table ---


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a measure: value, target, verdict."""
    cells = [("measure", "value", "target", "verdict")]
    for row in rows:
        value = "" if row["value"] is None else f"{number(row['value'])} {row.get('unit') or ''}".strip()
        word = row["verdict"] + (f" ({row['note']})" if row.get("note") else "")
        cells.append((str(row["measure"]), value, str(row["target"] or "-"), word))
    widths = [max(len(line[at]) for line in cells) for at in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True)] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def number(value: Any) -> str:
    """Three significant digits or so, without an exponent where that reads better."""
    if not isinstance(value, float):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
