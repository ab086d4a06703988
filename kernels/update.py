"""What the wrappers of the updates share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.kernels.launch import check_flat
from paci_rt.kernels.layout import FlatLayout

LOW_DTYPES = (torch.bfloat16, torch.float16)


def check_buffers(layout: FlatLayout, **buffers: Tensor | None) -> None:
    """Flat fp32 buffers of a layout; None passes.

    Raises:
        ValueError: one of them is not; its name is in the message.
    """
    for name, buffer in buffers.items():
        if buffer is not None:
            check_flat(buffer, name, layout.numel, (torch.float32,), layout.device)


def check_weight(layout: FlatLayout, weight: Tensor | None) -> None:
    """Flat bf16 or fp16 weights; None passes, the weights are then fp32 and their own masters.

    Raises:
        ValueError: they are not.
    """
    if weight is not None:
        check_flat(weight, "weight", layout.numel, LOW_DTYPES, layout.device)


def check_ahead(layout: FlatLayout, weight: Tensor | None, kept: Tensor | None) -> None:
    """Looking ahead keeps fp32 weights aside; the others have masters.

    Raises:
        ValueError: none or both of ``weight`` and ``kept``, or one does not fit the layout.
    """
    if (weight is None) == (kept is None):
        raise ValueError(
            "looking ahead needs either weight= (bf16 or fp16, which have fp32 masters) or kept= (a flat fp32 buffer "
            f"for fp32 weights as they were), and got {'neither' if weight is None else 'both'}"
        )
    check_weight(layout, weight)
    check_buffers(layout, kept=kept)


def check_clip(layout: FlatLayout, clip: Tensor | None) -> Tensor:
    """The clip coefficient, fp32 [1] on the device; 1 where there is none.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if clip is None:
        return layout.one
    if clip.dtype is not torch.float32 or clip.numel() != 1 or clip.device != layout.device:
        raise ValueError(
            f"clip is {clip.dtype} of shape {tuple(clip.shape)} on {clip.device}: give one fp32 element on "
            f"{layout.device}, as clip_coefficient() returns it"
        )
    return clip


def check_grads(
    layout: FlatLayout,
    weight: Tensor | None,
    grads: Sequence[Tensor | None] | None,
    overwrite: bool | Sequence[bool],
) -> list[int]:
    """What happens with the window's last gradients, one code a parameter; empty without any.

    Raises:
        ValueError: they do not fit the layout, or their dtype is not the weights'.
    """
    if grads is None or all(grad is None for grad in grads):
        return []
    codes = layout.codes(grads, overwrite)
    dtype = next(grad.dtype for grad in grads if grad is not None)
    expected = torch.float32 if weight is None else weight.dtype
    if dtype is not expected:
        raise ValueError(
            f"the last gradients have dtype {dtype}, the weights {expected}: add them with accumulate() instead"
        )
    return codes
