"""The dynamic program over cuts, against all cuts there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from paci_rt.planner.partition import best_partition, least_largest


def partitions(blocks: int, stages: int):
    for cuts in itertools.combinations(range(1, blocks), stages - 1):
        yield tuple(np.diff((0, *cuts, blocks)).tolist())


def costs_of(partition: tuple[int, ...], matrices: list[np.ndarray]) -> list[float]:
    ends = np.cumsum((0, *partition))
    return [matrix[start, end] for matrix, (start, end) in zip(matrices, itertools.pairwise(ends), strict=True)]


def random_matrices(rng: np.random.Generator, blocks: int, stages: int, *, forbidden: float) -> list[np.ndarray]:
    """Uneven blocks, unequal devices, something extra on the outer stages, and runs that a stage may not hold."""
    at = np.arange(blocks + 1)
    matrices = []
    for stage in range(stages):
        sums = np.concatenate(([0.0], np.cumsum(rng.uniform(0.5, 2.0, blocks)))) / rng.uniform(0.5, 2.0)
        matrix = sums[None, :] - sums[:, None] + (rng.uniform(0, 3) if stage in (0, stages - 1) else 0.0)
        barred = (at[None, :] <= at[:, None]) | (rng.random(matrix.shape) < forbidden)
        matrices.append(np.where(barred, np.inf, matrix))
    return matrices


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_is_better(seed):
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(1, 9))
    stages = int(rng.integers(1, blocks + 1))
    matrices = random_matrices(rng, blocks, stages, forbidden=(0.0, 0.1, 0.5)[seed % 3])
    best = min(max(costs_of(cut, matrices)) for cut in partitions(blocks, stages))
    assert least_largest(matrices.__getitem__, stages, blocks) == best
    found = best_partition(matrices.__getitem__, stages, blocks)
    if np.isinf(best):
        assert found is None
        return
    assert found is not None
    assert sum(found) == blocks and len(found) == stages and min(found) >= 1
    assert max(costs_of(found, matrices)) == best
    equals = [costs_of(cut, matrices) for cut in partitions(blocks, stages) if max(costs_of(cut, matrices)) == best]
    squares = min(sum(np.square(costs)) for costs in equals)
    assert sum(np.square(costs_of(found, matrices))) == pytest.approx(squares, rel=1e-4)  # costs are rounded to 1e-6


def equal_blocks(blocks: int, *, last: float = 0.0, stages: int = 1) -> list[np.ndarray]:
    at = np.arange(blocks + 1)
    matrix = np.where(at[None, :] > at[:, None], at[None, :] - at[:, None], np.inf) * 0.1
    return [matrix] * (stages - 1) + [matrix + last]


def test_what_does_not_divide_goes_to_later_stages():
    assert best_partition(equal_blocks(7, stages=3).__getitem__, 3, 7) == (2, 2, 3)


def test_a_dear_last_stage_holds_less():
    assert best_partition(equal_blocks(8, last=0.2, stages=2).__getitem__, 2, 8) == (5, 3)


def test_blocks_that_cost_nothing():
    zero = np.where(np.isinf(equal_blocks(3)[0]), np.inf, 0.0)
    assert best_partition(lambda stage: zero, 2, 3) == (1, 2)
