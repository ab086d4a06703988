"""Weight gradient of a linear layer, a matrix product that ends in the flat fp32 sum."""

import triton
import triton.language as tl

from paci_rt.kernels.device.flat import spread


@triton.jit
def column_sums(bias, dy, rows, n, stride, overwrite, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of ``COLUMNS`` columns of dY, the bias' gradient; every lane adds its rows in order."""
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    lines = tl.arange(0, ROWS)
    stride = tl.cast(stride, tl.int64)  # changes something under the interpreter, which does not look at annotations
    here = dy + lines[:, None] * stride + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # A column is read by one program alone, so it needs many bytes on their way: five blocks of rows.
    for at in tl.range(0, rows, ROWS, num_stages=6):
        mask = (at + lines < rows)[:, None] & (columns < n)[None, :]
        total += tl.load(here, mask=mask, other=0.0).to(tl.float32)
        here += ROWS * stride
    fresh = tl.sum(total, 0)
    adds = spread(overwrite, COLUMNS) == 0
    old = tl.load(bias + columns, mask=(columns < n) & adds, other=0.0)
    tl.store(bias + columns, tl.where(adds, old + fresh, fresh), mask=columns < n)


@triton.jit
def add_tile(front, total, out, into, n, k, overwrite, COLUMNS: tl.constexpr):
    """Adds a tile of a product to dW, or puts it there."""
    here = front + out.to(tl.int64)[:, None] * k + into[None, :]
    mask = (out < n)[:, None] & (into < k)[None, :]
    adds = (spread(overwrite, COLUMNS) == 0)[None, :]
    old = tl.load(here, mask=mask & adds, other=0.0)
    tl.store(here, tl.where(adds, old + total, total), mask=mask)


@triton.jit
def product_tile(
    front,
    dy,
    x,
    rows,
    n,
    k,
    stride_dy,
    stride_x,
    overwrite,
    tile,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``OUT`` x ``IN`` elements of dW = dY^T X, over all rows."""
    # Tiles of GROUP rows of dW go column by column, so that programs that run together share what they read.
    tiles_n, tiles_k = tl.cdiv(n, OUT), tl.cdiv(k, IN)
    group = tile // (GROUP * tiles_k)
    height = tl.minimum(tiles_n - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_k)
    out = (group * GROUP + within % height) * OUT + tl.arange(0, OUT)
    into = (within // height) * IN + tl.arange(0, IN)
    lines = tl.arange(0, ROWS)
    stride_dy, stride_x = tl.cast(stride_dy, tl.int64), tl.cast(stride_x, tl.int64)
    left = dy + lines[:, None] * stride_dy + out[None, :]
    right = x + lines[:, None] * stride_x + into[None, :]
    total = tl.zeros([OUT, IN], tl.float32)
    for at in range(0, rows, ROWS):
        inside = (at + lines < rows)[:, None]
        a = tl.load(left, mask=inside & (out < n)[None, :], other=0.0)
        b = tl.load(right, mask=inside & (into < k)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
        left += ROWS * stride_dy
        right += ROWS * stride_x
    # In halves: a tile and what it is added to, together, would take the registers that a second program on the
    # multiprocessor needs, or more than there are.
    into = (within // height) * IN + tl.arange(0, IN // 2)
    low, high = tl.split(tl.permute(tl.reshape(total, (OUT, 2, IN // 2)), (0, 2, 1)))
    add_tile(front, low, out, into, n, k, overwrite, IN // 2)
    add_tile(front, high, out, into + IN // 2, n, k, overwrite, IN // 2)


@triton.jit(do_not_specialize=["rows", "overwrite"])
def bias_kernel(
    bias,
    dy,
    rows: tl.int32,
    n,
    stride: tl.int64,
    overwrite: tl.int32,
    BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
):
    """The bias' gradient alone, beside a product that another library computes."""
    column_sums(bias, dy, rows, n, stride, overwrite, tl.program_id(0), BIAS_ROWS, BIAS_COLUMNS)


@triton.jit(do_not_specialize=["rows", "overwrite", "overwrite_bias"])
def wgrad_kernel(
    front,
    bias,
    dy,
    x,
    rows: tl.int32,
    n,
    k,
    stride_dy: tl.int64,
    stride_x: tl.int64,
    overwrite: tl.int32,
    overwrite_bias: tl.int32,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
):
    """dW (fp32 [n, k]) and, unless it is None, bias (fp32 [n]), from dY [rows, n] and X [rows, k].

    Strides are 64 bits wide: of a slice, blocks of rows can lie more than 2^31 elements apart.
    """
    if bias is None:
        tile = tl.program_id(0)
        product_tile(front, dy, x, rows, n, k, stride_dy, stride_x, overwrite, tile, ROWS, OUT, IN, GROUP)
    else:
        # The few programs that sum columns come first: as the last ones they would be waited for.
        blocks = tl.cdiv(n, BIAS_COLUMNS)
        program = tl.program_id(0)
        if program < blocks:
            column_sums(bias, dy, rows, n, stride_dy, overwrite_bias, program, BIAS_ROWS, BIAS_COLUMNS)
        else:
            tile = program - blocks
            product_tile(front, dy, x, rows, n, k, stride_dy, stride_x, overwrite, tile, ROWS, OUT, IN, GROUP)
