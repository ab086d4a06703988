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
        ValueError: a tensor does not fit the layout, or the rows are another optimizer's.

    Example:
        With fp16 weights, whose fp32 masters are updated:

        >>> from paci_rt.kernels import FlatLayout, ScalarRows, lion_step
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout)
        >>> rows.set_lion([1], lr=0.25, betas=(0.9, 0.99), weight_decay=0.0, divisor=1)
        >>> master, weight = torch.ones(16, device=device), torch.ones(16, dtype=torch.float16, device=device)
        >>> state = {"grad_sum": torch.full((16,), -8.0, device=device), "exp_avg": torch.zeros(16, device=device)}
        >>> lion_step(layout, rows, master=master, weight=weight, **state)
        >>> weight[0].item(), master[0].item()  # against the sign of the gradient
        (1.25, 1.25)
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
        ValueError: a tensor does not fit the layout, none or both of ``weight`` and ``kept``, or the rows are another
            optimizer's.

    Example:
        >>> from paci_rt.kernels import FlatLayout, ScalarRows, lion_ahead
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout, repeats=2)
        >>> rows.set_lion([1], lr=0.25, betas=(0.9, 0.99), weight_decay=0.0, divisor=1)
        >>> weight, kept = torch.ones(16, device=device), torch.zeros(16, device=device)
        >>> state = {"grad_sum": torch.ones(16, device=device), "exp_avg": torch.zeros(16, device=device)}
        >>> lion_ahead(layout, rows, master=weight, weight=None, kept=kept, **state)
        >>> weight[0].item(), kept[0].item()
        (0.5, 1.0)
    """
    LION.ahead(layout, rows, master, weight, kept, grad_sum, only, exp_avg=exp_avg)
