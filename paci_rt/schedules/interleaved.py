"""Schedules with several chunks of the model on every rank: rank ``r`` of ``P`` runs stages ``r, r + P, r + 2P ...``.

A micro-batch thus passes every rank ``v`` times. ``interleaved-1f1b`` (Narayanan et al., arXiv 2104.04473, section 2.2)
shrinks 1F1B's bubble to a ``v``-th, for ``v`` times the messages and more activations: micro-batches travel in groups
of ``P``; a group passes a rank's first chunk, then its second, and backwards in the opposite order. ``interleaved-zb``
splits those backwards into I and W as ``zb-h1`` does (Qi et al., arXiv 2401.10241), which halves the warm-up and fills
its end with W. ``looped-bfs`` goes breadth first (Lamy-Poirier, arXiv 2211.05953): a chunk's forwards of all
micro-batches come before the next chunk's, so it keeps all activations of a window, as ``gpipe`` does.
"""

from __future__ import annotations

import numpy as np

from paci_rt.action import Codes, Op
from paci_rt.schedules.base import Shape, column, flush_family, join, weave
from paci_rt.schedules.placement import CIRCLE


def _passes(shape: Shape, rank: int, group: int, k: Codes) -> tuple[Codes, Codes, Codes]:
    """Stage of the forward ``k``-th in turn on ``rank``, stage of the backward ``k``-th in turn, and the micro-batch of
    either, where micro-batches travel in groups of ``group``."""
    chunk = k // group % shape.chunks
    stage = chunk * shape.ranks + rank
    back = (shape.chunks - 1 - chunk) * shape.ranks + rank
    return stage, back, k // (group * shape.chunks) * group + k % group


def _warm_up(shape: Shape, rank: int) -> int:
    """Forwards, over all chunks, before the first backward's own; with a single chunk those of plain 1F1B."""
    ranks, chunks = shape.ranks, shape.chunks
    ahead = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks if chunks > 1 else ranks - 1 - rank
    return min(ahead, shape.accumulation * chunks)


def _order(shape: Shape, rank: int) -> Codes:
    """Forwards ``k`` and, ``_warm_up`` of them later, backwards ``k``, each a chunk and a micro-batch."""
    count, ahead = shape.accumulation * shape.chunks, _warm_up(shape, rank)
    forward = np.arange(count + ahead)
    backward = forward - ahead
    stage, _, f = _passes(shape, rank, shape.ranks, forward)
    _, back, b = _passes(shape, rank, shape.ranks, backward)
    return weave((Op.F, stage, f, forward < count), (Op.B, back, b, backward >= 0))


def _check(shape: Shape) -> None:
    if shape.accumulation % shape.ranks:
        below = shape.accumulation - shape.accumulation % shape.ranks
        near = f"{below} or {below + shape.ranks}" if below else f"{shape.ranks}"
        raise ValueError(
            f"accumulation is {shape.accumulation}: interleaved-1f1b moves micro-batches in groups of the "
            f"{shape.ranks} ranks, so give a multiple of {shape.ranks}, for example {near}"
        )


INTERLEAVED_1F1B = flush_family(
    "interleaved-1f1b",
    _order,
    lambda shape, rank: min(_warm_up(shape, rank) + 1, shape.accumulation * shape.chunks),
    placement=CIRCLE,
    check=_check,
)


def _rounds(shape: Shape) -> int:
    """Groups that the micro-batches of a window travel in: of ``P`` or a few more each, or one of fewer."""
    return max(1, shape.accumulation // shape.ranks)


def _split_warm_up(shape: Shape, rank: int) -> int:
    """Forwards before the first I's own. I goes on to the rank before without its W, so one a hop is enough."""
    ahead = (shape.chunks - 1) * (shape.accumulation // _rounds(shape)) + shape.ranks - 1 - rank
    return min(ahead, shape.accumulation * shape.chunks)


def _split_order(shape: Shape, rank: int) -> Codes:
    """Forwards ``k``, ``_split_warm_up`` of them later I ``k``, and ``rank`` of those later W ``k``."""
    count, group = shape.accumulation * shape.chunks, shape.accumulation // _rounds(shape)
    ahead, late = _split_warm_up(shape, rank), min(rank, shape.accumulation * shape.chunks)
    forward = np.arange(count + ahead + late)
    back, weight = forward - ahead, forward - ahead - late
    f_stage, _, f = _passes(shape, rank, group, forward)
    _, i_stage, i = _passes(shape, rank, group, back)
    _, w_stage, w = _passes(shape, rank, group, weight)
    return weave(
        (Op.F, f_stage, f, forward < count),
        (Op.I, i_stage, i, (back >= 0) & (back < count)),
        (Op.W, w_stage, w, weight >= 0),
    )


def _check_split(shape: Shape) -> None:
    rounds = _rounds(shape)
    if shape.accumulation % rounds:
        below = shape.accumulation - shape.accumulation % rounds
        raise ValueError(
            f"accumulation is {shape.accumulation}: interleaved-zb moves micro-batches in {rounds} groups, one for "
            f"each {shape.ranks} of them, so give a multiple of {rounds}, for example {below} or {below + rounds}"
        )


INTERLEAVED_ZB = flush_family(
    "interleaved-zb",
    _split_order,
    lambda shape, rank: min(_split_warm_up(shape, rank) + 1, shape.accumulation * shape.chunks),
    placement=CIRCLE,
    split=True,
    check=_check_split,
)


def _breadth_first(shape: Shape, rank: int) -> Codes:
    """A chunk's forwards of all micro-batches, then the next chunk's; then so the backwards, the last chunk first."""
    m = np.arange(shape.accumulation)
    forwards = [column(Op.F, stage, m) for stage in shape.stages_of(rank)]
    backwards = [column(Op.B, stage, m) for stage in reversed(shape.stages_of(rank))]
    return join(*forwards, *backwards)


LOOPED_BFS = flush_family(
    "looped-bfs",
    _breadth_first,
    lambda shape, rank: shape.accumulation * shape.chunks,
    placement=CIRCLE,
)
