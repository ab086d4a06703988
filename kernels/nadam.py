"""NAdam over a flat group, one launch: AdamW's kernel with what the gradient itself moves the weight by.

Floors, limits and bits are those of :mod:`paci_rt.kernels.adamw`: 30 bytes per parameter with bf16 or fp16 weights, 28
with fp32 ones, 32 with the last gradients folded in beside 16-bit weights; looking ahead 18 and 24. Weight decay is
decoupled, as with ``torch.optim.NAdam(decoupled_weight_decay=True)``.
"""

from __future__ import annotations

from typing import Any

from paci_rt.kernels.adamw import adamw_ahead, adamw_step
from paci_rt.kernels.device.adamw import adamw_ahead_kernel, adamw_kernel
from paci_rt.kernels.layout import FlatLayout
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.update import Update, same_arguments

NADAM = Update("nadam", adamw_kernel, adamw_ahead_kernel, state=("exp_avg", "exp_avg_sq"), NESTEROV=True)


@same_arguments(adamw_step)
def nadam_step(layout: FlatLayout, rows: ScalarRows, **tensors: Any) -> None:
    """One step of NAdam for the parameters that ``rows`` has steps of.

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
    NADAM.step(layout, rows, **tensors)


@same_arguments(adamw_ahead)
def nadam_ahead(layout: FlatLayout, rows: ScalarRows, **tensors: Any) -> None:
    """Put the weights where the next ``rows.repeats`` steps of NAdam would bring them; state stays.

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
    NADAM.ahead(layout, rows, **tensors)
