"""SGD over one chunk of flat buffers; see :mod:`paci_rt.kernels.device.adamw` for rows and bits."""

import triton
import triton.language as tl

from paci_rt.kernels.device.flat import block_of, load_chunk, load_flag, load_sum, spread, store_low


@triton.jit
def load_scalars(row, BLOCK: tl.constexpr):
    """What one step computes with, behind the row's flag and divisor; the last two are flags on every lane."""
    rate, decay, momentum, take = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    is_first, nesterov = spread(load_flag(row + 6), BLOCK) != 0, spread(load_flag(row + 9), BLOCK) != 0
    return rate, decay, momentum, take, is_first, nesterov


@triton.jit
def momentum_math(weight, gradient, buffer, rate, decay, momentum, take, is_first, nesterov):
    """New weight and momentum buffer."""
    gradient = gradient + decay * weight
    # The first step sets the buffer, whatever it held.
    buffer = tl.where(is_first, gradient, buffer * momentum + take * gradient)
    gradient = tl.where(nesterov, gradient + momentum * buffer, buffer)
    return weight + rate * gradient, buffer


@triton.jit
def sgd_kernel(
    master,
    low,
    grad_sum,
    buffer,
    rows,
    chunks,
    clip,
    entries,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step. ``low``, ``buffer`` (there is no momentum) and ``entries`` may be None."""
    position, start, length, offset = load_chunk(chunks)
    row = rows + position * 16
    coefficient = tl.load(clip)
    # NaN: gradients that are not finite, of which no weight takes anything.
    if (load_flag(row) != 0) & (coefficient == coefficient):
        divisor = tl.load(row + 1)
        rate, decay, momentum, take, is_first, nesterov = load_scalars(row, BLOCK)
        for at in range(0, length, BLOCK):
            lanes, here, mask, valid = block_of(offset, at, length, BLOCK)
            # All of it on its way before anything waits, as with AdamW.
            weight = tl.load(master + here, mask=mask, other=0.0)
            old = weight
            if buffer is not None:
                old = tl.load(buffer + here, mask=mask, other=0.0)
            total = load_sum(grad_sum, here, mask, entries, position, start, at, length, ELEMENT, ALIGNED, BLOCK)
            gradient = tl.div_rn(total, divisor) * coefficient
            if buffer is None:
                weight = weight + rate * (gradient + decay * weight)
            else:
                weight, later = momentum_math(weight, gradient, old, rate, decay, momentum, take, is_first, nesterov)
                tl.store(buffer + here, tl.where(valid, later, 0.0), mask=mask)
            weight = tl.where(valid, weight, 0.0)
            tl.store(master + here, weight, mask=mask)
            if low is not None:
                store_low(low, offset, lanes, weight, mask)


@triton.jit(do_not_specialize=["repeats"])
def sgd_ahead_kernel(
    master,
    low,
    kept,
    grad_sum,
    buffer,
    rows,
    chunks,
    repeats: tl.int32,
    BLOCK: tl.constexpr,
):
    """``repeats`` steps with momentum on copies in registers; only weights are written, as with AdamW."""
    position, _, length, offset = load_chunk(chunks)
    first = rows + position * repeats * 16
    if load_flag(first) != 0:
        divisor, share = tl.load(first + 1), tl.load(first + 8)
        known = spread(load_flag(first + 7), BLOCK) != 0
        for at in range(0, length, BLOCK):
            lanes, here, mask, valid = block_of(offset, at, length, BLOCK)
            weight = tl.load(master + here, mask=mask, other=0.0)
            old = tl.load(buffer + here, mask=mask, other=0.0)
            total = tl.load(grad_sum + here, mask=mask & known, other=0.0)
            if low is None:
                tl.store(kept + here, weight, mask=mask)
            gradient = tl.where(known, tl.div_rn(total, divisor), old * share)
            for repeat in range(repeats):
                rate, decay, momentum, take, is_first, nesterov = load_scalars(first + repeat * 16, BLOCK)
                weight, old = momentum_math(weight, gradient, old, rate, decay, momentum, take, is_first, nesterov)
            weight = tl.where(valid, weight, 0.0)
            if low is None:
                tl.store(master + here, weight, mask=mask)
            else:
                store_low(low, offset, lanes, weight, mask)
