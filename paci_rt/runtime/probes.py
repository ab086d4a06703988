"""Which micro-batch and which parameter: what an error about gradients that are not finite can say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer


class MicroBatchProbe:
    """Looks at a few places of the sums after each backward, and remembers what it saw without reading it.

    A factor of a product of matrices that is not finite spoils a whole row or column of it. So the first row and the
    first column of each matrix show it, and of those with a bias the bias shows the rows.

    Args:
        optimizer: of the stage.
    """

    def __init__(self, optimizer: StageOptimizer) -> None:
        self._optimizer = optimizer
        self._places = [
            torch.tensor(_places(group.names, [param.shape for param in group.params], group.offsets)).to(group.device)
            for group in optimizer.groups
        ]
        self._seen: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def look(self, micro_batch: int) -> None:
        """A backward of ``micro_batch``, or half of one, is over."""
        for accumulator, places in zip(self._optimizer.accumulators, self._places, strict=True):
            found = accumulator.front_flat.index_select(0, places)
            if found.is_complex():
                found = torch.view_as_real(found)
            self._seen.append((micro_batch, torch.stack(torch.aminmax(found))))

    def forget(self) -> None:
        """A window has ended."""
        self._seen.clear()

    def first(self) -> int | None:
        """The first micro-batch of the window whose gradients showed something that is not finite."""
        return next((m for m, ends in self._seen if not bool(ends.isfinite().all())), None)


def _places(names: Sequence[str], shapes: Sequence[Sequence[int]], offsets: Sequence[int]) -> list[int]:
    """Positions in a flat buffer that a probe looks at."""
    found: list[int] = []
    known = set(names)
    for name, shape, offset in zip(names, shapes, offsets, strict=True):
        rows = shape[0] if len(shape) > 1 else 1
        columns = 1
        for size in shape[1:] if len(shape) > 1 else shape:
            columns *= size
        if rows * columns == 0:
            continue
        found += range(offset, offset + columns)
        has_bias = name.removesuffix("weight") + "bias" in known
        if rows > 1 and not has_bias:
            found += range(offset + columns, offset + rows * columns, columns)
    return found


def first_parameter(optimizer: StageOptimizer, order: Sequence[str]) -> tuple[str, int]:
    """The first of a sealed window's parameters in ``order`` whose sum is not finite, and how many elements of all are
    not."""
    found, count = {}, 0
    for number, position, total in optimizer.sealed_sums():
        wrong = int((~total.isfinite()).sum())
        if wrong:
            found[optimizer.groups[number].names[position]] = wrong
            count += wrong
    return next((name for name in order if name in found), next(iter(found), "")), count
