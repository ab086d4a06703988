"""Synchronous schedules: the pipeline empties before every update, so no weight ever drifts.

GPipe: Huang et al., arXiv 1811.06965. 1F1B with flush: Narayanan et al., arXiv 2006.09503 (PipeDream-Flush).
"""

from __future__ import annotations

from paci_rt.action import Action, Op
from paci_rt.schedules.base import ScheduleFamily, Shape


def _flush(shape: Shape, stage: int, k: int, warm_up: int) -> list[Action]:
    """``warm_up`` forwards, then B,F pairs while forwards remain, then the remaining backwards, then the update."""
    first, last = k * shape.accumulation, (k + 1) * shape.accumulation
    forwards = [Action(stage, Op.F, m) for m in range(first, last)]
    backwards = [Action(stage, Op.B, m) for m in range(first, last)]
    actions = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        actions += [backward, forward]
    actions += backwards[len(forwards) - warm_up :]
    return [*actions, Action(stage, Op.U, k)]


def _one_f_one_b(shape: Shape, stage: int, k: int, _start: int) -> list[Action]:
    return _flush(shape, stage, k, min(shape.num_stages - stage, shape.accumulation))


def _gpipe(shape: Shape, stage: int, k: int, _start: int) -> list[Action]:
    return _flush(shape, stage, k, shape.accumulation)


def _nothing(_shape: Shape, _stage: int, _start: int, _end: int) -> list[Action]:
    return []


ONE_F_ONE_B = ScheduleFamily(
    name="1f1b",
    flush=True,
    window=_one_f_one_b,
    drain=_nothing,
    drift_bound=lambda shape, stage: 0,
    in_flight_bound=lambda shape, stage: min(shape.num_stages - stage, shape.accumulation),
)

GPIPE = ScheduleFamily(
    name="gpipe",
    flush=True,
    window=_gpipe,
    drain=_nothing,
    drift_bound=lambda shape, stage: 0,
    in_flight_bound=lambda shape, stage: shape.accumulation,
)
