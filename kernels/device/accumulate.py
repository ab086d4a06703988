"""Gradients into flat fp32 sums, and the statistics of the sums."""

import triton
import triton.language as tl

from paci_rt.kernels.device.flat import PAD, load_chunk, load_gradient, padded, spread


@triton.jit
def count_in(square, count, total):
    """Sums of squares and numbers of non-finite elements, lane by lane, with those of ``total`` (fp32) in them."""
    # The square of an fp32 value is exact in fp64, and nothing finite overflows.
    wide = total.to(tl.float64)
    nonfinite = (total.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    return square + wide * wide, count + nonfinite.to(tl.int32)


@triton.jit
def accumulate_kernel(
    front,
    squares,
    nonfinite,
    entries,
    chunks,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk: add or overwrite, and leave the chunk's sum of squares (fp64) and number of non-finite elements."""
    position, start, length, offset = load_chunk(chunks)
    entry = tl.load(entries + position)
    if entry != 0:
        adds = spread(entry & 1, BLOCK) == 0
        lanes = tl.arange(0, BLOCK)
        square = tl.zeros([BLOCK], tl.float64)
        count = tl.zeros([BLOCK], tl.int32)
        for at in range(0, length, BLOCK):
            mask = at + lanes < padded(length)
            # A masked load moves nothing, so that an overwrite costs no read.
            old = tl.load(front + offset + at + lanes, mask=mask & adds, other=0.0)
            fresh = load_gradient(entry, start, at, length, ELEMENT, ALIGNED, BLOCK)
            total = tl.where(adds, old + fresh, fresh)
            tl.store(front + offset + at + lanes, total, mask=mask)
            square, count = count_in(square, count, total)
        # One slot a chunk: whoever runs first, the sums are added up in the same order.
        tl.store(squares + tl.program_id(0), tl.sum(square, 0))
        tl.store(nonfinite + tl.program_id(0), tl.sum(count, 0))


@triton.jit
def measure_kernel(front, squares, nonfinite, numbers, chunks, BLOCK: tl.constexpr):
    """The statistics of one chunk as it is, for sums that another kernel wrote; ``numbers`` names the chunks."""
    number = tl.load(numbers + tl.program_id(0))
    row = chunks + number * 4
    length = tl.load(row + 2).to(tl.int32)
    offset = tl.multiple_of(tl.load(row + 3), PAD)
    lanes = tl.arange(0, BLOCK)
    square = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for at in range(0, length, BLOCK):
        total = tl.load(front + offset + at + lanes, mask=at + lanes < padded(length), other=0.0)
        square, count = count_in(square, count, total)
    tl.store(squares + number, tl.sum(square, 0))
    tl.store(nonfinite + number, tl.sum(count, 0))


@triton.jit
def totals_kernel(totals, squares, nonfinite, count, BLOCK: tl.constexpr):
    """Adds up ``count`` slots in one program: lane by lane in order, then over the lanes."""
    lanes = tl.arange(0, BLOCK)
    square = tl.zeros([BLOCK], tl.float64)
    number = tl.zeros([BLOCK], tl.int64)
    for at in range(0, count, BLOCK):
        mask = at + lanes < count
        square += tl.load(squares + at + lanes, mask=mask, other=0.0)
        number += tl.load(nonfinite + at + lanes, mask=mask, other=0).to(tl.int64)
    tl.store(totals, tl.sum(square, 0))
    tl.store(totals + 1, tl.sum(number, 0).to(tl.float64))
