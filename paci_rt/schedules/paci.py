"""Asynchronous 1F1B with windowed local updates: PACI, arXiv 2606.07881.

Stage ``i`` runs ``w = P-1-i`` forwards ahead, and those of its slack (:mod:`paci_rt.schedules.slack`), then alternates
F and B for ever. The backward that completes a window is followed at once by a local update; nothing is flushed,
stashed or told to anyone. Between the forward and the backward of a micro-batch lie exactly ``w`` other backwards,
hence at most ``ceil(w / a)`` updates.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from paci_rt.action import Codes, Op
from paci_rt.schedules.base import ScheduleFamily, Shape, weave

Column = tuple[Op, int, Codes, Any]


def _backwards(shape: Shape, stage: int, m: Codes, has: Any, ops: tuple[Op, ...]) -> list[Column]:
    """Columns of backwards, and of the updates after those that complete a window."""
    update = (Op.U, stage, m // shape.accumulation, has & ((m + 1) % shape.accumulation == 0))
    return [*((op, stage, m, has) for op in ops), update]


def _windows(shape: Shape, stage: int, first: int, end: int, start: int, *, ops: tuple[Op, ...] = (Op.B,)) -> Codes:
    m = shape.micro_batches(first, end)
    back = m - shape.warm_up(stage)
    has = back >= start * shape.accumulation
    return weave((Op.F, stage, m, True), *_backwards(shape, stage, back, has, ops))


def _drain(shape: Shape, stage: int, start: int, end: int, *, ops: tuple[Op, ...] = (Op.B,)) -> Codes:
    m = shape.micro_batches(start, end)
    has = m >= end * shape.accumulation - shape.warm_up(stage)
    return weave(*_backwards(shape, stage, m, has, ops))


def _drift_bound(shape: Shape, stage: int) -> int:
    return -(-shape.warm_up(stage) // shape.accumulation)


PACI = ScheduleFamily(
    name="paci",
    flush=False,
    windows=_windows,
    drain=_drain,
    drift_bound=_drift_bound,
    in_flight_bound=lambda shape, stage: shape.warm_up(stage) + 1,
    policies=("bounded", "stash", "2bw", "predict", "recompute"),
    takes_slack=True,
    looks_ahead=True,
)

# Each backward as I and W: the gradient leaves after I, and has as long as W takes to get to the stage before.
PACI_SPLIT = replace(
    PACI,
    name="paci-split",
    windows=partial(_windows, ops=(Op.I, Op.W)),
    drain=partial(_drain, ops=(Op.I, Op.W)),
    split=True,
)

# Update after every backward: the same order with windows of a single micro-batch.
ASYNC_1F1B = replace(PACI, name="async-1f1b", one_micro_batch_windows=True, looks_ahead=False)
