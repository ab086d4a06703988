"""AdamW and NAdam over one chunk of flat buffers. What computes has its twin in ``csrc/cpu/kernels_isa.cpp``.

A *row* holds the scalars of one parameter and one step, 16 fp32; ``paci_rt.kernels.rows`` writes it. Nothing may be
contracted into fused multiply-adds (the wrappers see to it) and division and root are the correctly rounded ones, so
that the bits are those of the CPU kernels.
"""

import triton
import triton.language as tl

from paci_rt.kernels.device.flat import block_of, load_chunk, load_flag, load_sum, spread, store_low


@triton.jit
def load_scalars(row, BLOCK: tl.constexpr):
    """What one step computes with, behind the row's flag and divisor; the last one is a flag on every lane."""
    decay, beta1, share1 = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    beta2, share2, unbias2 = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    eps, step = tl.load(row + 8), tl.load(row + 9)
    lerp = spread(load_flag(row + 12), BLOCK) != 0
    return decay, beta1, share1, beta2, share2, unbias2, eps, step, lerp


@triton.jit
def adamw_math(weight, gradient, mean, square, row, NESTEROV: tl.constexpr, BLOCK: tl.constexpr):
    """New weight, first and second moment."""
    # Read anew for every block, from the nearest cache: kept in registers they would crowd out others.
    decay, beta1, share1, beta2, share2, unbias2, eps, step, lerp = load_scalars(row, BLOCK)
    change = gradient - mean
    # torch's lerp: which of two equal formulas, depends on the gradient's share.
    mean = tl.where(lerp, mean + share1 * change, gradient - change * beta1)
    square = square * beta2 + (share2 * gradient) * gradient
    denominator = tl.sqrt_rn(square) * unbias2 + eps
    weight = weight * decay
    move = step * mean
    if NESTEROV:
        fresh = tl.load(row + 13)
        # A size that is or was rounded to 0 leaves the sign of a zero alone, as the CPU kernels do.
        move = tl.where(spread(fresh, BLOCK) != 0, move + fresh * gradient, move)
    return weight + tl.div_rn(move, denominator), mean, square


@triton.jit
def adamw_kernel(
    master,
    low,
    grad_sum,
    exp_avg,
    exp_avg_sq,
    rows,
    chunks,
    clip,
    entries,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """One step, NAdam's with ``NESTEROV``. ``low`` (bf16/fp16 weights) and ``entries`` (last gradients, dtype
    ``ELEMENT``) may be None."""
    position, start, length, offset = load_chunk(chunks)
    row = rows + position * 16
    coefficient = tl.load(clip)
    # NaN: gradients that are not finite, of which no weight takes anything.
    if (load_flag(row) != 0) & (coefficient == coefficient):
        divisor = tl.load(row + 1)
        for at in range(0, length, BLOCK):
            lanes, here, mask, valid = block_of(offset, at, length, BLOCK)
            # All of it on its way before anything waits: a division is many instructions with branches among them,
            # across which the compiler moves no load.
            weight = tl.load(master + here, mask=mask, other=0.0)
            mean = tl.load(exp_avg + here, mask=mask, other=0.0)
            square = tl.load(exp_avg_sq + here, mask=mask, other=0.0)
            total = load_sum(grad_sum, here, mask, entries, position, start, at, length, ELEMENT, ALIGNED, BLOCK)
            gradient = tl.div_rn(total, divisor) * coefficient
            weight, mean, square = adamw_math(weight, gradient, mean, square, row, NESTEROV, BLOCK)
            # Padding is zero and stays zero, also where eps is 0.
            weight = tl.where(valid, weight, 0.0)
            tl.store(master + here, weight, mask=mask)
            tl.store(exp_avg + here, tl.where(valid, mean, 0.0), mask=mask)
            tl.store(exp_avg_sq + here, tl.where(valid, square, 0.0), mask=mask)
            if low is not None:
                store_low(low, offset, lanes, weight, mask)


@triton.jit(do_not_specialize=["repeats"])
def adamw_ahead_kernel(
    master,
    low,
    kept,
    grad_sum,
    exp_avg,
    exp_avg_sq,
    rows,
    chunks,
    repeats: tl.int32,
    BLOCK: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """``repeats`` steps on copies in registers; only weights are written: ``low``, or where it is None the fp32 weights
    themselves, after what they were has gone to ``kept``."""
    position, _, length, offset = load_chunk(chunks)
    first = rows + position * repeats * 16
    if load_flag(first) != 0:
        divisor, unbias1 = tl.load(first + 1), tl.load(first + 11)
        known = spread(load_flag(first + 10), BLOCK) != 0
        for at in range(0, length, BLOCK):
            lanes, here, mask, valid = block_of(offset, at, length, BLOCK)
            weight = tl.load(master + here, mask=mask, other=0.0)
            mean = tl.load(exp_avg + here, mask=mask, other=0.0)
            square = tl.load(exp_avg_sq + here, mask=mask, other=0.0)
            total = tl.load(grad_sum + here, mask=mask & known, other=0.0)
            if low is None:
                tl.store(kept + here, weight, mask=mask)
            gradient = tl.where(known, tl.div_rn(total, divisor), mean * unbias1)
            for repeat in range(repeats):
                row = first + repeat * 16
                weight, mean, square = adamw_math(weight, gradient, mean, square, row, NESTEROV, BLOCK)
            weight = tl.where(valid, weight, 0.0)
            if low is None:
                tl.store(master + here, weight, mask=mask)
            else:
                store_low(low, offset, lanes, weight, mask)
