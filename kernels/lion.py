"""Lion (arXiv 2302.06675) over a flat group, one launch; see :mod:`paci_rt.kernels.adamw` for limits and bits.

Floor, in bytes per parameter: 22 with bf16 or fp16 weights (read the sum, master and momentum, 12; write master,
momentum and weight, 10), 20 with fp32 weights; last gradients folded in add their own 2 or 4. Looking ahead moves 14
with 16-bit weights, 20 with fp32 ones, whatever the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paci_rt.kernels.device.lion import lion_ahead_kernel, lion_kernel
from paci_rt.kernels.layout import FlatLayout
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.update import Update

LION = Update("lion", lion_kernel, lion_ahead_kernel, state=("exp_avg",))


def lion_step(
    layout: FlatLayout,
    rows: ScalarRows,
    *,
    master: Tensor,
    weight: Tensor | None,
    grad_sum: Tensor,
    exp_avg: Tensor,
    clip: Tensor | None = None,
    grads: Sequence[Tensor | None] | None = None,
    overwrite: bool | Sequence[bool] = False,
    only: Sequence[int] | None = None,
) -> None:
    """One step of Lion for the parameters that ``rows`` has steps of.

    Args:
        layout, master, weight, grad_sum, clip, grads, overwrite, only: as for :func:`paci_rt.kernels.adamw.adamw_step`.
        rows: scalars, set with :meth:`ScalarRows.set_lion`.
        exp_avg: flat fp32 momentum, zero before the first step.

    Raises:
        ValueError: as there.
    """
    LION.step(layout, rows, master, weight, grad_sum, clip, grads, overwrite, only, exp_avg=exp_avg)


def lion_ahead(
    layout: FlatLayout,
    rows: ScalarRows,
    *,
    master: Tensor,
    weight: Tensor | None,
    kept: Tensor | None,
    grad_sum: Tensor,
    exp_avg: Tensor,
    only: Sequence[int] | None = None,
) -> None:
    """Put the weights where the next ``rows.repeats`` steps of Lion would bring them; state stays.

    Args:
        layout, master, weight, kept, grad_sum, only: as for :func:`paci_rt.kernels.adamw.adamw_ahead`.
        rows: scalars of as many steps a parameter, set with ``known=``.
        exp_avg: flat fp32 momentum.

    Raises:
        ValueError: as there.
    """
    LION.ahead(layout, rows, master, weight, kept, grad_sum, only, exp_avg=exp_avg)
