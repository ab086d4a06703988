"""Flushed schedules in a V that fill bubbles with W: ``zb-v`` and ``dualpipe-v``.

Rank ``r`` of ``P`` holds the upper stage ``r`` and the lower stage ``2P-1-r``. ``zb-v`` (Qi et al., arXiv 2405.15362)
has no bubble where F, I and W take equally long, with the activations of 1F1B's first rank on every rank.
``dualpipe-v`` (DeepSeek-AI, arXiv 2412.19437, cut in half) pairs the forward of one micro-batch with the backward of
another. On GPUs that pair can hide its messages; here its two halves run one after the other, and each backward comes
as I and W at once, so that its gradient leaves before W. Both run in the orders of torch's schedules of that name.

Those orders are meant for ``2P-1`` micro-batches or more (``dualpipe-v``: ``2P``). With fewer, what the missing ones
would do is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from paci_rt.action import OPS, Codes, Op, decode_fields
from paci_rt.schedules.base import ScheduleFamily, Shape, column, flush_family, join, weave
from paci_rt.schedules.placement import V

Orders = tuple[Codes, ...]
"""By rank, of one window, without updates."""


def v_family(
    name: str, orders: Callable[[int, int], Orders], check: Callable[[Shape], None] = lambda shape: None
) -> ScheduleFamily:
    """A flushed schedule in a V from its ``orders`` for so many ranks and micro-batches."""
    kept = lru_cache(maxsize=32)(orders)

    @lru_cache(maxsize=4096)
    def peak(ranks: int, micro_batches: int, rank: int) -> int:
        op = decode_fields(kept(ranks, micro_batches)[rank])[1]
        change = np.where(op == OPS.index(Op.F), 1, np.where(op == OPS.index(Op.I), -1, 0))
        return int(np.cumsum(change).max())

    return flush_family(
        name,
        lambda shape, rank: kept(shape.ranks, shape.accumulation)[rank],
        lambda shape, rank: peak(shape.ranks, shape.accumulation, rank),
        placement=V,
        split=True,
        check=check,
    )


def _within(order: Codes, micro_batches: int) -> Codes:
    """``order`` without the micro-batches that there are not."""
    return order[decode_fields(order)[2] < micro_batches]


def _zb_v(ranks: int, micro_batches: int) -> Orders:
    return tuple(_zb_v_rank(ranks, micro_batches, rank) for rank in range(ranks))


def _zb_v_rank(ranks: int, micro_batches: int, rank: int) -> Codes:
    """Fill the V down and up, then one F, I and W of either stage in turn, and last I before W."""
    m, upper, lower = max(micro_batches, 2 * ranks - 1), rank, 2 * ranks - 1 - rank
    behind, steady = ranks - rank, np.arange(m - ranks)
    j, k = np.arange(rank), np.arange(behind)
    first, left = 2 * behind - 1, m - ranks  # F of the upper stage before the lower's first; its I in the steady part
    order = join(
        column(Op.F, upper, np.arange(first)),
        weave((Op.F, lower, j, True), (Op.F, upper, first + j, True)),
        weave((Op.F, lower, rank + k, True), (Op.I, lower, k, True), (Op.W, lower, k, True)),
        weave(
            (Op.F, upper, first + rank + steady, first + rank + steady < m),
            *((op, upper, steady, True) for op in (Op.I, Op.W)),
            (Op.F, lower, ranks + steady, True),
            *((op, lower, behind + steady, True) for op in (Op.I, Op.W)),
        ),
        weave((Op.I, upper, left + j, True), (Op.I, lower, m - rank + j, True)),
        weave((Op.I, upper, left + rank + k, True), (Op.W, upper, left + k, True)),
        column(Op.W, lower, m - rank + j),
        column(Op.W, upper, m - rank + j),
    )
    return _within(order, micro_batches)


def _dualpipe_v(ranks: int, micro_batches: int) -> Orders:
    return tuple(_dualpipe_v_rank(ranks, micro_batches, rank) for rank in range(ranks))


def _dualpipe_v_rank(ranks: int, micro_batches: int, rank: int) -> Codes:
    """Fill the V, then F of one stage beside the backward of the other in turn; the last backwards put W off."""
    m, upper, lower = max(micro_batches, 2 * ranks), rank, 2 * ranks - 1 - rank
    below, paired = ranks - 1 - rank, m - 2 * ranks + rank + 1
    j, k, pairs = np.arange(rank + 1), np.arange(below), np.arange(paired)

    def backward(stage: int, index: Codes) -> tuple[tuple[Op, int, Codes, bool], ...]:
        return tuple((op, stage, index, True) for op in (Op.I, Op.W))

    # Of the last rank + 1 backwards of the lower stage and as many of the upper one, half put W off.
    whole_lower, whole_upper = (rank + 1) // 2 + (rank + 1) % 2, (rank + 1) // 2
    last_lower, last_upper = m - 1 - rank + j, m - ranks + j
    put_off = weave(
        (Op.I, lower, last_lower, True),
        (Op.W, lower, last_lower, j < whole_lower),
        (Op.I, upper, last_upper, True),
        (Op.W, upper, last_upper, j < whole_upper),
    )
    waiting = weave((Op.W, lower, last_lower, j >= whole_lower), (Op.W, upper, last_upper, j >= whole_upper))
    if whole_lower > whole_upper:  # the upper stage puts off first
        waiting = weave(
            (Op.W, upper, last_upper, j >= whole_upper),
            (Op.W, lower, last_lower + 1, (j >= whole_lower - 1) & (last_lower + 1 < m)),
        )
    late = m - ranks + rank + 1 + k  # of the upper stage; one W comes before each
    waiting = join(waiting, column(Op.W, upper, late))
    ends = join(*(join(waiting[at : at + 1], column(Op.I, upper, late[at : at + 1])) for at in k), waiting[below:])
    order = join(
        column(Op.F, upper, np.arange(2 * below)),
        weave((Op.F, upper, 2 * below + j, True), (Op.F, lower, j, True)),
        weave(*backward(lower, k), (Op.F, lower, rank + 1 + k, True)),
        weave(
            (Op.F, upper, 2 * ranks - 1 - rank + pairs, True),
            *backward(lower, below + pairs),
            (Op.F, lower, ranks + pairs, True),
            *backward(upper, pairs),
        ),
        weave(
            *backward(lower, below + paired + k), (Op.F, lower, ranks + paired + k, True), *backward(upper, paired + k)
        ),
        put_off,
        ends,
    )
    return _within(order, micro_batches)


ZB_V = v_family("zb-v", _zb_v)
DUALPIPE_V = v_family("dualpipe-v", _dualpipe_v)
