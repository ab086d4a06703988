"""Asynchronous 1F1B with windowed local updates: PACI, arXiv 2606.07881.

Stage ``i`` runs ``w = P-1-i`` forwards ahead, then alternates F and B for ever. The backward that completes a
window is followed at once by a local update; nothing is flushed, stashed or told to anyone. Between the forward
and the backward of a micro-batch lie exactly ``w`` other backwards, hence at most ``ceil(w / a)`` updates.
"""

from __future__ import annotations

from dataclasses import replace

from paci_rt.action import Action, Op
from paci_rt.schedules.base import ScheduleFamily, Shape


def warm_up(shape: Shape, stage: int) -> int:
    """Forwards that ``stage`` runs ahead of its backwards; the last stage never does, whatever the slack."""
    ahead = shape.num_stages - 1 - stage
    return ahead + shape.slack if ahead else 0


def _backward(shape: Shape, stage: int, micro_batch: int) -> list[Action]:
    actions = [Action(stage, Op.B, micro_batch)]
    if (micro_batch + 1) % shape.accumulation == 0:
        actions.append(Action(stage, Op.U, micro_batch // shape.accumulation))
    return actions


def _window(shape: Shape, stage: int, k: int, start: int) -> list[Action]:
    ahead = warm_up(shape, stage)
    actions = []
    for m in range(k * shape.accumulation, (k + 1) * shape.accumulation):
        actions.append(Action(stage, Op.F, m))
        if m - ahead >= start * shape.accumulation:
            actions += _backward(shape, stage, m - ahead)
    return actions


def _drain(shape: Shape, stage: int, start: int, end: int) -> list[Action]:
    first = max(start * shape.accumulation, end * shape.accumulation - warm_up(shape, stage))
    return [action for m in range(first, end * shape.accumulation) for action in _backward(shape, stage, m)]


def _drift_bound(shape: Shape, stage: int) -> int:
    return -(-warm_up(shape, stage) // shape.accumulation)


def _in_flight_bound(shape: Shape, stage: int) -> int:
    return warm_up(shape, stage) + 1


PACI = ScheduleFamily(
    name="paci",
    flush=False,
    window=_window,
    drain=_drain,
    drift_bound=_drift_bound,
    in_flight_bound=_in_flight_bound,
    takes_slack=True,
)

# Update after every backward: the same order with windows of a single micro-batch.
ASYNC_1F1B = replace(PACI, name="async-1f1b", one_micro_batch_windows=True)
