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


class Part(NamedTuple):
    """The chunks of some of a layout's parameters.

    Attributes:
        chunks: int64 [count, 4] on the device, their rows of the layout's table.
        numbers: int64 [count] on the device, where those are in the table.
    """

    chunks: Tensor
    numbers: Tensor


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
            next multiple of 16 must not reach into another one: :class:`paci_rt.optim.flat.FlatGroup` lays out such
            groups.

    Raises:
        ValueError: the segments are not such, the device is no CUDA device, or there is nothing to work on.

    Example:
        Parameters of 5 and 3 elements:

        >>> from paci_rt.kernels import FlatLayout
        >>> layout = FlatLayout([(0, 5), (16, 3)], numel=32, device=device)
        >>> layout.chunks.tolist()
        [[0, 0, 5, 0], [1, 0, 3, 16]]
    """

    def __init__(self, segments: Sequence[tuple[int, int]], numel: int, device: torch.device) -> None:
        check_runs_on(device, "the flat group")
        _check_segments(segments, numel)
        self.segments, self.numel = tuple(segments), numel
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
        self.device = self.chunks.device  # "cuda" is not equal to "cuda:0", where tensors are then
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self._tables: OrderedDict[tuple[object, ...], Entries] = OrderedDict()
        self._captured: list[Entries] = []
        self._parts: dict[tuple[int, ...], Part] = {}

    def part(self, positions: Sequence[int]) -> Part:
        """The chunks of the parameters at ``positions``, for launches that leave the others alone.

        Made once for each choice of positions, of which a program is expected to have few.

        Raises:
            ValueError: a position does not exist, or a CUDA graph is being captured and the part is not made yet.
        """
        key = tuple(positions)
        made = self._parts.get(key)
        if made is not None:
            return made
        wrong = [position for position in key if not 0 <= position < len(self.segments)]
        if wrong:
            raise ValueError(f"position {wrong[0]} does not exist: the layout has {len(self.segments)} parameters")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"the part of {len(key)} parameters was not made before the capture of a CUDA graph, and making it "
                "copies from host memory: call part() with these positions first"
            )
        numbers = [number for position in key for number in range(*self.ranges[position])]
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        there = host.to(self.device, non_blocking=True)
        made = self._parts[key] = Part(self.chunks[there], there)
        return made

    def part_of(self, only: Sequence[int] | None) -> Tensor:
        """Rows of the chunks that a launch is about; all where ``only`` is None."""
        return self.chunks if only is None else self.part(only).chunks

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
        """The gradients' addresses on the device, from an earlier call with the same ones on the same stream where
        there was one; another stream's table may not be written yet.

        Nothing waits and nothing is copied from host memory. A table that is written while a CUDA graph is captured
        belongs to that graph, whose replays write it; it is kept as long as the layout.
        """
        present = [grad for grad in grads if grad is not None]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            entries = Entries.fresh(present, codes)
            self._captured.append(entries)
            return entries
        # Allocators hand out an address again for another dtype too.
        dtype = present[0].dtype if present else None
        key = (_current_stream(self.device), dtype, *_values(present, codes))
        entries = self._tables.get(key) or Entries.fresh(present, codes)
        self._tables[key] = entries
        self._tables.move_to_end(key)
        if len(self._tables) > CACHED_TABLES:
            self._tables.popitem(last=False)
        return entries


def _current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


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
