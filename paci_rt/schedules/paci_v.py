"""``paci-v``: never flushed, with stages in a V, in an order that is searched for the costs and an activation limit.

Rank ``r`` of ``P`` holds stages ``r`` and ``2P-1-r``. It repeats a round (:mod:`paci_rt.schedules.v_order`) for ever:
round ``t`` runs F of its first stage for micro-batch ``t``, and every other action for an earlier one. What would work
on micro-batches before the first, or after the last, is left out, so that filling and draining hold no more than the
rounds between them. The W that completes a stage's window is followed at once by that stage's local update.

Between the F of a micro-batch and its own W come ``e`` other W of that stage, the same number in every round, hence at
most ``ceil(e / a)`` updates. W of a stage and I of it take turns, so no gradient of the next window is there before the
update. Between F and I there are at most as many updates.
"""

from __future__ import annotations

import numpy as np

from paci_rt.action import Codes, Op
from paci_rt.schedules import v_search
from paci_rt.schedules.base import ScheduleFamily, Shape, weave
from paci_rt.schedules.placement import V
from paci_rt.schedules.v_order import VOrder


def order(shape: Shape) -> VOrder:
    """What every rank repeats."""
    return v_search.find(shape.ranks, shape.costs, shape.activation_limit).order


def _rounds(shape: Shape, rank: int, rounds: Codes, start: int, end: int) -> Codes:
    """What ``rank`` does in ``rounds`` for the micro-batches of windows ``start ... end - 1``."""
    columns = []
    for op, piece, behind in order(shape).rounds[rank]:
        m = rounds - behind
        has = (m >= start * shape.accumulation) & (m < end * shape.accumulation)
        columns.append((Op(op), piece, m, has))
        if op == "W":
            columns.append((Op.U, piece, m // shape.accumulation, has & ((m + 1) % shape.accumulation == 0)))
    return weave(*columns)


def _windows(shape: Shape, rank: int, first: int, end: int, start: int) -> Codes:
    return _rounds(shape, rank, shape.micro_batches(first, end), start, end)


def _drain(shape: Shape, rank: int, start: int, end: int) -> Codes:
    late = np.arange(order(shape).most_behind(rank))
    return _rounds(shape, rank, end * shape.accumulation + late, start, end)


def early(shape: Shape, stage: int) -> int:
    """Forwards that ``stage`` runs ahead of its weight gradients: ``e`` above."""
    return order(shape).early(stage)


def _drift_bound(shape: Shape, rank: int) -> int:
    return -(-max(early(shape, stage) for stage in shape.stages_of(rank)) // shape.accumulation)


def _check(shape: Shape) -> None:
    v_search.check(shape.ranks, shape.costs, shape.activation_limit)


PACI_V = ScheduleFamily(
    name="paci-v",
    flush=False,
    windows=_windows,
    drain=_drain,
    drift_bound=_drift_bound,
    in_flight_bound=lambda shape, rank: order(shape).in_flight(rank),
    policies=("bounded", "stash", "2bw", "predict", "recompute"),
    placement=V,
    takes_costs=True,
    takes_activation_limit=True,
    split=True,
    looks_ahead=True,
    early=early,
    check=_check,
)
