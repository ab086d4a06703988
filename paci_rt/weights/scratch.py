"""The weights that a forward which runs elsewhere comes back to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer

_BLOCK = {"cpu": 1 << 16}
_LARGE_BLOCK = 1 << 23
"""Elements that trade places at a time: on a CPU as many as stay in a cache, elsewhere as many as a launch is worth."""


class ScratchWeights:
    """Brings a stage's weights back after they were moved in place: from fp32 masters where this replica has all of
    them, else from a scratch copy.

    Args:
        optimizer: the stage's optimizer.
    """

    def __init__(self, optimizer: StageOptimizer) -> None:
        self._optimizer = optimizer
        self.kept: list[Tensor | None] = [
            torch.zeros_like(group.weight) if optimizer.shards is not None or optimizer.master(number) is None else None
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
        kept = self.kept[number]
        true = self._optimizer.master(number) if kept is None else kept
        assert true is not None
        # Through the flat buffer: the version counters of the parameters stand still.
        for weight, own in self._parts(number, true, positions):
            weight.copy_(own)

    @torch.no_grad()
    def trade(self, number: int, positions: Sequence[int]) -> None:
        """Let the scratch copy of flat group ``number`` and its weights change places, of the parameters at
        ``positions``: what was in the one is in the other, to the bit."""
        kept = self.kept[number]
        assert kept is not None, "weights with masters have no scratch copy"
        size = _BLOCK.get(kept.device.type, _LARGE_BLOCK)
        for weight, own in self._parts(number, kept, positions):
            between = torch.empty_like(weight[:size])
            for here, there in zip(weight.split(size), own.split(size), strict=True):
                block = between[: here.numel()]
                block.copy_(here)
                here.copy_(there)
                there.copy_(block)

    def _parts(self, number: int, other: Tensor, positions: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Flat pieces of the weights of a group and of another buffer of its layout."""
        group = self._optimizer.groups[number]
        if positions is None or len(positions) == len(group.params):
            yield group.weight, other
            return
        for position in positions:
            begin, end = group.offsets[position], group.offsets[position] + group.numels[position]
            yield group.weight[begin:end], other[begin:end]
