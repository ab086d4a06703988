"""Which order stages in a V repeat for ever: the fastest under a limit of activations.

Without a flush the repeated round *is* the schedule. At full rate the round takes as long as the work of the slowest
rank, and what a rank holds depends only on how long a micro-batch's activations live, which
:mod:`paci_rt.schedules.modulo` makes short. A tighter limit takes a longer round: the period grows from what Little's
law allows, in steps, until an order fits. Its true period, the maximum cycle ratio, is then shorter still.

Times become integers first, and nothing depends on the clock or on the order of a set: all ranks find the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from paci_rt.schedules import limits
from paci_rt.schedules.base import StepCosts
from paci_rt.schedules.cycle_time import least_period
from paci_rt.schedules.modulo import Ints, Times, timetables
from paci_rt.schedules.v_order import VOrder, one_after_another, order_of

MOST_RANKS = 512
MOST_HELD = 1024
"""Activations, in whole stages, up to which full rate is taken without a limit."""
TICKS = 1 << 20
"""What the work of the slowest rank is measured in."""
_FEW, _WIDE, _STATES = 8, 300, 1200
"""Timetables that are kept: so many up to a few ranks, then a number over the ranks, since each rank costs more."""
_COARSE, _FINE, _MISSES = 0.02, 0.004, 4
_MEASURED = 6
_SMALL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Found:
    """An order and what it reaches.

    Attributes:
        order: what is repeated.
        period: of a round, in units of the costs.
        utilization: mean over ranks of work over period.
        activations: pieces in flight on the fullest rank, in whole stages (two pieces each).
        early: forwards that the stage which runs furthest ahead runs before its backwards.

    Example:
        >>> from paci_rt.schedules import StepCosts
        >>> from paci_rt.schedules.v_search import find
        >>> found = find(8, StepCosts())  # 8 ranks, and F = I = W on each of the 16 stages
        >>> found.utilization, found.activations
        (1.0, 3.0)
    """

    order: VOrder
    period: float
    utilization: float
    activations: float
    early: int


def check(ranks: int, costs: StepCosts, activation_limit: float | None) -> None:
    """Raise ValueError for what no order can be searched for."""
    limits.check_integer("ranks", ranks, 1, MOST_RANKS)
    limits.check_activation_limit(activation_limit)
    costs.per_stage(2 * ranks)


def find(ranks: int, costs: StepCosts, activation_limit: float | None = None) -> Found:
    """The fastest order found whose ranks hold at most so many activations.

    Args:
        ranks: ``P``; each holds two stages.
        costs: of the ``2P`` stages.
        activation_limit: in whole stages: ``2 * activation_limit`` pieces between F and I, beside which a stash may
            stand, not more. None is the least with which no time is lost.

    Raises:
        ValueError: numbers out of range; or no limit, and messages that take thousands of rounds.

    Example:
        >>> from paci_rt.schedules import StepCosts
        >>> from paci_rt.schedules.v_search import find
        >>> costs = StepCosts((1.0,), (1.0,), (1.0,), hop=0.06)
        >>> [round(find(8, costs, limit).utilization, 2) for limit in (3.5, 4.5, None)]
        [0.95, 0.98, 1.0]
    """
    check(ranks, costs, activation_limit)
    return _find(ranks, costs.per_stage(2 * ranks), activation_limit)


def ticks_of(costs: StepCosts, ranks: int) -> tuple[Times, float]:
    """Costs of ``2 * ranks`` stages in ticks, and what one tick is in units of the costs."""
    stages = range(2 * ranks)
    whole = [costs.forward[one] + costs.input_grad[one] + costs.weight_grad[one] for one in stages]
    unit = max(max(whole[rank] + whole[-1 - rank] for rank in range(ranks)), costs.hop) / TICKS or 1.0

    def ticks(values: tuple[float, ...]) -> Ints:
        return np.rint(np.array(values) / unit).astype(np.int64)

    # F and I are never 0, so that what needs each other never starts at the same time.
    forward, input_grad = np.maximum(1, ticks(costs.forward)), np.maximum(1, ticks(costs.input_grad))
    return Times(forward, input_grad, ticks(costs.weight_grad), round(costs.hop / unit)), unit


@lru_cache(maxsize=64)
def _find(ranks: int, costs: StepCosts, limit: float | None) -> Found:
    times, unit = ticks_of(costs, ranks)
    shortest = int(times.work().max())
    width = _WIDE if ranks <= _FEW else max(32, min(200, _STATES // ranks))
    found = _at(times, shortest, width, None, costs.stash)
    assert found is not None
    if limit is not None and not _fits(found[1], limit, costs.stash):
        found = _under(times, limit, width, costs.stash)
    period, order = found
    if order.peak() > 2 * MOST_HELD:
        raise ValueError(
            f"messages take so long (hop {costs.hop:g}) that at full rate a rank holds {order.peak() / 2:g} "
            "activations: give an activation_limit"
        )
    work = times.work()
    return Found(
        order=order,
        period=period * unit,
        utilization=float(work.sum() / (period * ranks)),
        activations=order.peak() / 2,
        early=max(order.early(piece) for piece in range(2 * ranks)),
    )


def _fits(order: VOrder, limit: float, stash: float) -> bool:
    most = 2 * limit + _SMALL
    return all(order.in_flight(rank) <= most and order.held(rank, stash) <= most + stash for rank in range(order.ranks))


def _at(times: Times, period: int, width: int, limit: float | None, stash: float) -> tuple[int, VOrder] | None:
    """The best order of a round of at most ``period``, with its true period; None where no order keeps the limit.

    Without a limit that is the one which holds the least.
    """
    tables = timetables(times, period, width)
    in_flight = tables.in_flight(period)
    rows = np.argsort(in_flight, kind="stable")
    if limit is not None:
        rows = rows[in_flight[rows] <= 2 * limit + _SMALL]
    orders = dict.fromkeys(order_of(tables, row, period) for row in rows[: 8 * _MEASURED].tolist())
    fitting = [one for one in orders if one.ties() and (limit is None or _fits(one, limit, stash))]
    fitting.sort(key=lambda one: _preference(one, stash))
    if not fitting:
        return None
    if limit is None:
        return period, fitting[0]
    measured = [(_true_period(one, times, period), one) for one in fitting[:_MEASURED]]
    return min(measured, key=lambda pair: pair[0])


def _preference(order: VOrder, stash: float) -> tuple[float, ...]:
    held = max(round(order.held(rank, stash), 6) for rank in range(order.ranks))
    early = [order.early(piece) for piece in range(2 * order.ranks)]
    return order.peak(), held, max(early), sum(early)


def _true_period(order: VOrder, times: Times, period: int) -> int:
    waits, nodes = order.waits(times), 6 * order.ranks
    found = least_period(waits, nodes, int(times.work().max()), period)
    assert found is not None, "an order slower than its timetable"
    return found


def _periods(times: Times, limit: float) -> Iterator[int]:
    """Periods to try, from the shortest that the limit allows to one that lets each micro-batch end first."""
    shortest, least = int(times.work().max()), little(times)
    period = max(shortest, math.ceil(least / (2 * limit)))
    longest = _longest(times)
    while period < longest:
        yield period
        period = math.ceil(period * (1 + _COARSE))
    yield longest


def _longest(times: Times) -> int:
    """A round in which every micro-batch ends before the next one begins."""
    return int(times.work().sum()) + 4 * times.hop * times.ranks


def little(times: Times) -> int:
    """The sum over both pieces of a rank of the shortest time from their F to their I, on the rank where it is largest.

    Over the period, that is the least number of pieces in flight (Little's law).
    """
    forward, input_grad = times.forward.tolist(), times.input_grad.tolist()
    pieces, most = 2 * times.ranks, 0
    for rank in range(times.ranks):
        total = 0
        for piece in (rank, pieces - 1 - rank):
            hops = pieces - 1 - piece - (piece < times.ranks)  # the turn at the end of the ranks is none
            total += sum(forward[piece:]) + sum(input_grad[piece + 1 :]) + 2 * hops * times.hop
        most = max(most, total)
    return most


def _under(times: Times, limit: float, width: int, stash: float) -> tuple[int, VOrder]:
    """The fastest order under a limit that the one at full rate does not keep."""
    few = max(16, width // 4)
    for period in _periods(times, limit):
        found = _at(times, period, few, limit, stash)
        if found is not None:
            break
    if found is None:  # few timetables are kept, and what fits was not among them
        order = one_after_another(times.ranks)
        found = _true_period(order, times, _longest(times)), order
    shortest, misses, period = int(times.work().max()), 0, found[0]
    while misses < _MISSES and period > shortest:
        period = max(shortest, math.floor(period * (1 - _FINE)))
        better = _at(times, period, width, limit, stash)
        misses = misses + 1 if better is None else 0
        if better is not None and better[0] < found[0]:
            found = better
            period = min(period, better[0])
    return found
