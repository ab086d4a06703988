"""The weights that a forward which runs elsewhere comes back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer


class ScratchWeights:
    """Brings a stage's weights back after they were moved in place: from fp32 masters where there are any, else from a
    scratch copy.

    Args:
        optimizer: the stage's optimizer.
    """

    def __init__(self, optimizer: StageOptimizer) -> None:
        self._optimizer = optimizer
        self.kept: list[Tensor | None] = [
            torch.zeros_like(group.weight) if optimizer.master(number) is None else None
            for number, group in enumerate(optimizer.groups)
        ]
        """Scratch copy of each flat group, to be filled before its weights move; None where there are masters."""

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch copies."""
        return sum(kept.nbytes for kept in self.kept if kept is not None)

    @torch.no_grad()
    def restore(self, number: int, positions: Sequence[int] | None = None) -> None:
        """Bring back flat group ``number``, or only its parameters at ``positions``."""
        group, kept = self._optimizer.groups[number], self.kept[number]
        true = self._optimizer.master(number) if kept is None else kept
        assert true is not None
        # Through the flat buffer: the version counters of the parameters stand still.
        if positions is None or len(positions) == len(group.params):
            group.weight.copy_(true)
            return
        for position in positions:
            group.view(group.weight, position).copy_(group.view(true, position))
