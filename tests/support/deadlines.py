"""Deadlines that grow with the load of the machine: a wait of a test must end, but not because others work here too.

A deadline that a test expects to pass stays as it is; what must not pass, and what something may take at most, goes
through ``deadline``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

MOST = 8.0
"""No deadline grows by more than this: what hangs has to end."""
ROUNDS = 100_000
NOMINAL_S = 0.004
"""What ``ROUNDS`` of an empty loop take on a slow core that does nothing else."""
VALID_S = 5.0

_measured: tuple[float, float] | None = None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slowness() -> float:
    """How much longer than on an idle core a short computation takes now."""
    start = time.perf_counter()
    for _ in range(ROUNDS):
        pass
    return (time.perf_counter() - start) / NOMINAL_S


def factor() -> float:
    """From 1, on an idle machine, to ``MOST``; measured anew every few seconds."""
    global _measured
    if _measured is None or time.monotonic() - _measured[0] > VALID_S:
        crowd = os.getloadavg()[0] / usable_cores()
        _measured = (time.monotonic(), min(MOST, max(1.0, crowd, slowness())))
    return _measured[1]


def deadline(seconds: float) -> float:
    """As many seconds, or more where the machine is busy."""
    return seconds * factor()


def wait_until(done: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until ``done()`` holds; fails with ``what`` when the deadline has passed."""
    end = time.monotonic() + deadline(seconds)
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.02)
