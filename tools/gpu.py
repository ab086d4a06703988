"""Builds, tests and measures paci_rt on a GPU, and prints one table: ``make gpu``.

    python tools/gpu.py [--only tests,kernels] [--out DIR] [--budget-s 520] [--dry-run]

Needs a CUDA build of torch, Triton, the CUDA toolkit, and the build tools, in the environment of the interpreter that
runs it; downloads nothing and installs nothing: the core is built into this folder. Writes ``gpu.json`` (what was
measured, on what; rewritten after each step) and ``gpu.log`` (all that the steps printed) to ``--out``, by default
``$OUT`` or ``runs/gpu``.

Exit code 0: everything ran and reached its target. 1: something was missed or failed; the table says what. 2: this
machine cannot run it, or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_environment
from gpu_runner import FAILED, MISSED, OK, Outcome, Runner, Step, table
from gpu_steps import STEPS

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = "UNFINISHED"
"""The verdict in ``gpu.json`` while steps are still to come, and for ever where the whole was ended before its end."""
BUDGET_S = 520.0
"""For all steps, so that the whole stays below 9 minutes."""


def parse(arguments: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    """Options; exits with 2 and one line where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [step.name for step in steps]
    parser.add_argument("--only", metavar="NAMES", help=f"only these steps, with commas between: {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.log (default $OUT, else runs/gpu)")
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help=f"seconds for all steps (default {BUDGET_S:.0f})"
    )
    parser.add_argument("--revision", help="what was checked out, where git is not there to say it")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing; run nothing")
    options = parser.parse_args(arguments)
    if options.budget_s <= 0:
        parser.error(f"--budget-s {options.budget_s}: it must be positive")
    options.steps = list(steps)
    if options.only is not None:
        wanted = options.only.split(",")
        unknown = [name for name in wanted if name not in names]
        if unknown:
            parser.error(f"--only {options.only}: there is no step {unknown[0]!r}; there are {', '.join(names)}")
        options.steps = [step for step in steps if step.name in wanted]
    if options.out is None:
        options.out = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "runs" / "gpu"
    return options


def plan(steps: Sequence[Step], budget_s: float) -> str:
    """The steps as they would run."""
    lines = [f"{len(steps)} steps, {budget_s:.0f} s together at most:"]
    for step in steps:
        variables = "".join(f"{key}={value} " for key, value in step.environment.items())
        command = " ".join(step.filled("python", Path(f"{step.name}.out"), step.limit_s))
        lines += [
            f"  {step.name:10s} {step.share_s:4.0f} to {step.limit_s:.0f} s  {step.does}",
            f"  {'':10s}         {variables}{command}",
        ]
    return "\n".join(lines)


def report(
    environment: dict[str, Any],
    outcomes: Sequence[Outcome],
    *,
    problems: Sequence[str],
    seconds: float,
    unfinished: bool = False,
) -> dict[str, Any]:
    """The document; ``unfinished`` where steps are still to come."""
    rows = [row for outcome in outcomes for row in outcome.rows()]
    bad = [row for row in rows if row["verdict"] in (MISSED, FAILED)]
    return {
        "tool": "make gpu",
        "environment": environment,
        "problems": list(problems),
        "seconds": seconds,
        "verdict": UNFINISHED if unfinished else OK if rows and not bad and not problems else FAILED,
        "measures": rows,
        "steps": [
            {
                "name": outcome.step.name,
                "command": list(outcome.step.command),
                "limit_s": outcome.step.limit_s,
                "seconds": outcome.seconds,
                "exit_code": outcome.exit_code,
                "failure": outcome.failure,
                "document": outcome.document,
            }
            for outcome in outcomes
        ],
    }


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Run; returns the exit code."""
    options = parse(arguments, steps)
    start = time.monotonic()
    environment = gpu_environment.examine(sys.executable, ROOT)
    if options.revision is not None and environment["revision"] == "unknown":
        environment["revision"] = f"{options.revision} (as stated)"
    problems = gpu_environment.problems(environment)
    print(gpu_environment.heading(environment))
    for problem in problems:
        print(f"cannot run: {problem}", file=sys.stderr)
    if options.dry_run:
        print(plan(options.steps, options.budget_s))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu.log"
    log.write_text("", encoding="utf-8")
    path = options.out / "gpu.json"
    outcomes: list[Outcome] = []

    def keep(done: list[Outcome], *, unfinished: bool = True) -> dict[str, Any]:
        # Behind every step: whoever ends this run early leaves what was measured so far.
        seconds = time.monotonic() - start
        document = report(environment, done, problems=problems, seconds=seconds, unfinished=unfinished)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, path)
        return document

    def keep_and_show(done: list[Outcome]) -> None:
        rows = [row for row in keep(done)["measures"] if row["step"] == done[-1].step.name]
        if rows:
            print("\n".join("      " + line for line in table(rows).splitlines()), flush=True)

    if not problems:
        keep([])
        # First in line, ahead of an installed paci_rt: what is measured is this folder.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["PYTHONUNBUFFERED"] = "1"
        # CMake looks for nvcc on PATH, and not in CUDA_HOME.
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(Path(environment["nvcc"]["path"]).parent)])
        with tempfile.TemporaryDirectory() as scratch:
            runner = Runner(
                folder=ROOT, scratch=Path(scratch), log=log, python=sys.executable, budget_s=options.budget_s
            )
            outcomes = runner.run(options.steps, after=keep_and_show)
    document = keep(outcomes, unfinished=False)
    if problems:
        print(f"nothing was run; {path} says why", file=sys.stderr)
        return 2
    print(f"\n{gpu_environment.heading(environment)}\n\n{table(document['measures'])}\n")
    print(f"{document['seconds']:.0f} s; {path} and {log}\n{document['verdict']}")
    return 0 if document["verdict"] == OK else 1


if __name__ == "__main__":
    # Ended from outside, it ends its step too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
