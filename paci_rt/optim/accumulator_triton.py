"""The accumulator of a group on a GPU: gradients go into the sums many at a time, by the Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paci_rt.kernels.accumulate import GradientStatistics, accumulate
from paci_rt.kernels.wgrad import default_route, wgrad
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.flat import FlatGroup

PENDING_BYTES = 256 << 20
"""Gradients that wait for their launch hold memory: this much at most, but for the last one."""


class KernelAccumulator(GradAccumulator):
    """As :class:`~paci_rt.optim.accumulator.GradAccumulator`, for work on the stream that is current in torch.

    :meth:`add` only remembers; one launch adds all that was remembered, at the latest in :meth:`seal`. Squares and
    non-finite elements of sums that products went into (:meth:`add_product`) are counted at the seal, in a pass that
    reads 4 bytes per parameter.

    Args:
        group, buffers: as there.
    """

    def __init__(self, group: FlatGroup, *, buffers: int = 1) -> None:
        super().__init__(group, buffers=buffers)
        self._statistics = GradientStatistics(group.layout)
        self._pending: dict[int, Tensor] = {}
        self._pending_bytes = 0
        self._unmeasured: set[int] = set()

    def add(self, index: int, grad: Tensor) -> None:
        """Add a gradient to the front buffer, with others in one launch. It must not change before :meth:`flush`.

        Args and errors are those of the base class; on a sealed buffer the error comes with the launch.
        """
        grad = self._checked(index, grad)
        other = next(iter(self._pending.values()), None)
        if index in self._pending or (other is not None and other.dtype is not grad.dtype):
            self.flush()
        self._pending[index] = grad
        self._pending_bytes += grad.nbytes
        if self._pending_bytes > PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Launch what :meth:`add` has put off."""
        if not self._pending:
            return
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        flags = dict(zip(pending, self.lend(list(pending)), strict=True))
        positions = range(len(self.group.params))
        accumulate(
            self.group.layout,
            self._statistics,
            self.front_flat,
            [pending.get(position) for position in positions],
            overwrite=[flags.get(position, False) for position in positions],
        )
        self._unmeasured -= pending.keys()

    def front(self, index: int, *, stream: Any = None) -> tuple[Tensor, bool]:
        if index in self._pending:
            self.flush()
        self._unmeasured.add(index)
        return super().front(index, stream=stream)

    def add_product(
        self, index: int, left: Tensor, right: Tensor, bias: tuple[GradAccumulator, int] | None = None
    ) -> None:
        """As the base class, but in fp32 all the way, whatever the factors' dtype; the bias in the same launch."""
        dy, x = _unit_stride(left.t()), _unit_stride(right)
        front, overwrite = self.front(index)
        options: dict[str, Any] = {}
        if bias is not None:
            options["bias"], options["overwrite_bias"] = bias[0].front(bias[1])
        if self.product_by is not None:
            self.product_by(front, dy, x, overwrite=overwrite, **options)
        else:
            route = default_route(dy.dtype, dy.device)
            wgrad(front, dy, x, overwrite=overwrite, route=route, **options)

    def sums(self, *, before: bool = False) -> tuple[Tensor, tuple[bool, ...]]:
        self.flush()
        return super().sums(before=before)

    def seal(self, *, stream: Any = None, totals: Tensor | None = None) -> None:
        """As the base class, which is given the totals from here."""
        self.flush()
        if self.state == "filling":  # else the base class says what is wrong
            unmeasured = sorted(self._unmeasured)
            self._statistics.measure(self.front_flat, unmeasured)
            missing = [position for position, known in enumerate(self._native.front_touched) if not known]
            self._statistics.clear(self.front_flat, missing)
            self.totals = self._statistics.totals()
        super().seal(stream=stream, totals=self.totals if self._device.type != "cpu" else None)
        self._unmeasured.clear()

    def measured(self) -> tuple[Any, Any]:
        return self.totals[0], self.totals[1]

    def nonfinite_chunks(self) -> Tensor:
        """int32 [chunks], a copy: non-finite elements in the chunks of the window that was sealed last."""
        return self._statistics.nonfinite.clone()

    def nonfinite_positions(self, chunks: Tensor) -> list[int]:
        """Parameters that have some, by what :meth:`nonfinite_chunks` returned. Waits for it."""
        counts = chunks.tolist()
        return [at for at, (first, end) in enumerate(self.group.layout.ranges) if any(counts[first:end])]

    totals: Tensor
    """fp64 [2] on the device, of the window that was sealed last: sum of squares and number of non-finite elements."""


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


__all__ = ["PENDING_BYTES", "KernelAccumulator"]
