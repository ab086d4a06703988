"""AdamW over a flat group, one launch.

Floor, in bytes per parameter: 30 with bf16 or fp16 weights (read the sum, master and both moments, 16; write master,
moments and weight, 14), 28 with fp32 weights. With the window's last gradients folded in, accumulation and update
together move 32 with 16-bit weights and gradients, where apart they move 40. Looking ahead moves 18 with 16-bit
weights, 24 with fp32 ones, whatever the number of steps.

The arithmetic is that of the CPU kernels to the bit: true divisions, correctly rounded roots, nothing contracted.

Limits: flat buffers of one :class:`~paci_rt.kernels.layout.FlatLayout`, state in fp32, last gradients of the weights'
dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paci_rt.kernels.device.adamw import adamw_ahead_kernel, adamw_kernel
from paci_rt.kernels.layout import FlatLayout
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.update import Update

ADAMW = Update("adamw", adamw_kernel, adamw_ahead_kernel, state=("exp_avg", "exp_avg_sq"), NESTEROV=False)


def adamw_step(
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
    """One step of AdamW for the parameters that ``rows`` has steps of.

    Args:
        layout: the flat group.
        rows: scalars, set with :meth:`ScalarRows.set_adamw`.
        master: flat fp32 weights, or the fp32 parameters themselves.
        weight: flat bf16 or fp16 parameters, which receive the rounded result; None where they are fp32.
        grad_sum: flat fp32 sums of gradients.
        exp_avg: flat fp32 first moments.
        exp_avg_sq: flat fp32 second moments.
        clip: fp32 [1] on the device, multiplies the divided gradients; see
            :func:`paci_rt.kernels.accumulate.clip_coefficient`. Where it is NaN, nothing is written.
        grads: gradients of the window's last micro-batch that are not in ``grad_sum`` yet, one a parameter; they are
            added on the way, and ``grad_sum`` stays as it is.
        overwrite: with ``grads``: they are the first of their window, and ``grad_sum`` does not count; for all, or one
            flag a parameter.
        only: positions of the parameters that the launch is about; None is all. The others are left alone, whatever
            the rows say, and cost nothing.

    Raises:
        ValueError: a tensor does not fit the layout, see the limits above, or the rows are another optimizer's.

    Example:
        The first step moves every fp32 weight by ``lr``:

        >>> from paci_rt.kernels import FlatLayout, ScalarRows, adamw_step
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout)
        >>> rows.set_adamw([1], lr=0.25, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, divisor=4)
        >>> weight, grad_sum = torch.ones(16, device=device), torch.full((16,), 8.0, device=device)
        >>> mean, square = torch.zeros(16, device=device), torch.zeros(16, device=device)
        >>> adamw_step(layout, rows, master=weight, weight=None, grad_sum=grad_sum, exp_avg=mean, exp_avg_sq=square)
        >>> round(weight[0].item(), 4)
        0.75
    """
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    ADAMW.step(layout, rows, master, weight, grad_sum, clip, grads, overwrite, only, **state)


def adamw_ahead(
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
    """Put the weights where the next ``rows.repeats`` steps of AdamW would bring them; state stays.

    Args:
        layout: the flat group.
        rows: scalars of as many steps a parameter, set with ``known=``.
        master: flat fp32 weights; written only where ``weight`` is None.
        weight: flat bf16 or fp16 parameters, written; None where they are fp32.
        kept: flat fp32, receives fp32 parameters as they were; None with ``weight``, whose masters stay.
        grad_sum: flat fp32 sums of the gradients that are in.
        exp_avg: flat fp32 first moments.
        exp_avg_sq: flat fp32 second moments.
        only: as for :func:`adamw_step`.

    Raises:
        ValueError: a tensor does not fit the layout, none or both of ``weight`` and ``kept``, or the rows are another
            optimizer's.

    Example:
        Where three steps with the same gradient would bring fp32 weights, which stay in ``kept``:

        >>> from paci_rt.kernels import FlatLayout, ScalarRows, adamw_ahead
        >>> layout = FlatLayout([(0, 16)], numel=16, device=device)
        >>> rows = ScalarRows(layout, repeats=3)
        >>> rows.set_adamw([1], lr=0.25, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, divisor=1)
        >>> weight, kept = torch.ones(16, device=device), torch.zeros(16, device=device)
        >>> grad_sum = torch.ones(16, device=device)
        >>> state = {"exp_avg": torch.zeros(16, device=device), "exp_avg_sq": torch.zeros(16, device=device)}
        >>> adamw_ahead(layout, rows, master=weight, weight=None, kept=kept, grad_sum=grad_sum, **state)
        >>> round(weight[0].item(), 4), kept[0].item()
        (0.25, 1.0)
    """
    ADAMW.ahead(layout, rows, master, weight, kept, grad_sum, only, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
