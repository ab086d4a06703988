"""What all kernels over flat buffers share: chunks, gradients behind a table of addresses, rounding.

A *chunk* is a run of at most ``CHUNK`` elements of one parameter. Its row in the chunk table, four int64, holds the
parameter's position, where the chunk starts in the parameter, its length, and where it starts in the flat buffers.
Flat buffers are padded to 16 elements after every parameter, so their loads and stores are masked in steps of 16, which
leaves them 128 bits wide; gradients end where they end.

All accesses give a thread four neighbouring elements: 128 bits of fp32, 64 of bf16 and fp16. Eight, and so 128 bits of
the latter, would make the compiler shuffle fp32 values through shared memory or leave gaps between threads.
"""

import triton
import triton.language as tl

PAD = tl.constexpr(16)  # elements that the end of a parameter is padded to in flat buffers


@triton.jit
def load_chunk(chunks):
    """Row of this program: position, start, length (int32), flat offset."""
    row = chunks + tl.program_id(0).to(tl.int64) * 4
    position = tl.load(row)
    start = tl.multiple_of(tl.load(row + 1), PAD)
    length = tl.load(row + 2).to(tl.int32)
    offset = tl.multiple_of(tl.load(row + 3), PAD)
    return position, start, length, offset


@triton.jit
def load_flag(pointer):
    """A scalar of a row that is 0 or 1, as int32."""
    return tl.load(pointer).to(tl.int32)


@triton.jit
def spread(scalar, SIZE: tl.constexpr):
    """A scalar on every lane. Masks and choices compare after it and not before: what the interpreter makes of a
    comparison of scalars is no mask."""
    return tl.full([SIZE], 0, scalar.dtype) + scalar


@triton.jit
def padded(length):
    """Length up to and with the padding."""
    return tl.multiple_of((length + (PAD - 1)) // PAD * PAD, PAD)


@triton.jit
def block_of(offset, at, length, BLOCK: tl.constexpr):
    """The ``BLOCK`` elements of a chunk from ``at`` on: where they are in the chunk and in the flat buffers, which of
    them are in the buffers at all (padding included), and which are the parameter's."""
    lanes = tl.arange(0, BLOCK)
    return at + lanes, offset + at + lanes, at + lanes < padded(length), at + lanes < length


@triton.jit
def load_gradient(entry, start, at, length, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """``BLOCK`` elements of a gradient as fp32, zeros behind its end and where there is no gradient.

    ``entry`` is the gradient's address, 0 where there is none; its lowest bit, which no address uses, says that the
    gradient overwrites the sum.
    """
    base = (entry & -2).to(tl.pointer_type(ELEMENT)) + start
    if ALIGNED:
        # Said of the sum: the compiler forgets what it knows of an integer when that becomes a pointer.
        base = tl.multiple_of(base, ELEMENT.primitive_bitwidth // 2)
    here = base + at + tl.arange(0, BLOCK)
    present = spread(entry, BLOCK) != 0
    if at + BLOCK <= length:
        # The mask is the same for all lanes, so the load stays as wide as the alignment allows.
        fresh = tl.load(here, mask=present, other=0.0)
    else:
        fresh = tl.load(here, mask=present & (at + tl.arange(0, BLOCK) < length), other=0.0)
    return fresh.to(tl.float32)


@triton.jit
def round_bf16(x):
    """fp32 to bf16, to nearest even; every NaN becomes 0x7fc0, as the CPU kernels make it.

    In integers, because the interpreter's own conversion truncates.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def add_last(
    grad_sum, here, mask, entry, start, at, length, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum in the buffer with the gradient at ``entry``."""
    adds = spread(entry & 1, BLOCK) == 0
    total = tl.load(grad_sum + here, mask=mask & adds, other=0.0)
    fresh = load_gradient(entry, start, at, length, ELEMENT, ALIGNED, BLOCK)
    # Without a gradient the sum stays as it is: adding a zero would turn -0 into 0.
    return tl.where(spread(entry, BLOCK) == 0, total, tl.where(adds, total + fresh, fresh))


@triton.jit
def load_sum(
    grad_sum,
    here,
    mask,
    entries,
    position,
    start,
    at,
    length,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The window's sum, and with ``entries`` its last gradient, which is not in the buffer yet."""
    if entries is None:
        total = tl.load(grad_sum + here, mask=mask, other=0.0)
    else:
        entry = tl.load(entries + position)
        total = add_last(grad_sum, here, mask, entry, start, at, length, ELEMENT, ALIGNED, BLOCK)
    return total


@triton.jit
def store_low(low, offset, lanes, x, mask):
    """Stores fp32 values as bf16 or fp16, rounded to nearest even."""
    # Claims no more alignment than four elements need, so that the compiler does not make it eight.
    pointers = tl.multiple_of(low + offset, 8) + lanes
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, round_bf16(x), mask=mask)
    else:
        tl.store(pointers, x.to(tl.float16), mask=mask)
