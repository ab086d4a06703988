"""Asynchronous 1F1B with windowed local updates: PACI, arXiv 2606.07881.

Stage ``i`` runs ``w = P-1-i`` forwards ahead, and those of its slack (:mod:`paci_rt.schedules.slack`), then alternates
F and B for ever. The backward that completes a window is followed at once by a local update; nothing is flushed,
stashed or told to anyone. Between the forward and the backward of a micro-batch lie exactly ``w`` other backwards,
hence at most ``ceil(w / a)`` updates.

Where replicas add up a window's sums, its update comes ``overlap`` backwards later, and the sums travel meanwhile. A
gradient then enters weights that are at most ``ceil((w + overlap) / a)`` updates ahead of its forward's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from paci_rt.action import Codes, Op
from paci_rt.schedules.base import ScheduleFamily, Shape, column, join, weave

Column = tuple[Op, int, Codes, Any]


def _backwards(shape: Shape, stage: int, m: Codes, has: Any, start: int, ops: tuple[Op, ...]) -> list[Column]:
    """Columns of backwards, and of the updates after those that complete a window, or ``overlap`` later."""
    done = m - shape.overlap
    ends = has & ((done + 1) % shape.accumulation == 0) & (done >= start * shape.accumulation)
    update = (Op.U, stage, done // shape.accumulation, ends)
    return [*((op, stage, m, has) for op in ops), update]


def _windows(shape: Shape, stage: int, first: int, end: int, start: int, *, ops: tuple[Op, ...] = (Op.B,)) -> Codes:
    m = shape.micro_batches(first, end)
    back = m - shape.warm_up(stage)
    has = back >= start * shape.accumulation
    return weave((Op.F, stage, m, True), *_backwards(shape, stage, back, has, start, ops))


def _drain(shape: Shape, stage: int, start: int, end: int, *, ops: tuple[Op, ...] = (Op.B,)) -> Codes:
    m = shape.micro_batches(start, end)
    has = m >= end * shape.accumulation - shape.warm_up(stage)
    left = weave(*_backwards(shape, stage, m, has, start, ops))
    return join(left, column(Op.U, stage, np.arange(end - 1, end))) if shape.overlap else left


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
    takes_overlap=True,
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
