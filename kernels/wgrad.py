"""Weight gradient of a linear layer straight into the flat fp32 sum: dW += dY^T X, with the bias' gradient beside it.

Floor, in bytes per weight: 8 (read and write the sum), 4 where the first micro-batch of a window overwrites; the two
factors are read once more each, ``2 rows (n + k)`` bytes in all for 16-bit ones. A product in bf16 that is accumulated
afterwards moves 12 bytes per weight and rounds the product to bf16, which this does not.

Two routes: the Triton kernel of :mod:`paci_rt.kernels.device.wgrad` with one of its tiles, and cuBLAS, which adds to an
fp32 matrix by itself. :class:`WgradRoutes` measures which is faster, shape by shape.

Limits: 2-D factors with unit stride along a row; bf16 or fp16 for Triton, fp32 too for cuBLAS, which needs a torch
whose ``addmm`` adds products of those to an fp32 matrix (``out_dtype``, torch 2.10 or later).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from paci_rt.kernels.device.wgrad import bias_kernel, wgrad_kernel
from paci_rt.kernels.launch import INTERPRETED, OPTIONS, check_runs_on, on_device, operator
from paci_rt.kernels.tiles import BIAS_COLUMNS, BIAS_WARPS, TILES, bias_constants

CUBLAS = "cublas"
TRITON_ROUTES = tuple(f"triton:{tile.name}" for tile in TILES)
_TILES = {f"triton:{tile.name}": tile for tile in TILES}

LARGEST = 2**31 - 1024
"""Extents are 32 bits wide, and a tile may reach beyond them."""


@cache
def adds_low_precision(device: torch.device) -> bool:
    """Whether this torch can add a product of bf16 or fp16 matrices to an fp32 matrix in one call.

    2.8 and 2.9 have the operator, but want the summand to be of the factors' dtype
    (https://github.com/pytorch/pytorch/pull/167931 changed that). Asked with empty matrices: nothing is launched.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    total = torch.empty(0, 0, device=device)
    factor = torch.empty(0, 0, dtype=torch.bfloat16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, factor, factor, torch.float32, out=total)
    except RuntimeError as error:
        if "same dtype" not in str(error):
            raise
        return False
    return True


def routes_for(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """Routes that can run factors of a dtype on a device.

    Args:
        dtype: of both factors.
        device: where they are.

    Returns:
        Names such as ``cublas``; none where nothing can run them.

    Example:
        >>> from paci_rt.kernels import routes_for
        >>> routes_for(torch.float32, device)
        ('cublas',)
        >>> routes_for(torch.float16, device)[0].startswith("triton:")
        True
    """
    triton_routes = TRITON_ROUTES if dtype in (torch.bfloat16, torch.float16) else ()
    low_precision = bool(triton_routes) and adds_low_precision(device)
    return triton_routes + ((CUBLAS,) if dtype is torch.float32 or low_precision else ())


def default_route(dtype: torch.dtype, device: torch.device) -> str:
    """The route taken unless another one was measured to be faster: cuBLAS where it can run, since what is chosen must
    not differ between the processes of a run, whose results would then differ in their last bits.

    Raises:
        ValueError: no route can run factors of that dtype.
    """
    routes = routes_for(dtype, device)
    if not routes:
        raise ValueError(f"no route computes weight gradients of {dtype} on {device}: use fp32, bf16 or fp16")
    return CUBLAS if CUBLAS in routes else routes[0]


def wgrad(
    front: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    overwrite: bool,
    bias: Tensor | None = None,
    overwrite_bias: bool | None = None,
    route: str = TRITON_ROUTES[0],
) -> None:
    """``front += dy^T x`` and ``bias += dy.sum(0)``, both summed in fp32 and rounded once.

    Args:
        front: fp32 [n, k], contiguous: the weight's part of the flat sums.
        dy: [rows, n], gradient of the layer's output; all leading dimensions flattened into rows.
        x: [rows, k], the layer's input, of the same dtype.
        overwrite: the first micro-batch of a window; ``front`` may hold anything then.
        bias: fp32 [n], contiguous: the bias' part of the flat sums, or None.
        overwrite_bias: as ``overwrite``, for the bias; None: the same.
        route: one of :func:`routes_for`.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit, or the route cannot run them.

    Example:
        >>> from paci_rt.kernels import routes_for, wgrad
        >>> dy, x = torch.ones(6, 2, device=device), torch.full((6, 3), 0.5, device=device)
        >>> front, bias = torch.empty(2, 3, device=device), torch.empty(2, device=device)
        >>> route = routes_for(x.dtype, device)[0]
        >>> wgrad(front, dy, x, overwrite=True, bias=bias, route=route)
        >>> wgrad(front, dy, x, overwrite=False, route=route)
        >>> front.tolist(), bias.tolist()
        ([[6.0, 6.0, 6.0], [6.0, 6.0, 6.0]], [6.0, 6.0])
    """
    _check(front, dy, x, bias)
    first_bias = overwrite if overwrite_bias is None else overwrite_bias
    if torch.compiler.is_compiling():
        _wgrad_op(front, bias, dy, x, overwrite, first_bias, route)
    else:
        _run(front, bias, dy, x, overwrite, first_bias, route)


def _check(front: Tensor, dy: Tensor, x: Tensor, bias: Tensor | None) -> None:
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0] or front.shape != (dy.shape[-1], x.shape[-1]):
        raise ValueError(
            f"dy {tuple(dy.shape)}, x {tuple(x.shape)} and front {tuple(front.shape)} do not fit: they must be "
            "[rows, n], [rows, k] and [n, k]; flatten leading dimensions first"
        )
    if dy.dtype is not x.dtype:
        raise ValueError(f"dy has dtype {dy.dtype}, x {x.dtype}: cast one of them")
    if dy.stride(1) != 1 or x.stride(1) != 1:
        raise ValueError(f"dy has strides {dy.stride()}, x {x.stride()}: call .contiguous() on what is transposed")
    if max(dy.shape[0], *front.shape, dy.stride(0), x.stride(0)) > LARGEST:
        raise ValueError(f"dy {tuple(dy.shape)} and x {tuple(x.shape)}: no extent may exceed {LARGEST}; cut the rows")
    sums = {"front": front, "bias": bias}
    for name, tensor in sums.items():
        if tensor is not None and (tensor.dtype is not torch.float32 or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} is {tensor.dtype} with strides {tensor.stride()}: it must be contiguous and torch.float32, a "
                "view of the flat sums"
            )
    if bias is not None and bias.shape != dy.shape[1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, dy {tuple(dy.shape)}: bias must be [{dy.shape[1]}]")
    if len({tensor.device for tensor in (front, dy, x, bias) if tensor is not None}) != 1:
        raise ValueError(f"front is on {front.device}, dy on {dy.device}, x on {x.device}: keep all on one device")


def _run(
    front: Tensor, bias: Tensor | None, dy: Tensor, x: Tensor, overwrite: bool, overwrite_bias: bool, route: str
) -> None:
    if route not in routes_for(dy.dtype, dy.device):
        raise ValueError(
            f"route={route!r} cannot run {dy.dtype} factors on {dy.device}: choose one of "
            f"{', '.join(routes_for(dy.dtype, dy.device)) or 'none; use bf16 or fp16 factors on a CUDA device'}"
        )
    if route == CUBLAS:
        _cublas(front, dy, x, overwrite)
        if bias is not None:
            _bias(bias, dy, overwrite_bias)
        return
    check_runs_on(front.device, "front")
    tile, (rows, n), k = _TILES[route], dy.shape, x.shape[1]
    programs = triton.cdiv(n, tile.out) * triton.cdiv(k, tile.into)
    programs += 0 if bias is None else triton.cdiv(n, BIAS_COLUMNS)
    if programs == 0:
        return
    with on_device(front):
        wgrad_kernel[(programs,)](
            front,
            bias,
            dy,
            x,
            rows,
            n,
            k,
            dy.stride(0),
            x.stride(0),
            int(overwrite),
            int(overwrite_bias),
            **tile.constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **OPTIONS,
        )


def _cublas(front: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
    # In place: torch hands front to cuBLAS as C and as D, with beta 1 or 0. It takes no out= where autograd looks on.
    dy, x = dy.detach(), x.detach()
    if dy.dtype is torch.float32:
        if overwrite:
            torch.mm(dy.t(), x, out=front)
        else:
            torch.addmm(front, dy.t(), x, out=front)
    elif overwrite:
        torch.ops.aten.mm.dtype_out(dy.t(), x, torch.float32, out=front)
    else:
        torch.ops.aten.addmm.dtype_out(front, dy.t(), x, torch.float32, out=front)


def _bias(bias: Tensor, dy: Tensor, overwrite: bool) -> None:
    if not dy.is_cuda and not INTERPRETED:
        total = dy.float().sum(0)
        bias.copy_(total if overwrite else bias + total)
        return
    with on_device(bias):
        bias_kernel[(triton.cdiv(dy.shape[1], BIAS_COLUMNS),)](
            bias,
            dy,
            dy.shape[0],
            dy.shape[1],
            dy.stride(0),
            int(overwrite),
            **bias_constants(dy.element_size()),
            num_warps=BIAS_WARPS,
            **OPTIONS,
        )


_wgrad_op = operator(
    "paci_rt::wgrad",
    _run,
    ("front", "bias"),
    "(Tensor(a!) front, Tensor(b!)? bias, Tensor dy, Tensor x, bool overwrite, bool overwrite_bias, str route) -> ()",
)
