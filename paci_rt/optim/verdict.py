"""What is found in a window whose sums are complete, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sealed(NamedTuple):
    """A window whose sums are complete. On a GPU the last two are tensors, for which nobody has waited yet.

    Attributes:
        live: numbers of the flat groups that have a gradient.
        squares: sum of squares of all sums, in double precision. nonfinite: infinite and NaN elements in them.
    """

    live: list[int]
    squares: float | Tensor
    nonfinite: int | Tensor


class Verdict(NamedTuple):
    """What a window's gradients are on the way into the weights: ``sums * factor / divisor``.

    Attributes:
        factor: by which gradients are clipped; on a GPU fp32 of one element.
        divisor: None is the schedule's own.
        window: its number, where the update may have to be taken back.
    """

    factor: float | Tensor = 1.0
    divisor: float | None = None
    window: int | None = None


AS_IT_IS = Verdict()

LARGEST = torch.finfo(torch.float32).max
_FINITE = ("lr", "weight_decay", "eps", "momentum", "dampening", "alpha", "lambd", "rho", "lr_decay", "momentum_decay")


def require_finite(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse options of an optimizer that would make its weights infinite or NaN.

    Raises:
        ValueError: one is not finite.
    """
    for number, group in enumerate(param_groups):
        betas = group.get("betas", ())
        values = [(name, group[name]) for name in _FINITE if name in group]
        for name, value in [*values, *(("betas", beta) for beta in (betas if isinstance(betas, tuple) else ()))]:
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
                value = float(value)
            if isinstance(value, float) and not abs(value) <= LARGEST:
                raise ValueError(
                    f"{name} is {value} in parameter group {number} of the optimizer, which is not finite in fp32: "
                    "every weight would become infinite or NaN; give a smaller number"
                )
