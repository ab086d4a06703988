"""Writes addresses into a table on the device.

They travel as arguments of a launch and not as a copy from host memory: nothing has to be kept until the copy is done,
nothing waits, and a CUDA graph that holds the launch holds the addresses.
"""

import triton
import triton.language as tl

PER_LAUNCH = 32
"""Entries that one launch writes."""


@triton.jit
def store_four(entries, first, count, a, b, c, d, AT: tl.constexpr):
    """Four entries from ``first + AT`` on, where the table goes that far."""
    tl.store(entries + (first + AT), a, mask=first + AT < count)
    tl.store(entries + (first + (AT + 1)), b, mask=first + (AT + 1) < count)
    tl.store(entries + (first + (AT + 2)), c, mask=first + (AT + 2) < count)
    tl.store(entries + (first + (AT + 3)), d, mask=first + (AT + 3) < count)


@triton.jit(do_not_specialize=["first", "count", *(f"p{i}" for i in range(PER_LAUNCH))])
def entries_kernel(
    entries,
    first: tl.int32,
    count: tl.int32,
    p0: tl.int64,
    p1: tl.int64,
    p2: tl.int64,
    p3: tl.int64,
    p4: tl.int64,
    p5: tl.int64,
    p6: tl.int64,
    p7: tl.int64,
    p8: tl.int64,
    p9: tl.int64,
    p10: tl.int64,
    p11: tl.int64,
    p12: tl.int64,
    p13: tl.int64,
    p14: tl.int64,
    p15: tl.int64,
    p16: tl.int64,
    p17: tl.int64,
    p18: tl.int64,
    p19: tl.int64,
    p20: tl.int64,
    p21: tl.int64,
    p22: tl.int64,
    p23: tl.int64,
    p24: tl.int64,
    p25: tl.int64,
    p26: tl.int64,
    p27: tl.int64,
    p28: tl.int64,
    p29: tl.int64,
    p30: tl.int64,
    p31: tl.int64,
):
    """Writes entries ``first`` to ``first + 31``, as far as the table of ``count`` goes."""
    store_four(entries, first, count, p0, p1, p2, p3, 0)
    store_four(entries, first, count, p4, p5, p6, p7, 4)
    store_four(entries, first, count, p8, p9, p10, p11, 8)
    store_four(entries, first, count, p12, p13, p14, p15, 12)
    store_four(entries, first, count, p16, p17, p18, p19, 16)
    store_four(entries, first, count, p20, p21, p22, p23, 20)
    store_four(entries, first, count, p24, p25, p26, p27, 24)
    store_four(entries, first, count, p28, p29, p30, p31, 28)
