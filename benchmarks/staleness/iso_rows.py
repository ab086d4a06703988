"""Rows of ``iso_loss.py``: what is told of an ``f``, and rows of a plan that is not complete."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from paci_rt.planner.iso_loss import FLUSH_LADDER, LADDER, LEAST_SEEDS, Factor, Finals, factor, lengths
from staleness.store import Store


def told(found: Factor) -> dict[str, Any]:
    bounds = [None if one is None or not math.isfinite(one) else one for one in (found.f, found.low, found.high)]
    told = dict(zip(("f", "f_low", "f_high"), bounds, strict=True))
    return {**told, "seeds": found.seeds, **({"why": found.why} if found.why else {})}


def means(finals: Finals, seeds: Sequence[int]) -> dict[str, float | None]:
    means = {str(at): statistics.fmean(by_seed[seed] for seed in seeds) for at, by_seed in finals.items()}
    return {at: mean if math.isfinite(mean) else None for at, mean in means.items()}


def compared(mine: Finals, theirs: Finals, seeds: Sequence[int]) -> dict[str, Any]:
    """What a row says of a method's final losses and flush's."""
    found = told(factor(mine, theirs, seeds))
    return {**found, "losses": means(mine, seeds), "flush_losses": means(theirs, seeds)}


def partial_row(
    plan: Any, store: Store, method: str, accumulation: int, rate: float, flush_rate: float
) -> dict[str, Any] | None:
    """A row of the seeds that have method and flush at N and the method's next length that is there; None of fewer
    than three."""
    mine = _there(plan, store, method, accumulation, rate, LADDER)
    theirs = _there(plan, store, "flush", plan.accumulation[0], flush_rate, FLUSH_LADDER)
    at_n = [set(finals.get(plan.updates, {})) for finals in (mine, theirs)]
    longer = [set(by_seed) for at, by_seed in mine.items() if at > plan.updates]
    seeds = sorted(set.intersection(*at_n, max(longer, key=len, default=set())))
    if len(seeds) < LEAST_SEEDS:
        return None
    mine, theirs = (
        {at: by_seed for at, by_seed in finals.items() if set(seeds) <= set(by_seed)} for finals in (mine, theirs)
    )
    names = {"method": method, "accumulation": accumulation, "optimizer": plan.optimizer}
    rates = {"rate": rate, "flush_rate": flush_rate}
    return {**names, **rates, **compared(mine, theirs, seeds), "first_crossing": [], "partial": True}


def _there(plan: Any, store: Store, method: str, accumulation: int, rate: float, ladder: Sequence[float]) -> Any:
    """Final losses of the runs that are there."""
    finals = dict[int, dict[int, float]]()
    for updates in lengths(plan.updates, ladder):
        cases = [plan.case(method, accumulation, rate, seed, updates) for seed in plan.seeds]
        for run in store.of(cases):
            finals.setdefault(updates, {})[run.case.seed] = math.inf if run.diverged else run.curve[-1][1]
    return finals
