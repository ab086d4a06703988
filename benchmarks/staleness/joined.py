"""Stages that join windows, so that no delay exceeds one of a stage's own updates.

A stage that would see more than one update between a forward and its backward updates less often, with the gradients
of several windows together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import paci_rt
from paci_rt.optim.stage_optimizer import StageOptimizer, UpdateStats
from paci_rt.weights.base import StageWeights
from paci_rt.weights.lookahead import LookAhead


def windows_joined(behind: int, accumulation: int) -> int:
    """How many windows a stage with ``behind`` stages after it takes together: ``ceil(behind / accumulation)``."""
    return max(1, -(-behind // accumulation))


class _JoinedUpdates:
    """Passes on every ``joined``-th update; until then the sums go on filling."""

    def __init__(self, bound: StageOptimizer, joined: int) -> None:
        self._bound, self._joined, self._windows = bound, joined, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bound, name)

    def update(self, divisor: int, prepare: Callable[[], None]) -> UpdateStats:
        self._windows += 1
        if self._windows % self._joined:
            prepare()
            return UpdateStats(grad_norm=0.0, nonfinite=0)
        return self._bound.update(divisor * self._joined, prepare)


class _JoinedWeights(StageWeights):
    """Look-ahead in units of joined windows."""

    def __init__(self, bound: StageOptimizer, joined: int, accumulation: int) -> None:
        total = joined * accumulation
        self._look_ahead = LookAhead(bound, accumulation=total, divisor=total, shares=False)
        self._joined, self._micro_batches = joined, 0

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        updates = window // self._joined - current // self._joined
        return current, self._look_ahead.ahead(updates, self._micro_batches) if updates > 0 else nullcontext()

    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        self._micro_batches += 1
        return current, nullcontext()

    def begin_update(self, current: int) -> None:
        if (current + 1) % self._joined == 0:
            self._micro_batches = 0


def join_windows(pipeline: paci_rt.LocalPipeline, bounds: list[StageOptimizer], accumulation: int) -> None:
    """Make every stage of a pipeline that has just been built join as many windows as its delay asks for."""
    for stage, runtime in pipeline._executor.runtimes.items():
        joined = windows_joined(len(bounds) - 1 - stage, accumulation)
        if joined > 1:
            runtime.optimizer = _JoinedUpdates(bounds[stage], joined)  # type: ignore[assignment]
            runtime.guard = None  # it judges single windows
            runtime.weights = _JoinedWeights(bounds[stage], joined, accumulation)
