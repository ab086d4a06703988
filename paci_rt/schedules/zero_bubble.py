"""Zero-bubble schedules written by hand: the backward comes as I and W, and W fills what would be bubbles.

Zero Bubble Pipeline Parallelism: Qi et al., arXiv 2401.10241. ``zb-h1`` keeps the memory of 1F1B and a third of its
bubble; ``zb-h2`` runs twice as many forwards ahead and, where F, I and W take equally long, has no bubble at all.
"""

from __future__ import annotations

from paci_rt.action import Codes, Op
from paci_rt.schedules.base import Shape, column, flush_family, join, weave


def hand_written(shape: Shape, stage: int, ahead: int) -> Codes:
    """``ahead * (P-1-stage)`` forwards, then F, I and the W of ``ahead * stage`` micro-batches ago; last the Ws left.

    Every stage is thus ``ahead * (P-1)`` micro-batches from its first F to its first W.

    Args:
        ahead: 1 for ``zb-h1``, 2 for ``zb-h2``.
    """
    m = shape.micro_batches(0, 1)
    warm_up = min(ahead * (shape.num_stages - 1 - stage), shape.accumulation)
    late = min(ahead * stage, shape.accumulation)
    rows = weave(
        (Op.F, stage, m + warm_up, m + warm_up < shape.accumulation),
        (Op.I, stage, m, True),
        (Op.W, stage, m - late, m >= late),
    )
    return join(column(Op.F, stage, m[:warm_up]), rows, column(Op.W, stage, m[shape.accumulation - late :]))


ZB_H1 = flush_family(
    "zb-h1",
    lambda shape, stage: hand_written(shape, stage, 1),
    lambda shape, stage: min(shape.num_stages - stage, shape.accumulation),
    split=True,
)

ZB_H2 = flush_family(
    "zb-h2",
    lambda shape, stage: hand_written(shape, stage, 2),
    lambda shape, stage: min(2 * (shape.num_stages - stage) - 1, shape.accumulation),
    split=True,
)
