"""How kernels are launched: block sizes, compiler options, and the checks that all wrappers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from paci_rt.kernels.device.accumulate import accumulate_kernel

CHUNK = 4096
"""Elements a program at most. Small enough for several waves of programs at 100 million parameters, large enough that
reading the chunk's row (32 bytes) does not show."""

BLOCK = 1024
"""Elements that a program works on at a time."""

WARPS = 4
"""Of the accumulation: 8 elements a thread, so that enough bytes are on their way."""

UPDATE_WARPS = 8
"""Of the updates, which read four buffers or more: 4 elements a thread, so that registers suffice."""

TOTALS_BLOCK = 4096
TOTALS_WARPS = 16
"""Of the one program that adds up the chunks' slots; it is waited for, so it takes many at a time."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""No contraction into fused multiply-adds, as in the CPU kernels; pinned, as Triton is about to change its default."""

INTERPRETED = not isinstance(accumulate_kernel, triton.runtime.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when Triton was imported, so that kernels run on the CPU, slowly."""


def options(warps: int = WARPS) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {**OPTIONS, "num_warps": warps, "num_stages": 2}


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one, which is the one that Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def operator(name: str, run: Callable[..., None], written: Sequence[str], schema: str) -> Callable[..., None]:
    """An operator for ``torch.compile`` that returns nothing.

    Args:
        name: with its namespace, ``paci_rt::...``.
        run: what it does.
        written: the arguments that it writes.
        schema: of its arguments, which are positional.
    """
    made = torch.library.custom_op(name, run, mutates_args=tuple(written), schema=schema)
    made.register_fake(lambda *arguments: None)
    return made


def check_runs_on(device: torch.device, what: str) -> None:
    """Whether kernels can run on a device.

    Raises:
        ValueError: it is no CUDA device; the CPU will do under Triton's interpreter.
    """
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"{what} is on {device}, and the Triton kernels run on CUDA devices: move it to 'cuda', or set "
            "TRITON_INTERPRET=1 before Triton is imported to try them on the CPU"
        )


def check_flat(tensor: Tensor, what: str, numel: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Whether a tensor can be a flat buffer of a layout.

    Raises:
        ValueError: wrong shape, dtype, device or alignment.
    """
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{what} has dtype {tensor.dtype}: it must be {names}")
    if tensor.dim() != 1 or tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: it must be flat, contiguous and as "
            f"long as the layout, {numel} elements"
        )
    if tensor.device != device:
        raise ValueError(f"{what} is on {tensor.device}, the layout on {device}: keep both on one device")
    if not torch.compiler.is_compiling() and tensor.data_ptr() % 16:
        raise ValueError(f"{what} begins at an address that is not a multiple of 16: pass the whole flat buffer")
