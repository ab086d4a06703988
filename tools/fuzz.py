"""Random cases over schedules, simulator, planner, configurations, files, commands and pipelines, as long as wanted.

    python tools/fuzz.py --seconds 3600 --json fuzz.json
    python tools/fuzz.py --only step --seed 7 --cases 500

Every case works, and is right where an oracle knows, or raises a documented error within a limit of time. Prints the
counts, and each kind of failure once, with the case. Exit code 1 where there was one. The native core has a fuzz of
its own, ``tools/fuzz_native.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import fuzz_api
import fuzz_cli
import fuzz_files
import fuzz_schedules
import fuzz_support
from fuzz_support import Target

TARGETS: list[Target] = [
    *fuzz_schedules.TARGETS,
    *fuzz_files.TARGETS,
    *fuzz_cli.TARGETS,
    *fuzz_api.TARGETS,
]
ROUND = 200
"""Cases of a target of cost 1 in one round; dearer ones get fewer."""
MEMORY = 16 << 30


def cases_of(target: Target, amount: int = ROUND) -> int:
    return max(5, int(amount / target.cost))


def run_target(target: Target, cases: int, number: int) -> tuple[int, BaseException | None]:
    """How many cases ran, and how the first bad one ended."""
    ran = 0

    def check(case: Any) -> None:
        nonlocal ran
        ran += 1
        target.check(case)

    options = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed(number)(options(given(target.strategy)(check)))()
    except Exception as error:
        return ran, error
    return ran, None


def describe(error: BaseException) -> list[str]:
    """What went wrong, once for each kind."""
    several = getattr(error, "exceptions", None)  # of an ExceptionGroup
    if several is not None:
        return [line for inner in several for line in describe(inner)]
    case = " ".join(" ".join(getattr(error, "__notes__", [])).split())
    return [f"{type(error).__name__}: {str(error)[:500]} | {case[:1500]}"]


def run(targets: list[Target], *, seconds: float, first_seed: int, cases: int | None) -> dict[str, Any]:
    """Round after round, each with a seed of its own, until the time is up; with ``cases`` one round of so many."""
    begin, number = time.monotonic(), first_seed
    counted: Counter[str] = Counter()
    failures: dict[str, dict[str, Any]] = {}
    while True:
        for target in targets:
            ran, error = run_target(target, cases or cases_of(target), number)
            counted[target.name] += ran
            for text in describe(error) if error is not None else []:
                failures.setdefault(
                    f"{target.name}: {text[:120]}", {"target": target.name, "seed": number, "text": text}
                )
            if cases is None and time.monotonic() - begin > seconds:
                break
        number += 1
        if cases is not None or time.monotonic() - begin > seconds:
            break
    return {
        "seeds": [first_seed, number - 1],
        "seconds": round(time.monotonic() - begin),
        "cases": sum(counted.values()),
        "by_target": dict(counted),
        "calls": dict(sorted(fuzz_support.counts.items())),
        "failures": list(failures.values()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="one round, of so many cases a target")
    parser.add_argument("--only", help="one target: " + ", ".join(target.name for target in TARGETS))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    targets = [target for target in TARGETS if options.only in (None, target.name)]
    found = run(targets, seconds=options.seconds, first_seed=options.seed, cases=options.cases)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
