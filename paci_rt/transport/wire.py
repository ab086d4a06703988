"""The header that precedes every message: what is in it, so that shapes may change from one to the next.

A control message is ``HEADER_BYTES`` of little-endian int64 followed by at most ``INLINE_BYTES`` of payload, which
spares small tensors a message of their own. Header: sequence number, index, messages taken from the opposite
channel, number of tensors, whether the payload is inline; then per tensor dtype code, flags (1 present, 2 requires
grad), rank, and the sizes.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from paci_rt.errors import StageError
from paci_rt.transport.base import Message
from paci_rt.transport.payload import CODES, DTYPES

HEADER_BYTES = 1024
INLINE_BYTES = 4096
CONTROL_BYTES = HEADER_BYTES + INLINE_BYTES

_PRESENT, _REQUIRES_GRAD = 1, 2
_SIZES = 64  # dimensions of a tensor, at most


class TensorMeta(NamedTuple):
    """Shape and dtype of one tensor of a message; ``present`` is False for an absent gradient."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    present: bool
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize if self.present else 0


Meta = tuple[TensorMeta, ...]


def describe(message: Message) -> Meta:
    """The metadata of ``message``.

    Raises:
        StageError: a tensor has a dtype that cannot travel.
    """
    metas = []
    for tensor, requires_grad in zip(message.tensors, message.requires_grad, strict=True):
        if tensor is None:
            metas.append(TensorMeta(torch.float32, (), False, requires_grad))
            continue
        if tensor.dtype not in CODES:
            raise StageError(f"tensors of dtype {tensor.dtype} cannot travel between stages; cast them first")
        metas.append(TensorMeta(tensor.dtype, tuple(tensor.shape), True, requires_grad))
    return tuple(metas)


def pack_header(sequence: int, index: int, taken: int, metas: Meta, inline: bool) -> bytes:
    """Header bytes, not padded.

    Raises:
        StageError: more or higher-dimensional tensors than a header can describe.
    """
    packed = struct.pack("<5q", sequence, index, taken, len(metas), int(inline)) + pack_metas(metas)
    if len(packed) > HEADER_BYTES:
        raise StageError(
            f"a message of {len(metas)} tensors needs a header of {len(packed)} bytes, more than {HEADER_BYTES}: "
            "send fewer tensors between these stages, for example stacked into one"
        )
    return packed


@lru_cache(maxsize=64)  # messages of a channel look alike
def pack_metas(metas: Meta) -> bytes:
    """The part of a header that describes the tensors; the native core reads it too (``csrc/p2p/channel.hpp``)."""
    fields: list[int] = []
    for meta in metas:
        flags = (_PRESENT if meta.present else 0) | (_REQUIRES_GRAD if meta.requires_grad else 0)
        fields += [CODES[meta.dtype], flags, len(meta.shape), *meta.shape]
    return struct.pack(f"<{len(fields)}q", *fields)


def unpack_header(raw: bytes) -> tuple[int, int, int, Meta, bool]:
    """Sequence number, index, messages taken, metadata and whether the payload lies inline behind the header."""
    sequence, index, taken, count, inline = struct.unpack_from("<5q", raw, 0)
    metas, _ = _unpack(raw, 40, count)
    return sequence, index, taken, metas, bool(inline)


def unpack_metas(packed: bytes) -> Meta:
    """What :func:`pack_metas` has packed."""
    metas: list[TensorMeta] = []
    at = 0
    while at < len(packed):
        found, at = _unpack(packed, at, 1)
        metas += found
    return tuple(metas)


def metas_of_bytes(data: bytes) -> Meta:
    """Bytes as the sizes of absent tensors, so that they travel in a description of tensors."""
    sizes = [len(data), *(int.from_bytes(data[at : at + 7], "little") for at in range(0, len(data), 7))]
    parts = (tuple(sizes[at : at + _SIZES]) for at in range(0, len(sizes), _SIZES))
    return tuple(TensorMeta(torch.float32, part, False, False) for part in parts)


def bytes_of_metas(metas: Meta) -> tuple[int, bytes]:
    """How many tensors come before those that :func:`metas_of_bytes` made, and the bytes; none of other metas."""
    count = sum(meta.present or not meta.shape for meta in metas)
    length, *sizes = [size for meta in metas[count:] for size in meta.shape] or [0]
    return count, b"".join(size.to_bytes(7, "little") for size in sizes)[:length]


def _unpack(raw: bytes, at: int, count: int) -> tuple[Meta, int]:
    """``count`` descriptions from byte ``at`` on, and where they end."""
    metas = []
    for _ in range(count):
        code, flags, rank = struct.unpack_from("<3q", raw, at)
        shape = struct.unpack_from(f"<{rank}q", raw, at + 24)
        at += 24 + 8 * rank
        dtype = DTYPES[code]
        if dtype is None:
            raise StageError(
                f"a tensor of dtype code {code} arrived, which torch {torch.__version__} does not have: use the same "
                "version of torch on all ranks"
            )
        metas.append(TensorMeta(dtype, tuple(shape), bool(flags & _PRESENT), bool(flags & _REQUIRES_GRAD)))
    return tuple(metas), at


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as a flat uint8 view."""
    return tensor.view(-1).view(torch.uint8)
