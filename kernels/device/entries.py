"""Writes addresses into a table on the device.

They travel as arguments of a launch and not as a copy from host memory: nothing has to be kept until the copy is done,
nothing waits, and a CUDA graph that holds the launch holds the addresses.
"""

import triton
import triton.language as tl

PER_LAUNCH = 32
"""Entries that one launch writes."""


@triton.jit
def store_entry(entries, index, count, entry):
    """One entry, where the table goes that far."""
    tl.store(entries + index, entry, mask=index < count)


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
    store_entry(entries, first + 0, count, p0)
    store_entry(entries, first + 1, count, p1)
    store_entry(entries, first + 2, count, p2)
    store_entry(entries, first + 3, count, p3)
    store_entry(entries, first + 4, count, p4)
    store_entry(entries, first + 5, count, p5)
    store_entry(entries, first + 6, count, p6)
    store_entry(entries, first + 7, count, p7)
    store_entry(entries, first + 8, count, p8)
    store_entry(entries, first + 9, count, p9)
    store_entry(entries, first + 10, count, p10)
    store_entry(entries, first + 11, count, p11)
    store_entry(entries, first + 12, count, p12)
    store_entry(entries, first + 13, count, p13)
    store_entry(entries, first + 14, count, p14)
    store_entry(entries, first + 15, count, p15)
    store_entry(entries, first + 16, count, p16)
    store_entry(entries, first + 17, count, p17)
    store_entry(entries, first + 18, count, p18)
    store_entry(entries, first + 19, count, p19)
    store_entry(entries, first + 20, count, p20)
    store_entry(entries, first + 21, count, p21)
    store_entry(entries, first + 22, count, p22)
    store_entry(entries, first + 23, count, p23)
    store_entry(entries, first + 24, count, p24)
    store_entry(entries, first + 25, count, p25)
    store_entry(entries, first + 26, count, p26)
    store_entry(entries, first + 27, count, p27)
    store_entry(entries, first + 28, count, p28)
    store_entry(entries, first + 29, count, p29)
    store_entry(entries, first + 30, count, p30)
    store_entry(entries, first + 31, count, p31)
