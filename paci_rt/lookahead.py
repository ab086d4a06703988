"""Window look-ahead: run a forward at the weights that the optimizer would make now of the gradients that are in.

Delay, not the inconsistency of forward and backward, is what asynchronous updates cost: at stage ``i`` a share
``(P-1-i)/a`` of the forwards runs a version early. The schedule knows how many updates ``d`` will come before a
forward's backward, and the front accumulator holds ``c`` of the ``a`` gradients of the next of them. Such a forward
runs at the weights that ``d`` updates with the mean of those ``c`` would give; as long as ``c`` is 0, with the mean of
the window before, which the accumulator still holds. Neither weights nor optimizer state change, the backward runs at
the then current weights, and no version is kept. Why this works: ``docs/convergence.md``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from paci_rt.optim import SGD, BoundOptimizer, FusedBound
from paci_rt.true_weights import TrueWeights


def can_look_ahead(bound: BoundOptimizer) -> bool:
    """Whether an optimizer can be asked for steps that it does not take: paci_rt's own, SGD only with momentum."""
    optimizer = bound.optimizer
    still = isinstance(optimizer, SGD) and any(group["momentum"] == 0 for group in optimizer.param_groups)
    return isinstance(bound, FusedBound) and not still


def require_look_ahead(bound: BoundOptimizer) -> None:
    """Raise ValueError, with the remedy, for an optimizer that cannot be asked for steps that it does not take."""
    if not can_look_ahead(bound):
        name = type(bound.optimizer).__name__ + (" without momentum" if isinstance(bound, FusedBound) else "")
        raise ValueError(
            f"lookahead=True cannot use {name}: give one of paci_rt's own optimizers, SGD with momentum above 0"
        )


class LookAhead:
    """Puts a stage's weights ahead for the time of a forward.

    fp32 weights are kept in a scratch buffer meanwhile; of the others the masters bring the true ones back.

    Args:
        bound: the stage's optimizer.
        accumulation: micro-batches a window.
        divisor: what the sum of a whole window is divided by.

    Raises:
        ValueError: an optimizer that cannot be asked for steps that it does not take.
    """

    def __init__(self, bound: BoundOptimizer, *, accumulation: int, divisor: float) -> None:
        require_look_ahead(bound)
        assert isinstance(bound, FusedBound)
        self._bound, self._true = bound, TrueWeights(bound)
        self._accumulation, self._share = accumulation, divisor / accumulation
        self.seconds, self.forwards = 0.0, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch buffers."""
        return self._true.nbytes

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        """Within it, the parameters are ``updates`` ahead, by the gradients of ``micro_batches`` of the window."""
        start = time.perf_counter()
        before = micro_batches == 0
        divisor = (micro_batches or self._accumulation) * self._share
        moved = [
            self._bound.ahead(number, divisor, updates, kept, before=before)
            for number, kept in enumerate(self._true.kept)
        ]
        self.seconds += time.perf_counter() - start
        try:
            yield
        finally:
            start = time.perf_counter()
            for number, positions in enumerate(moved):
                self._true.restore(number, positions)
            self.seconds += time.perf_counter() - start
            self.forwards += 1

    def restart(self) -> None:
        """The pipeline is empty: the window before is no longer what comes next."""
        for accumulator in self._bound.accumulators:
            accumulator.forget()
