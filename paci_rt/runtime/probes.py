"""Which micro-batch and which parameter: what an error about gradients that are not finite can say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.errors import NonFiniteError
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.stage_optimizer import StageOptimizer

EDGE, HEAD, COLUMN = 4, 4, 8
"""Parameters at either end of a stage whose first row is looked at; elements of all others, one line of cache; elements
of a column."""


class MicroBatchProbe:
    """Looks at a few places of the sums after each backward, and remembers what it saw without reading it.

    A factor of a product of matrices that is not finite spoils a whole row or column of it, and with it all of the
    layers that come next, forward or backward. So the first row and column of the first and last parameters show it,
    and of those in between a few elements do.

    Args:
        optimizer: of the stage.
    """

    def __init__(self, optimizer: StageOptimizer) -> None:
        self._looks = []
        for group, accumulator in zip(optimizer.groups, optimizer.accumulators, strict=True):
            places = _places(group)
            dtype = torch.int32 if group.numel < 2**31 else torch.int64
            self._looks.append((accumulator, torch.tensor(places, dtype=dtype).to(group.device)))
        self._seen: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def look(self, micro_batch: int) -> None:
        """A backward of ``micro_batch``, or half of one, is over."""
        for accumulator, index in self._looks:
            self._seen.append((micro_batch, accumulator.front_flat.index_select(0, index)))

    def forget(self) -> None:
        """A window has ended."""
        self._seen.clear()

    def take(self) -> list[tuple[int, Tensor]]:
        """What was seen in the window, which has ended."""
        seen, self._seen = self._seen, []
        return seen

    def first(self, seen: list[tuple[int, Tensor]] | None = None) -> int | None:
        """The first micro-batch of the window, or among ``seen``, whose gradients showed something not finite."""
        seen = self._seen if seen is None else seen
        return next((m for m, found in seen if not bool(found.isfinite().all())), None)


def _places(group: FlatGroup) -> list[int]:
    """Positions in a flat buffer that a probe looks at."""
    found: list[int] = []
    last = len(group.params) - EDGE
    for at, (param, offset) in enumerate(zip(group.params, group.offsets, strict=True)):
        if param.numel() == 0:
            continue
        rows = param.shape[0] if param.dim() > 1 else 1
        columns = param.numel() // rows
        if at < EDGE or at >= last:
            found += range(offset, offset + columns)
            found += range(offset + columns, offset + min(rows, COLUMN) * columns, columns)
        else:
            found += range(offset, offset + min(columns, HEAD))
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


def nonfinite_error(
    stage: int, window: int, accumulation: int, *, name: str, count: int, found: int | None
) -> NonFiniteError:
    """What to raise for a window whose gradients are not finite.

    Args:
        name: of the first such parameter; empty for a tied weight. count: of such values on the stage.
        found: micro-batch, where it is known.
    """
    first = window * accumulation
    where = f"micro-batch {found}"
    if found is None:
        last = first + accumulation - 1
        where = f"micro-batch {first}" if first == last else f"one of micro-batches {first} to {last}"
    name = name or "of the tied weight"
    return NonFiniteError(
        f"{stage}U{window}",
        f"stage {stage}, window {window}, {where}: the gradient of parameter {name!r} is not finite "
        f"({count} NaN or infinite values in this stage's gradients), and no weight has taken it; look at that "
        "micro-batch's data, lower the learning rate, clip gradients with max_grad_norm= (--clip-grad-norm), or "
        "train on without it by on_nonfinite='skip-window' (--on-nonfinite skip-window)",
        stage,
        window,
        found if found is not None or accumulation > 1 else first,
        name,
    )
