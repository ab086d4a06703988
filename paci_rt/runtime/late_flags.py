"""Windows on a GPU whose gradients may turn out not to be finite: the host learns it without waiting.

The update reads on the device whether it may write. The number that it reads is copied to the host behind it, and
looked at when it is there: at the end of a later window, or at the latest in a drain.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.optim.verdict import Sealed


class Late(NamedTuple):
    """One window: how many elements are wrong, on the host once ``there`` has happened; what the probe saw; the counts
    of each flat group's chunks."""

    window: int
    wrong: Tensor
    there: torch.cuda.Event | None
    seen: list[tuple[int, Tensor]]
    chunks: dict[int, Tensor]


class LateFlags:
    """The windows of a stage that the host has not yet heard of.

    Args:
        optimizer: of the stage, whose updates can be masked.
    """

    def __init__(self, optimizer: StageOptimizer) -> None:
        self._optimizer = optimizer
        self._pending: deque[Late] = deque()

    def note(self, window: int, sealed: Sealed, seen: list[tuple[int, Tensor]]) -> Tensor:
        """A window was sealed; what its update is told, fp32 [1]: 1, or NaN where it must write nothing."""
        wrong = torch.as_tensor(sealed.nonfinite)
        chunks = {number: self._kernels(number).nonfinite_chunks() for number in sealed.live}
        if wrong.is_cuda:
            count = torch.empty((), dtype=wrong.dtype, pin_memory=True)
            count.copy_(wrong, non_blocking=True)
            there = torch.cuda.Event()
            there.record(torch.cuda.current_stream(wrong.device))
        else:
            count, there = wrong.clone(), None
        self._pending.append(Late(window, count, there, seen, chunks))
        return torch.where(wrong > 0, torch.nan, 1.0).to(torch.float32).reshape(1)

    def first_bad(self, *, wait: bool) -> Late | None:
        """The first window that is known not to be finite; ``wait``: until all are known."""
        while self._pending:
            late = self._pending[0]
            if late.there is not None:
                if wait:
                    late.there.synchronize()
                elif not late.there.query():
                    return None
            self._pending.popleft()
            if bool(late.wrong):
                return late
        return None

    def names(self, late: Late) -> list[str]:
        """Parameters of a window whose gradients are not finite."""
        return [
            self._optimizer.groups[number].names[position]
            for number, chunks in late.chunks.items()
            for position in self._kernels(number).nonfinite_positions(chunks)
        ]

    def _kernels(self, number: int) -> Any:
        """The accumulator of a group that kernels add in."""
        return self._optimizer.accumulators[number]
