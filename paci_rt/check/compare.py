"""How far two tensors are apart, and what distance is still rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUTPUT_ROUNDINGS = 16
"""Outputs may differ by as many units of rounding: the operations are the same, another kernel may have run them."""
GRADIENT_ROUNDINGS = 128
"""Gradients by as many: sums over the batch may be taken in another order."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Between a tensor of the cut and one of the uncut model.

    Attributes:
        relative: ``|x - ref| / |ref|`` in the 2-norm; infinite for another shape.
        equal: to the bit.
        text: in words, for errors.
    """

    relative: float
    equal: bool
    text: str


def distance(x: Tensor | None, ref: Tensor | None, floor: float = 0.0) -> Distance:
    """Of ``x`` from ``ref``; ``floor`` is the least norm that it is divided by."""
    if x is None or ref is None:
        if x is None and ref is None:
            return Distance(0.0, True, "both are None")
        left = ref if x is None else x
        assert left is not None
        if not left.any():  # a gradient of zeros is as good as none
            return Distance(0.0, False, "one is None and the other zero")
        return Distance(float("inf"), False, f"{'is' if x is None else 'is not'} None")
    if x.shape != ref.shape:
        return Distance(float("inf"), False, f"has shape {tuple(x.shape)}, the model's {tuple(ref.shape)}")
    x, ref = x.detach(), ref.detach().to(x.device)
    if x.dtype == ref.dtype and torch.equal(x, ref):
        return Distance(0.0, True, "is equal")
    a, b = x.double(), ref.double()
    if not bool(torch.isfinite(a).all() == torch.isfinite(b).all()):
        return Distance(float("inf"), False, "is not finite where the model's is, or the other way around")
    size = max(float(b.norm()), floor)
    apart = float((a - b).norm())
    relative = apart / size if size else (float("inf") if apart else 0.0)
    if not size:
        return Distance(relative, False, "is not zero, as the model's is" if apart else "is equal")
    return Distance(relative, False, f"differs by {relative:.2g} of the model's norm{_factor(a, b)}")


def _factor(a: Tensor, b: Tensor) -> str:
    """Says so where one is a multiple of the other."""
    scale = float((a * b).sum() / (b * b).sum()) if b.any() else 0.0
    if scale and abs(scale - 1) > 1e-3 and float((a - scale * b).norm()) <= 1e-4 * float(a.norm()):
        return f" (it is {scale:.4g} times the model's)"
    return ""


def tolerance(dtype: torch.dtype, roundings: int, given: float | None) -> float:
    """What ``relative`` may be, for values that were computed in ``dtype``."""
    if given is not None:
        return given
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    eps = torch.finfo(dtype).eps
    return min(roundings * eps, 4 * eps if eps > 1e-4 else 1.0)
