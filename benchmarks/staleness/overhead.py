"""From loss curves to token overhead: how many more tokens a method needs than 1F1B-flush to get as low."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from staleness.run import Run

Curve = Sequence[tuple[int, float]]


def updates_to(curve: Curve, loss: float) -> float | None:
    """Updates after which ``curve`` first comes down to ``loss``, on straight lines between its points.

    None where it never does.
    """
    before: tuple[int, float] | None = None
    for update, value in curve:
        if value <= loss:
            if before is None or before[1] <= loss:
                return float(update)
            return before[0] + (update - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (update, value)
    return None


def best_rate(runs: Iterable[Run]) -> float:
    """The learning rate with the lowest final loss, mean over the seeds that were run at every rate.

    A run that diverged counts as infinitely high.

    Raises:
        ValueError: there are no runs, or no seed was run at every rate.
    """
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for run in runs:
        final = run.curve[-1][1]
        by_rate[run.case.lr][run.case.seed] = math.inf if run.diverged or math.isnan(final) else final
    if not by_rate:
        raise ValueError("there are no runs to choose a learning rate from")
    common = set.intersection(*(set(seeds) for seeds in by_rate.values()))
    if not common:
        raise ValueError(f"no seed was run at all of the learning rates {sorted(by_rate)}: choose them by one seed")
    return min(sorted(by_rate), key=lambda lr: statistics.fmean(by_rate[lr][seed] for seed in common))


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Tokens of a method over those of the baseline, to one threshold, seed by seed.

    Attributes:
        threshold: held-back loss, nats.
        ratios: by seed, without seeds at which the baseline itself never came down to the threshold, or began there.
            Where the method never came down to the threshold, its whole run over the baseline's tokens,
            a lower bound.
        short: seeds at which that happened.
    """

    threshold: float
    ratios: Mapping[int, float]
    short: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Over the seeds; a lower bound if any run fell short, NaN where the baseline gives nothing to compare with."""
        return statistics.fmean(self.ratios.values()) if self.ratios else math.nan

    @property
    def text(self) -> str:
        """Mean and spread, as tables show them."""
        if not self.ratios:
            return "-"
        sign = "> " if self.short else ""
        if len(self.ratios) == 1:
            return f"{sign}{self.mean:.2f}"
        return f"{sign}{self.mean:.2f} ({min(self.ratios.values()):.2f}-{max(self.ratios.values()):.2f})"


def overheads(method: Sequence[Run], baseline: Sequence[Run], thresholds: Sequence[float]) -> list[Overhead]:
    """Overhead of runs at one learning rate over baseline runs at one learning rate, over the seeds of both.

    Raises:
        ValueError: no seed in common.
    """
    mine, theirs = ({run.case.seed: run for run in runs} for runs in (method, baseline))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        raise ValueError("method and baseline have no seed in common")
    found = []
    for threshold in thresholds:
        ratios, short = {}, []
        for seed in seeds:
            needed, base = updates_to(mine[seed].curve, threshold), updates_to(theirs[seed].curve, threshold)
            if not base:
                continue
            if needed is None:
                short.append(seed)
                needed = float(mine[seed].case.updates)
            ratios[seed] = needed / base
        found.append(Overhead(threshold=threshold, ratios=ratios, short=tuple(short)))
    return found
