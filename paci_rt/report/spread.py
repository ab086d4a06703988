"""How many times as fast, how sure that is, and at which losses it is asked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

STEPS = (0.1, 0.01, 0.001)
MOST_THRESHOLDS = 6
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 97.5 %, for 1, 2, 3 ... degrees of freedom."""
NORMAL_QUANTILE = 1.960


class Point(Protocol):
    """A validation: tokens and seconds of training before it, and its loss in nats per token."""

    @property
    def tokens(self) -> float: ...
    @property
    def elapsed_s(self) -> float: ...
    @property
    def val_loss(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Times of one schedule over those of another, seed by seed.

    Attributes:
        value: geometric mean.
        low, high: where it lies with a confidence of 95 %, by Student's t of its logarithms; None with a single seed.
        seeds: how many there are.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def differs(self) -> bool | None:
        """Whether 1 lies outside; None where a single seed shows no spread."""
        return None if self.low is None or self.high is None else not self.low <= 1 <= self.high

    def text(self) -> str:
        """``1.42 (1.35 to 1.50)``."""
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({_bound(self.low)} to {_bound(self.high)})"

    def words(self) -> str:
        """What can be said of it."""
        if self.differs is None:
            return f"{self.value:.2f} times as fast, in one run each, which shows no spread"
        if not self.differs:
            return f"no difference that {self.seeds} seeds show: {self.text()} times as fast"
        return f"{self.text()} times as fast, over {self.seeds} seeds"


def _bound(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 100 else f"{value:.1g}"


def ratio(mine: Sequence[float | None], other: Sequence[float | None]) -> Ratio | None:
    """``mine[s] / other[s]`` over the seeds ``s``; None unless all of them are there and above 0."""
    pairs = [(a, b) for a, b in zip(mine, other, strict=True) if a is not None and b is not None and a > 0 and b > 0]
    if not pairs or len(pairs) < len(mine):
        return None
    logs = [math.log(a / b) for a, b in pairs]
    middle = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(value=math.exp(middle), low=None, high=None, seeds=1)
    freedom = len(logs) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else NORMAL_QUANTILE
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(max(-700.0, middle - half)), math.exp(min(700.0, middle + half))
    return Ratio(value=math.exp(middle), low=low, high=high, seeds=len(logs))


def thresholds(first: Sequence[float], last: Sequence[float]) -> tuple[float, ...]:
    """Losses at which runs are compared where nobody named any, the highest first.

    They are round numbers, so that no run's noise chooses them: the lowest multiples of 0.1 that every run has come
    down to (of 0.01, or 0.001, where the runs came down by less).

    Args:
        first, last: losses that the runs began and ended with, finite.
    """
    top, bottom = min(first), max(last)
    for step in STEPS:
        lowest = math.ceil(round(bottom / step, 6))
        found = [at * step for at in range(lowest, lowest + MOST_THRESHOLDS) if at * step < top]
        if found:
            return tuple(round(value, 3) for value in reversed(found))
    return (bottom,)


def first_reached(evals: Sequence[Point], target: float | None) -> tuple[float | None, float | None]:
    """Tokens and seconds at which the loss first was ``target``, on straight lines between validations."""
    if target is None:
        return None, None
    before: Point | None = None
    for point in evals:
        if point.val_loss <= target:
            if before is None or not math.isfinite(before.val_loss):
                return float(point.tokens), point.elapsed_s
            share = (before.val_loss - target) / (before.val_loss - point.val_loss)
            return (
                before.tokens + share * (point.tokens - before.tokens),
                before.elapsed_s + share * (point.elapsed_s - before.elapsed_s),
            )
        before = point
    return None, None


def median(values: Sequence[float | None]) -> float | None:
    """None unless all values are there."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None
