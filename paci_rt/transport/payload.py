"""Which tensors can travel between stages, checked on the side that sends, and made plain bytes in a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paci_rt.errors import PaciError, StageError
from paci_rt.schedules.channel import Channel
from paci_rt.transport.base import Message
from paci_rt.transport.diagnosis import action_of

# What the header numbers, in this order; the native core has the same list (csrc/p2p/channel.cpp).
_NAMES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "complex32",
)  # fmt: skip
DTYPES: tuple[torch.dtype | None, ...] = tuple(getattr(torch, name, None) for name in _NAMES)
"""Dtypes that can travel, by their number in a header; None where this version of torch has none of that name."""
CODES: dict[torch.dtype, int] = {dtype: code for code, dtype in enumerate(DTYPES) if dtype is not None}

_PLAIN = (Tensor, nn.Parameter)


def check(channel: Channel, index: int, message: Message) -> None:
    """Make sure that every tensor of a message can travel, over whatever transport.

    Raises:
        StageError: a tensor subclass, a sparse or quantized tensor, or one of another dtype; the message names the
            action, the tensor's place in the message, and the remedy.
    """
    for at, tensor in enumerate(message.tensors):
        if tensor is None or (type(tensor) is Tensor and tensor.layout is torch.strided and tensor.dtype in CODES):
            continue
        why = _why_not(tensor)
        if why:
            raise StageError(f"{_what(channel, index, at, tensor)} cannot travel between stages: {why}")


def plain(tensor: Tensor) -> Tensor:
    """``tensor``, detached, with its elements in a row and no conjugation or sign put off; itself where that is so."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.layout is not torch.strided or (tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()):
        return tensor
    return tensor.resolve_conj().resolve_neg().contiguous()


@contextmanager
def packing(channel: Channel, index: int, message: Message) -> Iterator[None]:
    """An error within it is this side's own, and no sign of a lost neighbour.

    Raises:
        StageError: instead of whatever else was raised; the message names the action and the tensors.
    """
    try:
        yield
    except PaciError:
        raise
    except Exception as error:
        shown = "; ".join(_shape(tensor) for tensor in message.tensors)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StageError(
            f"action {action_of(channel, index, sending=True)} could not pack its message ({shown}) on this side, "
            f"stage {channel.sender}: {reason}; return plain, strided tensors from the stage"
        ) from error


def _what(channel: Channel, index: int, at: int, tensor: Tensor) -> str:
    kind = type(tensor).__name__ if type(tensor) not in _PLAIN else "tensor"
    return f"action {action_of(channel, index, sending=True)}: {kind} {at} of stage {channel.sender} ({_shape(tensor)})"


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _why_not(tensor: Tensor) -> str:
    """Why a tensor cannot travel, and the remedy; empty where it can."""
    if type(tensor) not in _PLAIN:
        return (
            "it is a subclass of torch.Tensor, whose meaning the other side would not know; return the plain tensors "
            "that it consists of"
        )
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; return tensor.to_dense(), or its indices and values as two tensors"
    if tensor.is_quantized:
        return "it is quantized; return tensor.int_repr() and its scale, or tensor.dequantize()"
    if tensor.dtype not in CODES:
        return f"no header describes {tensor.dtype}; cast it first, or send tensor.view(torch.uint8)"
    return ""


__all__ = ["CODES", "DTYPES", "check", "packing", "plain"]
