"""How many tokens must a method get, with its own full learning-rate schedule, to end at the loss where flush ends?

The answer is ``f``, tokens of the method over tokens of flush. Both are run at several lengths, each with the whole
schedule of that length, with the same seeds: the same initial weights and data. Losses are means over the seeds, on
straight lines in log tokens between the lengths. A method that needs more than flush is read where flush ends at N
updates, one that needs less where the method itself ends at N, so nothing is extrapolated.

The interval is a jackknife over the seeds (Miller, "The jackknife - a review", Biometrika 61, 1974): ``f`` is computed
anew without each seed in turn, and the pseudo-values' mean of log f has Student's t with one degree fewer than seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Finals = Mapping[int, Mapping[int, float]]
"""Final held-back loss by updates and seed."""
LADDER = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
"""Lengths of a method's runs over N: two, and one more at a time until one ends at flush's loss."""
FLUSH_LADDER = (1.0, 1.25, 1.5, 2.0)
LEAST_SEEDS = 3

# Student's t, two-sided 95 %, by degrees of freedom (any table of it).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t; above 15 degrees that of 15, which is a little wider than it need be."""
    return _T[min(degrees, len(_T)) - 1]


def lengths(updates: int, ladder: Sequence[float]) -> list[int]:
    """Updates of the runs of a ladder."""
    return [round(updates * share) for share in ladder]


def mean_curve(finals: Finals, seeds: Sequence[int]) -> list[tuple[float, float]]:
    """Log of updates, and the mean loss over ``seeds`` there, from the shortest to the longest run."""
    return [(math.log(at), statistics.fmean(finals[at][seed] for seed in seeds)) for at in sorted(finals)]


def crossing(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a curve first comes down to ``loss``, on straight lines; None where it begins below or never does."""
    if curve[0][1] < loss:
        return None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= loss:
            return x0 if y0 == y1 else x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return curve[0][0] if curve[0][1] == loss else None


def log_factor(method: Finals, flush: Finals, seeds: Sequence[int]) -> float | None:
    """Log of ``f`` by the mean losses of ``seeds``; None where the longest run is too short to tell."""
    mine, theirs = mean_curve(method, seeds), mean_curve(flush, seeds)
    start, theirs_at, mine_at = theirs[0][0], theirs[0][1], mine[0][1]
    if mine_at >= theirs_at:
        found = crossing(mine, theirs_at)
        return None if found is None else found - start
    found = crossing(theirs, mine_at)
    return None if found is None else mine[0][0] - found


@dataclass(frozen=True, kw_only=True)
class Factor:
    """``f`` with its 95 % interval; all None where a run has diverged or none was long enough.

    Attributes:
        f, low, high: of the paired seeds.
        seeds: how many. why: there is no number, in words.
    """

    f: float | None
    low: float | None
    high: float | None
    seeds: int
    why: str = ""


def factor(method: Finals, flush: Finals, seeds: Sequence[int]) -> Factor:
    """``f`` of runs of a method over runs of flush.

    Args:
        method, flush: final losses by updates and seed; a run that diverged has infinity or NaN.
        seeds: at least three, all with a run at every length.
    """
    if len(seeds) < LEAST_SEEDS:
        raise ValueError(f"{len(seeds)} seeds give no interval: use at least {LEAST_SEEDS}")
    for name, finals in (("the method", method), ("flush", flush)):
        wild = [at for at, by_seed in finals.items() if not all(math.isfinite(by_seed[seed]) for seed in seeds)]
        if wild:
            return Factor(f=None, low=None, high=None, seeds=len(seeds), why=f"{name} diverged at {wild[0]} updates")
    whole = log_factor(method, flush, seeds)
    if whole is None:
        longest = max(max(method), max(flush))
        return Factor(f=None, low=None, high=None, seeds=len(seeds), why=f"not there within {longest} updates")
    low, high = jackknife(lambda some: log_factor(method, flush, some), whole, seeds)
    f, low, high = (math.exp(min(value, 700.0)) for value in (whole, low, high))
    return Factor(f=f, low=low, high=high, seeds=len(seeds))


def jackknife(
    statistic: Callable[[Sequence[int]], float | None], whole: float, seeds: Sequence[int]
) -> tuple[float, float]:
    """95 % interval around ``whole``, the statistic of all seeds. Without a bound where it fails without some seed."""
    count = len(seeds)
    without = [statistic([other for other in seeds if other != seed]) for seed in seeds]
    known = [value for value in without if value is not None]
    if len(known) < count:
        return -math.inf, math.inf
    pseudo = [count * whole - (count - 1) * value for value in known]
    half = student_t(count - 1) * statistics.stdev(pseudo) / math.sqrt(count)
    return whole - half, whole + half


def needs_more(method: Finals, flush: Finals, seeds: Sequence[int]) -> str:
    """Whose ladder goes on before ``f`` can be told: ``method``, ``flush``, or neither."""
    values = [loss for finals in (method, flush) for by_seed in finals.values() for loss in by_seed.values()]
    if not all(map(math.isfinite, values)):
        return ""
    some = [[other for other in seeds if other != seed] for seed in seeds]
    for group in (list(seeds), *some):
        if log_factor(method, flush, group) is None:
            above = mean_curve(method, group)[0][1] >= mean_curve(flush, group)[0][1]
            return "method" if above else "flush"
    return ""


def settle(
    finals_of: Callable[[str, Sequence[float]], Finals | None], seeds: Sequence[int]
) -> tuple[Finals, Finals] | None:
    """Runs of the method and of flush, at as many lengths as it takes to tell ``f``, or at all of them.

    Args:
        finals_of: runs ``method`` or ``flush`` at lengths over N, and returns their final losses; None to give up.
        seeds: of all runs.
    """
    ladders = {"method": LADDER, "flush": FLUSH_LADDER}
    rungs = dict.fromkeys(ladders, 2)
    while True:
        mine = finals_of("method", LADDER[: rungs["method"]])
        theirs = finals_of("flush", FLUSH_LADDER[: rungs["flush"]])
        if mine is None or theirs is None:
            return None
        more = needs_more(mine, theirs, seeds)
        if not more or rungs[more] == len(ladders[more]):
            return mine, theirs
        rungs[more] += 1
