"""Bytes that each kernel must move at least: every input read once, every output written once."""

from __future__ import annotations

import torch

FP32_BYTES = 4


def accumulate_bytes(numel: int, dtype: torch.dtype, *, overwrite: bool) -> int:
    """Bytes of adding ``numel`` gradients of a dtype to the fp32 sum, or of overwriting it.

    Args:
        numel: elements.
        dtype: of the gradients.
        overwrite: the first micro-batch of a window, which does not read the sum.

    Example:
        >>> from paci_rt.kernels import accumulate_bytes
        >>> accumulate_bytes(1, torch.bfloat16, overwrite=True), accumulate_bytes(1, torch.bfloat16, overwrite=False)
        (6, 10)
    """
    return numel * (dtype.itemsize + FP32_BYTES * (1 if overwrite else 2))


def adamw_bytes(numel: int, weight: torch.dtype, *, fused_gradient: bool = False) -> int:
    """Bytes of one step of AdamW; ``weight`` is the parameters' dtype, which the last gradients have too.

    Args:
        numel: parameters, in elements.
        weight: dtype of the parameters.
        fused_gradient: the last gradients are folded in.

    Example:
        >>> from paci_rt.kernels import adamw_bytes
        >>> adamw_bytes(1, torch.bfloat16), adamw_bytes(1, torch.bfloat16, fused_gradient=True)
        (30, 32)
    """
    return numel * (7 * FP32_BYTES + _low(weight) + (weight.itemsize if fused_gradient else 0))


def adamw_ahead_bytes(numel: int, weight: torch.dtype) -> int:
    """Bytes of looking ahead with AdamW by any number of steps.

    Args:
        numel: parameters, in elements.
        weight: their dtype.

    Example:
        >>> from paci_rt.kernels import adamw_ahead_bytes
        >>> adamw_ahead_bytes(1, torch.bfloat16), adamw_ahead_bytes(1, torch.float32)
        (18, 24)
    """
    return numel * (4 * FP32_BYTES + (_low(weight) or 2 * FP32_BYTES))


def nadam_bytes(numel: int, weight: torch.dtype, *, fused_gradient: bool = False) -> int:
    """Bytes of one step of NAdam: AdamW's.

    Args:
        numel, weight, fused_gradient: as for :func:`adamw_bytes`.

    Example:
        >>> from paci_rt.kernels import nadam_bytes
        >>> nadam_bytes(1, torch.bfloat16), nadam_bytes(1, torch.float32)
        (30, 28)
    """
    return adamw_bytes(numel, weight, fused_gradient=fused_gradient)


def nadam_ahead_bytes(numel: int, weight: torch.dtype) -> int:
    """Bytes of looking ahead with NAdam by any number of steps: AdamW's.

    Args:
        numel: parameters, in elements.
        weight: their dtype.

    Example:
        >>> from paci_rt.kernels import nadam_ahead_bytes
        >>> nadam_ahead_bytes(1, torch.bfloat16), nadam_ahead_bytes(1, torch.float32)
        (18, 24)
    """
    return adamw_ahead_bytes(numel, weight)


def lion_bytes(numel: int, weight: torch.dtype, *, fused_gradient: bool = False) -> int:
    """Bytes of one step of Lion.

    Args:
        numel, weight, fused_gradient: as for :func:`adamw_bytes`.

    Example:
        >>> from paci_rt.kernels import lion_bytes
        >>> lion_bytes(1, torch.bfloat16), lion_bytes(1, torch.float32)
        (22, 20)
    """
    return numel * (5 * FP32_BYTES + _low(weight) + (weight.itemsize if fused_gradient else 0))


def lion_ahead_bytes(numel: int, weight: torch.dtype) -> int:
    """Bytes of looking ahead with Lion by any number of steps.

    Args:
        numel: parameters, in elements.
        weight: their dtype.

    Example:
        >>> from paci_rt.kernels import lion_ahead_bytes
        >>> lion_ahead_bytes(1, torch.bfloat16), lion_ahead_bytes(1, torch.float32)
        (14, 20)
    """
    return numel * (3 * FP32_BYTES + (_low(weight) or 2 * FP32_BYTES))


def sgd_bytes(numel: int, weight: torch.dtype, *, momentum: bool, fused_gradient: bool = False) -> int:
    """Bytes of one step of SGD.

    Args:
        numel, weight, fused_gradient: as for :func:`adamw_bytes`.
        momentum: there is a momentum buffer.

    Example:
        >>> from paci_rt.kernels import sgd_bytes
        >>> sgd_bytes(1, torch.bfloat16, momentum=True), sgd_bytes(1, torch.bfloat16, momentum=False)
        (22, 14)
    """
    fused = weight.itemsize if fused_gradient else 0
    return numel * ((5 if momentum else 3) * FP32_BYTES + _low(weight) + fused)


def sgd_ahead_bytes(numel: int, weight: torch.dtype) -> int:
    """Bytes of looking ahead with SGD by any number of steps.

    Args:
        numel: parameters, in elements.
        weight: their dtype.

    Example:
        >>> from paci_rt.kernels import sgd_ahead_bytes
        >>> sgd_ahead_bytes(1, torch.bfloat16), sgd_ahead_bytes(1, torch.float32)
        (14, 20)
    """
    return numel * (3 * FP32_BYTES + (_low(weight) or 2 * FP32_BYTES))


def wgrad_bytes(rows: int, n: int, k: int, dtype: torch.dtype, *, overwrite: bool, bias: bool) -> int:
    """Bytes of dW += dY^T X for dY [rows, n] and X [rows, k] of a dtype; the bias' sum adds ``n`` fp32.

    Args:
        rows, n, k: extents of the factors.
        dtype: of the factors.
        overwrite: the first micro-batch of a window, which does not read the sums.
        bias: whether the bias' gradient is summed too.

    Example:
        A layer of 768 x 768 weights, 1024 rows, the first micro-batch of a window:

        >>> from paci_rt.kernels import wgrad_bytes
        >>> wgrad_bytes(1024, n=768, k=768, dtype=torch.bfloat16, overwrite=True, bias=False)
        5505024
    """
    return rows * (n + k) * dtype.itemsize + (n * k + (n if bias else 0)) * FP32_BYTES * (1 if overwrite else 2)


def _low(weight: torch.dtype) -> int:
    """Bytes of a low-precision weight beside its fp32 master; fp32 weights are their own."""
    return 0 if weight is torch.float32 else weight.itemsize
