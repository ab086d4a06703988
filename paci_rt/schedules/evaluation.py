"""Evaluation among training: where its forwards stand in a window, so that no stage waits for them or because of them.

Every stage runs them at the same place in the order of its forwards, hence in the same order on every channel, and the
order of all other actions stays. Before forward number ``x`` of a window, a stage of an asynchronous schedule has
updated by the windows before once ``x`` is at least its warm-up, and not by this one as long as ``x`` is less than the
accumulation. So at ``x = most_ahead`` all stages have the weights that a drain would give them, where the accumulation
is larger than that; where it is not, they differ by at most the drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paci_rt.action import Action, Op
from paci_rt.schedules.base import Shape
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.validate import play_streams

_AMONG = {Op.F: Op.E, Op.SEND_F: Op.SEND_E, Op.RECV_F: Op.RECV_E}


def goes_among(shape: Shape, *, flush: bool) -> bool:
    """Whether evaluations can travel among training: not where a rank's later piece is behind its earlier one, so that
    the same place in the order of both pieces' forwards is in different windows of the rank."""
    return flush or shape.chunks == 1


def evaluation_forwards(lowering: Lowering, rank: int, first: int, count: int) -> list[Action]:
    """``count`` forwards of every stage of ``rank`` and their messages, numbered from ``first``."""
    return [replace(one, op=_AMONG[one.op]) for one in lowering.forward_only(rank, first, count)]


def with_evaluation(lowering: Lowering, window: Sequence[Action], k: int, forwards: Sequence[Action]) -> list[Action]:
    """What a rank does in window ``k``, with the ``forwards`` of an evaluation of the weights before it among them."""
    shape = lowering.shape
    if lowering.family.flush:  # which is empty now; a tied weight's copy may only come with the next forward
        due = [one for one in window if one.op is Op.RECV_TW]
        return [*due, *forwards, *(one for one in window if one.op is not Op.RECV_TW)]
    micro_batch = k * shape.accumulation + min(shape.most_ahead, shape.accumulation - 1)
    at = next(at for at, one in enumerate(window) if one.index == micro_batch and one.op in (Op.RECV_F, Op.F))
    return [*window[:at], *forwards, *window[at:]]


def prove(lowering: Lowering, count: int, capacity: int | None) -> None:
    """Play windows with ``count`` forwards of an evaluation in each, over channels of ``capacity`` messages.

    Raises:
        ScheduleError: they cannot run to their end: the channels are too small for so much slack.
    """
    shape = lowering.shape
    windows = 2 + -(-2 * (1 + shape.most_ahead) // shape.accumulation)
    streams = []
    for rank in range(shape.ranks):
        stream: list[Action] = []
        for k in range(windows):
            forwards = evaluation_forwards(lowering, rank, k * count, count)
            stream += with_evaluation(lowering, lowering.window(rank, k, 0), k, forwards)
        streams.append(stream + lowering.drain(rank, 0, windows))
    play_streams(streams, lowering, capacity)


def sees_weights_of_a_drain(lowering: Lowering) -> bool:
    """Whether all stages have the weights that they would have after a drain."""
    return lowering.family.flush or lowering.shape.accumulation > lowering.shape.most_ahead
