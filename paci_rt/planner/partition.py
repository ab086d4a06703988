"""Where to cut a model into stages: an exact dynamic program over contiguous partitions.

The slowest stage decides how fast a full pipeline runs, so its cost is minimised. Among the partitions that
reach that minimum, one with the smallest sum of squared costs is taken, because a flush waits for the others too; and
among those again one whose later stages hold more, because earlier ones have more micro-batches in flight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paci_rt.simulate.costs import Floats

CostOf = Callable[[int], Floats]
"""``cost_of(stage)[i, j]`` is the cost of ``stage`` if it holds blocks ``i ... j - 1``; infinite where it cannot, and
always where it would hold none. Square matrices of one size, ``blocks + 1``."""

_STEPS = 1e6
_TOLERANCE = 1e-9


def least_largest(cost_of: CostOf, stages: int, blocks: int) -> float:
    """The cost of the most expensive stage in the best partition; infinite where none is possible.

    Time ``O(stages * blocks²)``.
    """
    best = np.full(blocks + 1, np.inf)
    best[0] = 0.0
    for stage in range(stages):
        best = np.maximum(best[:, None], cost_of(stage)).min(axis=0)
    return float(best[blocks])


def best_partition(cost_of: CostOf, stages: int, blocks: int) -> tuple[int, ...] | None:
    """Blocks of each stage, so that the most expensive stage is as cheap as possible; None where none is possible."""
    largest = least_largest(cost_of, stages, blocks)
    if not np.isfinite(largest):
        return None
    # Whole numbers, so that partitions that are equally good come out equal to the bit.
    unit = largest / _STEPS if largest else 1.0
    best = np.full(blocks + 1, np.inf)
    best[0] = 0.0
    starts = np.empty((stages, blocks + 1), dtype=np.int64)
    for stage in range(stages):
        cost = cost_of(stage)
        squares = np.where(cost <= largest * (1 + _TOLERANCE), np.rint(cost / unit) ** 2, np.inf)
        total = best[:, None] + squares
        starts[stage] = total.argmin(axis=0)  # the first of equals: this stage holds the most
        best = total.min(axis=0)
    sizes, end = [], blocks
    for stage in reversed(range(stages)):
        start = int(starts[stage, end])
        sizes.append(end - start)
        end = start
    return tuple(reversed(sizes))
