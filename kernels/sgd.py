"""SGD over a flat group, one launch; see :mod:`paci_rt.kernels.adamw` for limits and bits.

Floor, in bytes per parameter: with momentum 22 for bf16 or fp16 weights and 20 for fp32 ones, without 14 and 12; last
gradients folded in add their own 2 or 4. Looking ahead moves 14 with 16-bit weights, 20 with fp32 ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paci_rt.kernels.device.sgd import sgd_ahead_kernel, sgd_kernel
from paci_rt.kernels.layout import FlatLayout
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.update import Update

SGD = Update("sgd", sgd_kernel, sgd_ahead_kernel, state=("momentum_buffer",), stateless=True)


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
    """One step of SGD for the parameters that ``rows`` has steps of.

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
    SGD.step(layout, rows, master, weight, grad_sum, clip, grads, overwrite, only, momentum_buffer=momentum_buffer)


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
    """Put the weights where the next ``rows.repeats`` steps of SGD would bring them; state stays.

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
    SGD.ahead(layout, rows, master, weight, kept, grad_sum, only, momentum_buffer=momentum_buffer)
