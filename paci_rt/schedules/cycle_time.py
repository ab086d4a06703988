"""How fast an order that repeats for ever runs, and whether it runs at all.

Every action waits for the one before it on its rank and for what it needs from others, each of the same or of an
earlier round. The time of a round settles to the longest time per round of all closed walks (the maximum cycle ratio,
see :mod:`paci_rt.schedules.slack`). A period is long enough where the starts can be chosen so that none comes before
what it waits for, which is a system of differences: it has a solution unless some walk gains time for ever.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Waits(NamedTuple):
    """``target`` of round ``t`` starts at least ``ticks`` after ``source`` of round ``t - rounds``."""

    source: Ints
    target: Ints
    ticks: Ints
    rounds: Ints


def starts(waits: Waits, nodes: int, period: int) -> Ints | None:
    """The earliest starts with which a round takes ``period``; None where it takes longer."""
    order = np.argsort(waits.target, kind="stable")
    source, target = waits.source[order], waits.target[order]
    delay = (waits.ticks - period * waits.rounds)[order]
    first = np.flatnonzero(np.concatenate(([True], target[1:] != target[:-1])))
    into = target[first]
    start = np.zeros(nodes, dtype=np.int64)
    for _ in range(nodes + 1):
        found = np.maximum(start[into], np.maximum.reduceat(start[source] + delay, first))
        if np.array_equal(found, start[into]):
            return start
        start[into] = found
    return None


def least_period(waits: Waits, nodes: int, low: int, high: int) -> int | None:
    """The shortest period from ``low`` to ``high`` that is long enough; None where ``high`` is not."""
    if starts(waits, nodes, high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        if starts(waits, nodes, middle) is None:
            low = middle + 1
        else:
            high = middle
    return high
