"""Chooses the tests that are left out of quicker runs, from how long each of them took.

    make test-all PYTEST_ARGS="--durations=0 --durations-min=0.1 -vv" | tee test.log
    python tools/slow_tests.py test.log

Writes ``tests/slow.txt``, which ``-m "not slow"`` leaves out beside the tests with that mark, and ``tests/long.txt``,
which ``make test`` leaves out: the longest tests, as many as it takes for the rest to stay within so many seconds of
work. Every function keeps its quickest case, unless that alone takes too long.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
TABLES = {"slow": (60.0, 1.0), "long": (700.0, 10.0)}
"""Seconds of work that stay, and from how many on not even the quickest case of a function does."""
UNTIMED_S = 0.02
"""What a test takes, roughly, that is too quick for the list of durations."""


def durations(lines: Iterable[str]) -> dict[str, float]:
    """Seconds by test: its call, and its own part of the set-up."""
    found: dict[str, float] = defaultdict(float)
    for line in lines:
        match = re.match(r"([\d.]+)s (call|setup|teardown) +(.+?)\s*$", line)
        if match:
            found[match[3]] += float(match[1])
    return found


def choose(seconds: dict[str, float], rest_s: float, too_long_s: float) -> list[str]:
    """The tests to leave out, longest first, until the others take no more than ``rest_s``."""
    quickest: dict[str, str] = {}
    for name in sorted(seconds, key=lambda name: seconds[name]):
        quickest.setdefault(name.partition("[")[0], name)
    kept = set(quickest.values())
    left, chosen = sum(seconds.values()), []
    for name in sorted(seconds, key=lambda name: (name in kept and seconds[name] < too_long_s, -seconds[name])):
        if left <= rest_s:
            break
        chosen.append(name)
        left -= seconds[name]
    return sorted(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="output of pytest with --durations=0")
    args = parser.parse_args()
    seconds = durations(args.log.read_text(encoding="utf-8").splitlines())
    if not seconds:
        raise SystemExit(f"{args.log} has no durations: run pytest with --durations=0 --durations-min=0.1 -vv")
    for mark, (rest_s, too_long_s) in TABLES.items():
        chosen = choose(seconds, rest_s, too_long_s)
        (TESTS / f"{mark}.txt").write_text("".join(name + "\n" for name in chosen), encoding="utf-8")
        left = sum(seconds.values()) - sum(seconds[name] for name in chosen)
        print(f"{len(chosen)} tests are {mark}; those that were timed and stay take {left:.0f} s of work")


if __name__ == "__main__":
    main()
