"""The accumulator of a group whose dtype the native core does not know: sums by torch, in the parameters' own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.flat import FlatGroup


class PlainAccumulator(GradAccumulator):
    """As :class:`~paci_rt.optim.accumulator.GradAccumulator`, for fp64 and complex parameters, without its speed.

    States, and on a GPU the order of streams, are kept by a native accumulator with one element a parameter.

    Args:
        group, buffers: as there.
    """

    def __init__(self, group: FlatGroup, *, buffers: int = 1) -> None:
        count = len(group.params)
        stands_in = [torch.zeros(count, device=group.device) for _ in range(buffers)]
        super().__init__(
            group, buffers=buffers, dtype=group.dtype, counted=([(at, 1) for at in range(count)], stands_in)
        )
        self._measured: tuple[Tensor, Tensor] | None = None

    def add(self, index: int, grad: Tensor) -> None:
        grad = self._checked(index, grad)
        total, overwrite = self.front(index)
        if overwrite:
            total.copy_(grad)
        else:
            total.add_(grad)

    def add_product(
        self, index: int, left: Tensor, right: Tensor, bias: tuple[GradAccumulator, int] | None = None
    ) -> None:
        self.add(index, torch.mm(left, right))
        if bias is not None:
            bias[0].add(bias[1], left.t().sum(0))

    def _known_dtype(self, dtype: torch.dtype) -> bool:
        return dtype is self.group.dtype

    def seal(self, *, stream: Any = None, totals: Tensor | None = None) -> None:
        flat = self.front_flat
        touched = self._native.front_touched
        for position, view in enumerate(self.group.views(flat)):
            if not touched[position]:
                view.zero_()
        super().seal(stream=stream)
        self._measured = flat.abs().square().sum(dtype=torch.float64), (~flat.isfinite()).sum()

    def measured(self) -> tuple[Any, Any]:
        native_totals = self._native.touched  # raises where nothing is sealed
        assert native_totals and self._measured is not None
        squares, nonfinite = self._measured
        return (squares, nonfinite) if self._device.type != "cpu" else (float(squares), int(nonfinite))

    @property
    def sum_of_squares(self) -> float:
        return float(self.measured()[0])

    @property
    def nonfinite_count(self) -> int:
        return int(self.measured()[1])


__all__ = ["PlainAccumulator"]
