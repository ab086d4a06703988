"""Arrays of other libraries, without a copy: NumPy, CuPy, JAX, and whatever else speaks DLPack.

The other direction needs nothing from here. Weights, sums, masters and optimizer state are torch tensors, hence DLPack
producers, and on a GPU they have ``__cuda_array_interface__``:

>>> numpy.from_dlpack(accumulator.front_flat)        # or cupy.from_dlpack; the same memory
>>> accumulator.add(0, borrow(gradient))             # a gradient that another library computed

``docs/use/interop.md`` has the rules on streams, bf16 and writing into weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DLPACK_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu"}
"""DLPack's numbers of kinds of devices: CPU, CUDA, and page-locked CPU memory."""


def borrow(array: Any, *, device: torch.device | str | None = None, what: str = "the array") -> Tensor:
    """A tensor over another library's memory.

    On a GPU the producer makes torch's current stream wait for what it has issued, as DLPack asks of it; keep ``array``
    alive and unchanged until the work that reads the tensor has run.

    Args:
        array: anything with ``__dlpack__`` and ``__dlpack_device__``, of any dtype that torch has; tensors pass.
        device: where it must be; None accepts any. ``"cuda"`` without a number accepts every GPU.
        what: names it in errors.

    Returns:
        The tensor, with the array's shape, strides and dtype.

    Raises:
        ValueError: not such an array, on another device, or one that its library or torch cannot hand over.
    """
    if isinstance(array, Tensor):
        _check_device(array.device, device, what)
        return array
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        raise ValueError(
            f"{what} is a {type(array).__name__}: pass a torch tensor, or an array with __dlpack__, such as "
            "those of NumPy, CuPy and JAX"
        )
    kind, number = (int(part) for part in array.__dlpack_device__())
    name = DLPACK_DEVICES.get(kind)
    if name is None:
        raise ValueError(f"{what} is on DLPack device {kind}, number {number}: move it to the CPU or a CUDA device")
    _check_device(torch.device(name, number) if name == "cuda" else torch.device(name), device, what)
    # torch would end the process with an uncaught C++ exception.
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        raise ValueError(f"{what} has strides {array.strides}: make it contiguous, as numpy.ascontiguousarray does")
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = getattr(array, "dtype", "unknown")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{what} of dtype {dtype} cannot be handed over by DLPack ({reason}): copy it") from error


def _check_device(found: torch.device, wanted: torch.device | str | None, what: str) -> None:
    if wanted is None:
        return
    target = torch.device(wanted)
    if found.type != target.type or (target.index is not None and found.index != target.index):
        raise ValueError(f"{what} is on {found}, and {target} is asked for: move it there first")
