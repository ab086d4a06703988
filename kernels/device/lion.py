"""Lion over one chunk of flat buffers; see :mod:`paci_rt.kernels.device.adamw` for rows and bits."""

import triton
import triton.language as tl

from paci_rt.kernels.device.flat import block_of, load_chunk, load_flag, load_sum, spread, store_low


@triton.jit
def lion_math(weight, gradient, mean, row):
    """New weight and momentum."""
    decay, beta1, share1 = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    beta2, share2, rate = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    direction = mean * beta1 + share1 * gradient
    # Zero has no sign, and neither has NaN, which must not be hidden.
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, direction))
    return weight * decay + rate * sign, mean * beta2 + share2 * gradient


@triton.jit
def lion_kernel(
    master,
    low,
    grad_sum,
    exp_avg,
    rows,
    chunks,
    clip,
    entries,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step. ``low`` (bf16/fp16 weights) and ``entries`` (last gradients, dtype ``ELEMENT``) may be None."""
    position, start, length, offset = load_chunk(chunks)
    row = rows + position * 16
    coefficient = tl.load(clip)
    # NaN: gradients that are not finite, of which no weight takes anything.
    if (load_flag(row) != 0) & (coefficient == coefficient):
        divisor = tl.load(row + 1)
        for at in range(0, length, BLOCK):
            lanes, here, mask, valid = block_of(offset, at, length, BLOCK)
            # All of it on its way before anything waits, as with AdamW.
            weight = tl.load(master + here, mask=mask, other=0.0)
            mean = tl.load(exp_avg + here, mask=mask, other=0.0)
            total = load_sum(grad_sum, here, mask, entries, position, start, at, length, ELEMENT, ALIGNED, BLOCK)
            gradient = tl.div_rn(total, divisor) * coefficient
            weight, mean = lion_math(weight, gradient, mean, row)
            # Padding is zero and stays zero.
            weight = tl.where(valid, weight, 0.0)
            tl.store(master + here, weight, mask=mask)
            tl.store(exp_avg + here, tl.where(valid, mean, 0.0), mask=mask)
            if low is not None:
                store_low(low, offset, lanes, weight, mask)


@triton.jit(do_not_specialize=["repeats"])
def lion_ahead_kernel(
    master,
    low,
    kept,
    grad_sum,
    exp_avg,
    rows,
    chunks,
    repeats: tl.int32,
    BLOCK: tl.constexpr,
):
    """``repeats`` steps on copies in registers; only weights are written, as with AdamW."""
    position, _, length, offset = load_chunk(chunks)
    first = rows + position * repeats * 16
    if load_flag(first) != 0:
        divisor = tl.load(first + 1)
        known = spread(load_flag(first + 8), BLOCK) != 0
        for at in range(0, length, BLOCK):
            lanes, here, mask, valid = block_of(offset, at, length, BLOCK)
            weight = tl.load(master + here, mask=mask, other=0.0)
            mean = tl.load(exp_avg + here, mask=mask, other=0.0)
            total = tl.load(grad_sum + here, mask=mask & known, other=0.0)
            if low is None:
                tl.store(kept + here, weight, mask=mask)
            gradient = tl.where(known, tl.div_rn(total, divisor), mean)
            for repeat in range(repeats):
                weight, mean = lion_math(weight, gradient, mean, first + repeat * 16)
            weight = tl.where(valid, weight, 0.0)
            if low is None:
                tl.store(master + here, weight, mask=mask)
            else:
                store_low(low, offset, lanes, weight, mask)
