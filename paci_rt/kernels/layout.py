"""Where the parameters of a flat group lie, as the kernels read it: tables on the device, built once a layout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paci_rt.kernels.device.entries import PER_LAUNCH, entries_kernel
from paci_rt.kernels.launch import CHUNK, OPTIONS, check_runs_on, on_device

PAD = 16
CACHED_TABLES = 64
GRADIENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ABSENT, ADD, OVERWRITE = 0, 1, 2
"""What happens with a parameter's gradient."""


class Entries(NamedTuple):
    """Addresses of gradients on the device.

    Attributes:
        table: int64 [parameters]; an address, its lowest bit set where the gradient overwrites, 0 without a gradient.
            None where no parameter has one.
        dtype: of the gradients.
        aligned: whether every address is a multiple of four elements, which the wide loads need.
    """

    table: Tensor | None = None
    dtype: torch.dtype = torch.float32
    aligned: bool = True

    @classmethod
    def fresh(cls, present: Sequence[Tensor], codes: Sequence[int]) -> Entries:
        """In a new table, for operators, which have no layout that keeps tables.

        Args:
            present: gradients of the parameters that have one, in order.
            codes: what happens with every parameter's gradient.
        """
        if not present:
            return cls()
        table = torch.empty(len(codes), dtype=torch.int64, device=present[0].device)
        _write(table, _values(present, codes))
        return cls(table, present[0].dtype, _aligned(present))


class FlatLayout:
    """The segments of a flat group on one device, cut into chunks.

    Attributes:
        segments: offset and length of every parameter, in elements.
        numel: length of the flat buffers in elements.
        device: where they are.
        chunks: int64 [chunks, 4] on the device: parameter, start in it, length, flat offset.
        ranges: first chunk of every parameter and the one behind its last.
        one: fp32 [1] on the device, the coefficient that changes nothing.

    Args:
        segments, numel, device: as above. An offset must be a multiple of 16, and a segment with its padding up to the
            next multiple of 16 must not reach into another one: :class:`paci_rt.flat.FlatGroup` lays out such groups.

    Raises:
        ValueError: the segments are not such, the device is no CUDA device, or there is nothing to work on.
    """

    def __init__(self, segments: Sequence[tuple[int, int]], numel: int, device: torch.device) -> None:
        check_runs_on(device, "the flat group")
        _check_segments(segments, numel)
        self.segments, self.numel, self.device = tuple(segments), numel, device
        rows: list[tuple[int, int, int, int]] = []
        ranges = []
        for position, (offset, length) in enumerate(segments):
            first = len(rows)
            for start in range(0, length, CHUNK):
                rows.append((position, start, min(CHUNK, length - start), offset + start))
            ranges.append((first, len(rows)))
        if not rows:
            raise ValueError("a layout needs at least one parameter with elements, and every segment given is empty")
        self.ranges = tuple(ranges)
        self.chunks = torch.tensor(rows, dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self._tables: OrderedDict[tuple[int, ...], Entries] = OrderedDict()
        self._captured: list[Entries] = []

    def codes(self, grads: Sequence[Tensor | None], overwrite: bool | Sequence[bool]) -> list[int]:
        """What happens with every parameter's gradient: ``ABSENT``, ``ADD`` or ``OVERWRITE``.

        Args:
            grads: one a parameter, None where there is none; all of one dtype, contiguous, of the parameter's length.
            overwrite: one flag for all, or one a parameter.

        Raises:
            ValueError: wrong number, length, dtype, device or strides.
        """
        flags = [overwrite] * len(self.segments) if isinstance(overwrite, bool) else list(overwrite)
        if len(grads) != len(self.segments) or len(flags) != len(self.segments):
            raise ValueError(
                f"{len(grads)} gradients and {len(flags)} overwrite flags for {len(self.segments)} parameters: give "
                "one for each, None for a parameter without a gradient"
            )
        dtype = None
        for position, grad in enumerate(grads):
            if grad is not None:
                dtype = dtype or grad.dtype
                if (
                    grad.numel() != self.segments[position][1]
                    or grad.dtype is not dtype
                    or grad.device != self.device
                    or not grad.is_contiguous()
                ):
                    _refuse(position, grad, self.segments[position][1], dtype, self.device)
        if dtype is not None and dtype not in GRADIENT_DTYPES:
            raise ValueError(f"gradients have dtype {dtype}: use torch.bfloat16, torch.float16 or torch.float32")
        return [ABSENT if grad is None else OVERWRITE if flag else ADD for grad, flag in zip(grads, flags, strict=True)]

    def entries(self, grads: Sequence[Tensor | None], codes: Sequence[int]) -> Entries:
        """The gradients' addresses on the device, from an earlier call with the same ones where there was one.

        Nothing waits and nothing is copied from host memory. A table that is written while a CUDA graph is captured
        belongs to that graph, whose replays write it; it is kept as long as the layout.
        """
        present = [grad for grad in grads if grad is not None]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            entries = Entries.fresh(present, codes)
            self._captured.append(entries)
            return entries
        key = _values(present, codes)
        entries = self._tables.get(key) or Entries.fresh(present, codes)
        self._tables[key] = entries
        self._tables.move_to_end(key)
        if len(self._tables) > CACHED_TABLES:
            self._tables.popitem(last=False)
        return entries


def _values(present: Sequence[Tensor], codes: Sequence[int]) -> tuple[int, ...]:
    grads = iter(present)
    return tuple(0 if code == ABSENT else next(grads).data_ptr() | (code == OVERWRITE) for code in codes)


def _aligned(present: Sequence[Tensor]) -> bool:
    return all(grad.data_ptr() % (4 * grad.element_size()) == 0 for grad in present)


def _write(table: Tensor, values: Sequence[int]) -> None:
    with on_device(table):
        for first in range(0, len(values), PER_LAUNCH):
            part = list(values[first : first + PER_LAUNCH])
            part += [0] * (PER_LAUNCH - len(part))
            entries_kernel[(1,)](table, first, len(values), *part, num_warps=1, **OPTIONS)


def _check_segments(segments: Sequence[tuple[int, int]], numel: int) -> None:
    end = 0
    for position, (offset, length) in sorted(enumerate(segments), key=lambda item: item[1]):
        if length < 0 or offset % PAD:
            raise ValueError(
                f"segment {position} has offset {offset} and length {length}: offsets must be multiples of {PAD} and "
                "lengths not negative, as FlatGroup makes them"
            )
        if offset < end:
            raise ValueError(
                f"segment {position} begins at {offset}, inside the one before with its padding up to {end}: segments "
                f"must not overlap once their ends are rounded up to multiples of {PAD}"
            )
        end = offset + -(-length // PAD) * PAD
    if end > numel:
        raise ValueError(f"the segments with their padding take {end} elements, the flat buffers have {numel}")


def _refuse(position: int, grad: Tensor, numel: int, dtype: torch.dtype, device: torch.device) -> None:
    what = f"the gradient of parameter {position}"
    if grad.numel() != numel:
        raise ValueError(f"{what} has {grad.numel()} elements, the parameter {numel}: give the gradient of that one")
    if grad.dtype is not dtype:
        raise ValueError(f"{what} has dtype {grad.dtype}, an earlier one {dtype}: make one call for each dtype")
    if grad.device != device:
        raise ValueError(f"{what} is on {grad.device}, the layout on {device}: keep both on one device")
    raise ValueError(f"{what} has strides {grad.stride()}: call .contiguous() on it")
