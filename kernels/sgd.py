"""SGD over a flat group, one launch; see :mod:`paci_rt.kernels.adamw` for limits and bits.

Floor, in bytes per parameter: with momentum 22 for bf16 or fp16 weights and 20 for fp32 ones, without 14 and 12; last
gradients folded in add their own 2 or 4. Looking ahead moves 14 with 16-bit weights, 20 with fp32 ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.kernels.device.sgd import sgd_ahead_kernel, sgd_kernel
from paci_rt.kernels.elements import element
from paci_rt.kernels.launch import BLOCK, UPDATE_WARPS, on_device, options
from paci_rt.kernels.layout import Entries, FlatLayout
from paci_rt.kernels.rows import ScalarRows, check_rows
from paci_rt.kernels.update import check_ahead, check_buffers, check_clip, check_grads, check_weight


def sgd_step(
    layout: FlatLayout,
    rows: ScalarRows,
    *,
    master: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    momentum_buffer: Tensor | None,
    clip: Tensor | None = None,
    grads: Sequence[Tensor | None] | None = None,
    overwrite: bool | Sequence[bool] = False,
    only: Sequence[int] | None = None,
) -> None:
    """One step of the parameters that ``rows`` has steps of.

    Args:
        layout, master, weight, grad_sum, clip, grads, overwrite, only: as for :func:`paci_rt.kernels.adamw.adamw_step`.
        rows: scalars, set with :meth:`ScalarRows.set_sgd`.
        momentum_buffer: flat fp32; None steps without momentum, whatever the rows say.

    Raises:
        ValueError: a tensor does not fit the layout, or the rows are another optimizer's.

    Example:
        >>> from paci_rt.kernels import FlatLayout, ScalarRows, sgd_step
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout)
        >>> options = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
        >>> rows.set_sgd([1], lr=0.25, divisor=4, **options)
        >>> weight, grad_sum = torch.ones(16, device=device), torch.full((16,), 8.0, device=device)
        >>> sgd_step(layout, rows, master=weight, weight=None, grad_sum=grad_sum, momentum_buffer=None)
        >>> weight[0].item()
        0.5
    """
    rows.require("sgd")
    check_buffers(layout, master=master, grad_sum=grad_sum, momentum_buffer=momentum_buffer)
    check_weight(layout, weight)
    table, clip = check_rows(rows, layout), check_clip(layout, clip)
    codes = check_grads(layout, weight, grads, overwrite)
    state = (master, weight, grad_sum, momentum_buffer, table, layout.part_of(only), clip)
    present = [grad for grad in grads or () if grad is not None]
    if torch.compiler.is_compiling():
        torch.ops.paci_rt.sgd(*state, present, codes)
    else:
        _launch(*state, layout.entries(grads, codes) if grads is not None and codes else Entries())


def sgd_ahead(
    layout: FlatLayout,
    rows: ScalarRows,
    *,
    master: Tensor,
    weight: Tensor | None,
    kept: Tensor | None,
    grad_sum: Tensor,
    momentum_buffer: Tensor,
    only: Sequence[int] | None = None,
) -> None:
    """Put the weights where the next ``rows.repeats`` steps with these gradients would bring them; state stays.

    Args:
        layout, master, weight, kept, grad_sum, only: as for :func:`paci_rt.kernels.adamw.adamw_ahead`.
        rows: scalars of as many steps a parameter, set with ``known=``.
        momentum_buffer: flat fp32; without momentum there is nothing to look ahead by.

    Raises:
        ValueError: a tensor does not fit the layout, none or both of ``weight`` and ``kept``, or the rows are another
            optimizer's.

    Example:
        >>> from paci_rt.kernels import FlatLayout, ScalarRows, sgd_ahead
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout, repeats=2)
        >>> options = {"momentum": 0.5, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
        >>> rows.set_sgd([1], lr=0.25, divisor=1, **options)
        >>> weight, kept = torch.ones(16, device=device), torch.zeros(16, device=device)
        >>> state = {"grad_sum": torch.ones(16, device=device), "momentum_buffer": torch.zeros(16, device=device)}
        >>> sgd_ahead(layout, rows, master=weight, weight=None, kept=kept, **state)
        >>> weight[0].item(), kept[0].item()  # 0.25 and then 0.25 * 1.5
        (0.375, 1.0)
    """
    rows.require("sgd")
    check_buffers(layout, master=master, grad_sum=grad_sum, momentum_buffer=momentum_buffer)
    check_ahead(layout, weight, kept)
    state = (master, weight, kept, grad_sum, momentum_buffer, check_rows(rows, layout), layout.part_of(only))
    if torch.compiler.is_compiling():
        torch.ops.paci_rt.sgd_ahead(*state, rows.repeats)
    else:
        _launch_ahead(*state, rows.repeats)


def _launch(
    master: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor,
    chunks: Tensor,
    clip: Tensor,
    entries: Entries,
) -> None:
    if chunks.shape[0] == 0:
        return
    with on_device(master):
        sgd_kernel[(chunks.shape[0],)](
            master,
            weight,
            grad_sum,
            momentum_buffer,
            rows,
            chunks,
            clip,
            entries.table,
            ELEMENT=element(entries.dtype),
            ALIGNED=entries.aligned,
            BLOCK=BLOCK,
            **options(UPDATE_WARPS),
        )


def _launch_ahead(
    master: Tensor,
    weight: Tensor | None,
    kept: Tensor | None,
    grad_sum: Tensor,
    momentum_buffer: Tensor,
    rows: Tensor,
    chunks: Tensor,
    repeats: int,
) -> None:
    if chunks.shape[0] == 0:
        return
    with on_device(master):
        sgd_ahead_kernel[(chunks.shape[0],)](
            master, weight, kept, grad_sum, momentum_buffer, rows, chunks, repeats, BLOCK=BLOCK, **options(UPDATE_WARPS)
        )


@torch.library.custom_op(
    "paci_rt::sgd",
    mutates_args=("master", "weight", "momentum_buffer"),
    schema="(Tensor(a!) master, Tensor(b!)? weight, Tensor grad_sum, Tensor(c!)? momentum_buffer, Tensor rows,"
    " Tensor chunks, Tensor clip, Tensor[] grads, int[] codes) -> ()",
)
def _sgd_op(
    master: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor,
    chunks: Tensor,
    clip: Tensor,
    grads: list[Tensor],
    codes: list[int],
) -> None:
    _launch(master, weight, grad_sum, momentum_buffer, rows, chunks, clip, Entries.fresh(grads, codes))


@torch.library.custom_op(
    "paci_rt::sgd_ahead",
    mutates_args=("master", "weight", "kept"),
    schema="(Tensor(a!) master, Tensor(b!)? weight, Tensor(c!)? kept, Tensor grad_sum, Tensor momentum_buffer,"
    " Tensor rows, Tensor chunks, int repeats) -> ()",
)
def _ahead_op(
    master: Tensor,
    weight: Tensor | None,
    kept: Tensor | None,
    grad_sum: Tensor,
    momentum_buffer: Tensor,
    rows: Tensor,
    chunks: Tensor,
    repeats: int,
) -> None:
    _launch_ahead(master, weight, kept, grad_sum, momentum_buffer, rows, chunks, repeats)


@_sgd_op.register_fake
def _sgd_fake(*args: object) -> None:
    return None


@_ahead_op.register_fake
def _ahead_fake(*args: object) -> None:
    return None
