"""NAdam over a flat group, one launch: AdamW's kernel with what the gradient itself moves the weight by.

Floors, limits and bits are those of :mod:`paci_rt.kernels.adamw`: 30 bytes per parameter with bf16 or fp16 weights, 28
with fp32 ones, 32 with the last gradients folded in beside 16-bit weights; looking ahead 18 and 24. Weight decay is
decoupled, as with ``torch.optim.NAdam(decoupled_weight_decay=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.kernels.adamw import launch, launch_ahead
from paci_rt.kernels.layout import Entries, FlatLayout
from paci_rt.kernels.rows import ScalarRows, check_rows
from paci_rt.kernels.update import check_ahead, check_buffers, check_clip, check_grads, check_weight


def nadam_step(
    layout: FlatLayout,
    rows: ScalarRows,
    *,
    master: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    clip: Tensor | None = None,
    grads: Sequence[Tensor | None] | None = None,
    overwrite: bool | Sequence[bool] = False,
    only: Sequence[int] | None = None,
) -> None:
    """One step of the parameters that ``rows`` has steps of.

    Args:
        layout, master, weight, grad_sum, exp_avg, exp_avg_sq, clip, grads, overwrite, only: as for
            :func:`paci_rt.kernels.adamw.adamw_step`.
        rows: scalars, set with :meth:`ScalarRows.set_nadam`.

    Raises:
        ValueError: a tensor does not fit the layout, or the rows are another optimizer's.

    Example:
        >>> from paci_rt.kernels import FlatLayout, ScalarRows, nadam_step
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout)
        >>> options = {"lr": 0.25, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "divisor": 1}
        >>> rows.set_nadam([1], step_sizes=[(0.0, 0.25)], **options)  # by the gradient alone
        >>> weight, grad_sum = torch.ones(16, device=device), torch.full((16,), 8.0, device=device)
        >>> mean, square = torch.zeros(16, device=device), torch.zeros(16, device=device)
        >>> nadam_step(layout, rows, master=weight, weight=None, grad_sum=grad_sum, exp_avg=mean, exp_avg_sq=square)
        >>> round(weight[0].item(), 4)
        0.75
    """
    rows.require("nadam")
    check_buffers(layout, master=master, grad_sum=grad_sum, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_weight(layout, weight)
    table, clip = check_rows(rows, layout), check_clip(layout, clip)
    codes = check_grads(layout, weight, grads, overwrite)
    state = (master, weight, grad_sum, exp_avg, exp_avg_sq, table, layout.part_of(only), clip)
    present = [grad for grad in grads or () if grad is not None]
    if torch.compiler.is_compiling():
        torch.ops.paci_rt.nadam(*state, present, codes)
    else:
        entries = layout.entries(grads, codes) if grads is not None and codes else Entries()
        launch(*state, entries, nesterov=True)


def nadam_ahead(
    layout: FlatLayout,
    rows: ScalarRows,
    *,
    master: Tensor,
    weight: Tensor | None,
    kept: Tensor | None,
    grad_sum: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    only: Sequence[int] | None = None,
) -> None:
    """Put the weights where the next ``rows.repeats`` steps with these gradients would bring them; state stays.

    Args:
        layout, master, weight, kept, grad_sum, exp_avg, exp_avg_sq, only: as for
            :func:`paci_rt.kernels.adamw.adamw_ahead`.
        rows: scalars of as many steps a parameter, set with ``known=``.

    Raises:
        ValueError: a tensor does not fit the layout, none or both of ``weight`` and ``kept``, or the rows are another
            optimizer's.

    Example:
        >>> from paci_rt.kernels import FlatLayout, ScalarRows, nadam_ahead
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout, repeats=2)
        >>> options = {"lr": 0.25, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "divisor": 1}
        >>> rows.set_nadam([1], step_sizes=[(0.0, 0.25)] * 2, **options)
        >>> weight, kept = torch.ones(16, device=device), torch.zeros(16, device=device)
        >>> grad_sum = torch.ones(16, device=device)
        >>> state = {"exp_avg": torch.zeros(16, device=device), "exp_avg_sq": torch.zeros(16, device=device)}
        >>> nadam_ahead(layout, rows, master=weight, weight=None, kept=kept, grad_sum=grad_sum, **state)
        >>> round(weight[0].item(), 4), kept[0].item()
        (0.5, 1.0)
    """
    rows.require("nadam")
    check_buffers(layout, master=master, grad_sum=grad_sum, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_ahead(layout, weight, kept)
    state = (master, weight, kept, grad_sum, exp_avg, exp_avg_sq, check_rows(rows, layout), layout.part_of(only))
    if torch.compiler.is_compiling():
        torch.ops.paci_rt.nadam_ahead(*state, rows.repeats)
    else:
        launch_ahead(*state, rows.repeats, nesterov=True)


@torch.library.custom_op(
    "paci_rt::nadam",
    mutates_args=("master", "weight", "exp_avg", "exp_avg_sq"),
    schema="(Tensor(a!) master, Tensor(b!)? weight, Tensor grad_sum, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq,"
    " Tensor rows, Tensor chunks, Tensor clip, Tensor[] grads, int[] codes) -> ()",
)
def _nadam_op(
    master: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    chunks: Tensor,
    clip: Tensor,
    grads: list[Tensor],
    codes: list[int],
) -> None:
    entries = Entries.fresh(grads, codes)
    launch(master, weight, grad_sum, exp_avg, exp_avg_sq, rows, chunks, clip, entries, nesterov=True)


@torch.library.custom_op(
    "paci_rt::nadam_ahead",
    mutates_args=("master", "weight", "kept"),
    schema="(Tensor(a!) master, Tensor(b!)? weight, Tensor(c!)? kept, Tensor grad_sum, Tensor exp_avg,"
    " Tensor exp_avg_sq, Tensor rows, Tensor chunks, int repeats) -> ()",
)
def _ahead_op(
    master: Tensor,
    weight: Tensor | None,
    kept: Tensor | None,
    grad_sum: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    chunks: Tensor,
    repeats: int,
) -> None:
    launch_ahead(master, weight, kept, grad_sum, exp_avg, exp_avg_sq, rows, chunks, repeats, nesterov=True)


@_nadam_op.register_fake
def _nadam_fake(*args: object) -> None:
    return None


@_ahead_op.register_fake
def _ahead_fake(*args: object) -> None:
    return None
