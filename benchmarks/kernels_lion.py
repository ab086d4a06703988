"""Lion by torch's list operations, the rival of ours in ``kernels.py``: torch has no Lion of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ForeachLion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675) as one writes it in a few lines, all parameters in each operation.

    Args:
        params: parameters.
        lr, betas, weight_decay: as in :class:`paci_rt.optim.Lion`.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of the parameters that have a gradient."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
            grads, moments = [param.grad for param in params], [self.state[param]["exp_avg"] for param in params]
            lr, (beta1, beta2) = group["lr"], group["betas"]
            directions = torch._foreach_lerp(grads, moments, beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-lr)
            torch._foreach_lerp_(moments, grads, 1.0 - beta2)
