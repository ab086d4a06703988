"""Window look-ahead: run a forward at the weights that the optimizer would make now of the gradients that are in.

Delay, not the inconsistency of forward and backward, is what asynchronous updates cost: at stage ``i`` a share
``(P-1-i)/a`` of the forwards runs a version early. The schedule knows how many updates ``d`` will come before a
forward's backward, and the front accumulator holds ``c`` of the ``a`` gradients of the next of them. Such a forward
runs at the weights that ``d`` updates with the mean of those ``c`` would give. Neither weights nor optimizer state
change, the backward runs at the then current weights, and no version is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from paci_rt.optim import SGD, BoundOptimizer, FusedBound


class LookAhead:
    """Puts a stage's weights ahead for the time of a forward.

    fp32 weights are kept in a scratch buffer meanwhile; of the others the masters bring the true ones back.

    Args:
        bound: the stage's optimizer.

    Raises:
        ValueError: an optimizer that cannot be asked for steps that it does not take.
    """

    def __init__(self, bound: BoundOptimizer) -> None:
        optimizer = bound.optimizer
        still = isinstance(optimizer, SGD) and any(group["momentum"] == 0 for group in optimizer.param_groups)
        if not isinstance(bound, FusedBound) or still:
            name = type(optimizer).__name__ + (" without momentum" if still else "")
            raise ValueError(
                f"lookahead=True cannot use {name}: give paci_rt.AdamW, or paci_rt.SGD with momentum above 0"
            )
        self._bound = bound
        self._kept = [
            group.empty_like(torch.float32) if bound.master(number) is None else None
            for number, group in enumerate(bound.groups)
        ]
        self.seconds, self.forwards = 0.0, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch buffers."""
        return sum(kept.nbytes for kept in self._kept if kept is not None)

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        """Within it, the parameters are ``updates`` ahead, by the gradients of ``micro_batches`` of the window."""
        start = time.perf_counter()
        moved = [
            self._bound.ahead(number, max(1, micro_batches), updates, kept) for number, kept in enumerate(self._kept)
        ]
        self.seconds += time.perf_counter() - start
        try:
            yield
        finally:
            start = time.perf_counter()
            for number, (group, kept, positions) in enumerate(zip(self._bound.groups, self._kept, moved, strict=True)):
                true = self._bound.master(number) if kept is None else kept
                assert true is not None
                # Through the flat buffer: version counters stand still.
                if len(positions) == len(group.params):
                    group.weight.copy_(true)
                else:
                    for position in positions:
                        group.view(group.weight, position).copy_(group.view(true, position))
            self.seconds += time.perf_counter() - start
            self.forwards += 1
