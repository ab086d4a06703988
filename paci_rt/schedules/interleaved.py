"""1F1B with several chunks of the model on every rank: Narayanan et al., arXiv 2104.04473, section 2.2.

Rank ``r`` of ``P`` runs stages ``r, r + P, r + 2P ...``, so a micro-batch passes every rank ``v`` times and the
bubble shrinks to a ``v``-th, for ``v`` times the messages and more activations. Micro-batches travel in groups of
``P``: a group passes a rank's first chunk, then its second, and backwards in the opposite order.
"""

from __future__ import annotations

import numpy as np

from paci_rt.action import Codes, Op
from paci_rt.schedules.base import Shape, flush_family, weave


def _warm_up(shape: Shape, rank: int) -> int:
    """Forwards, over all chunks, before the first backward's own; with a single chunk those of plain 1F1B."""
    ranks, chunks = shape.ranks, shape.chunks
    ahead = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks if chunks > 1 else ranks - 1 - rank
    return min(ahead, shape.accumulation * chunks)


def _order(shape: Shape, rank: int) -> Codes:
    """Forwards ``k`` and, ``_warm_up`` of them later, backwards ``k``, each a chunk and a micro-batch."""
    ranks, chunks = shape.ranks, shape.chunks
    forward = np.arange(shape.accumulation * chunks + _warm_up(shape, rank))
    backward = forward - _warm_up(shape, rank)

    def micro_batch(k: Codes) -> Codes:
        return k // (ranks * chunks) * ranks + k % ranks

    def stage(chunk: Codes) -> Codes:
        return chunk * ranks + rank

    return weave(
        (Op.F, stage(forward // ranks % chunks), micro_batch(forward), forward < shape.accumulation * chunks),
        (Op.B, stage(chunks - 1 - backward // ranks % chunks), micro_batch(backward), backward >= 0),
    )


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
    takes_chunks=True,
    check=_check,
)
