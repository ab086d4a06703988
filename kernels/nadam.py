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

    Arguments and errors are those of :func:`paci_rt.kernels.adamw.adamw_step`; the rows are set with
    :meth:`ScalarRows.set_nadam`.
    """
    NADAM.step(layout, rows, **tensors)


@same_arguments(adamw_ahead)
def nadam_ahead(layout: FlatLayout, rows: ScalarRows, **tensors: Any) -> None:
    """Put the weights where the next ``rows.repeats`` steps of NAdam would bring them; state stays.

    Arguments and errors are those of :func:`paci_rt.kernels.adamw.adamw_ahead`; the rows are set with
    :meth:`ScalarRows.set_nadam`.
    """
    NADAM.ahead(layout, rows, **tensors)
