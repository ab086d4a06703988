"""Synchronous schedules: the pipeline empties before every update, so no weight ever drifts.

GPipe: Huang et al., arXiv 1811.06965. 1F1B with flush: Narayanan et al., arXiv 2006.09503 (PipeDream-Flush).
"""

from __future__ import annotations

import numpy as np

from paci_rt.action import Codes, Op
from paci_rt.schedules.base import Shape, column, flush_family, join, weave


def _flush(shape: Shape, stage: int, ahead: int) -> Codes:
    """``ahead`` forwards, then B,F pairs while forwards remain, then the remaining backwards."""
    m = np.arange(shape.accumulation)
    paired = shape.accumulation - ahead
    pairs = weave((Op.B, stage, m[:paired], True), (Op.F, stage, m[ahead:], True))
    return join(column(Op.F, stage, m[:ahead]), pairs, column(Op.B, stage, m[paired:]))


def _ahead_1f1b(shape: Shape, stage: int) -> int:
    return min(shape.num_stages - stage, shape.accumulation)


GPIPE = flush_family(
    "gpipe",
    lambda shape, stage: _flush(shape, stage, shape.accumulation),
    lambda shape, stage: shape.accumulation,
)

ONE_F_ONE_B = flush_family(
    "1f1b",
    lambda shape, stage: _flush(shape, stage, _ahead_1f1b(shape, stage)),
    _ahead_1f1b,
)
