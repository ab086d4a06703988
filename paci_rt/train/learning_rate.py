"""The learning rate's course: linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from typing import Any

WITHOUT_SECOND_MOMENT = ("sgd", "torch-sgd", "lion")


def warmup_of(config: Any) -> int:
    """Updates of warm-up, where they are not given.

    A second moment is a mean over ``1 / (1 - beta2)`` updates. Until it has seen some, steps are as large as in the
    first update, where every weight moves by a whole learning rate. Twice as many updates of linear warm-up are enough
    (Ma and Yarats, arXiv 1910.04209).
    """
    updates: int = config.lr_steps
    if config.warmup_share is not None:
        return int(config.warmup_share * updates)
    needed = 0.0 if config.optimizer in WITHOUT_SECOND_MOMENT else 2 / (1 - config.beta2)
    return max(updates // 20, min(round(needed), updates // 5))


def lr_factor(config: Any, step: int) -> float:
    """Learning rate of local update ``step`` (from 0) as a share of ``config.lr``."""
    if step < config.warmup_steps:
        return float((step + 1) / (config.warmup_steps + 1))
    floor = config.min_lr / config.lr if config.lr else 0.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.lr_steps - config.warmup_steps))
    return float(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
