"""AdamW and NAdam as one native pass over flat parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.fused import FusedOptimizer, FusedState, check_option
from paci_rt.optim.steps_native import FlatStep

ADAM_BUFFERS = ("exp_avg", "exp_avg_sq")


class AdamW(FusedOptimizer):
    """``torch.optim.AdamW`` as one native pass over flat parameters: divides the summed gradients, updates both
    moments and the weights, and rounds to bf16/fp16 parameters from fp32 masters.

    Same order of operations as torch's, so results agree to a few units in the last place of fp32. Source: Loshchilov
    and Hutter, arXiv 1711.05101.

    Args:
        params: parameters or groups, as for ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay, maximize: as there.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [layer], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=lambda params: paci_rt.AdamW(params, lr=1e-3)
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))  # the schedule takes the step
        >>> pipeline.drain()
        >>> sorted(pipeline.state_dict()["optimizer"]["weight"])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, shared)

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """First and second moments and a step count for each parameter."""
        return FusedState(self, param_group, group, ADAM_BUFFERS, {"step": 0.0})

    def run(self, state: FusedState, positions: list[int], step: FlatStep) -> None:
        """One pass over weights, gradients and both moments."""
        adam_step(state, step)


class NAdam(FusedOptimizer):
    """``torch.optim.NAdam(decoupled_weight_decay=True)`` as one native pass: AdamW's, with Nesterov's share of the
    gradient itself in the step; see :class:`AdamW`. Source: Dozat, ICLR Workshop 2016.

    Args:
        params: parameters or groups, as for ``torch.optim.NAdam``.
        lr, betas, eps, weight_decay, momentum_decay, maximize: as there.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(),
        ...     optimizer=lambda params: paci_rt.NAdam(params, lr=2e-3, weight_decay=0.01),
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> pipeline.drain()
        >>> sorted(pipeline.state_dict()["optimizer"]["weight"])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        *,
        maximize: bool = False,
    ) -> None:
        fine = 0 <= momentum_decay < math.inf
        check_option(fine, f"momentum_decay={momentum_decay}: must be finite and not negative")
        shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**shared, "momentum_decay": momentum_decay})

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """AdamW's, and for each parameter the product of the momenta of its updates."""
        return FusedState(self, param_group, group, ADAM_BUFFERS, {"step": 0.0, "mu_product": 1.0})

    def merge_options(self, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """As for all; of torch's NAdam only the one with decoupled weight decay is this one.

        Raises:
            ValueError: it has weight decay of the other kind.
        """
        if saved["weight_decay"] != 0 and not saved.get("decoupled_weight_decay", True):
            raise ValueError(
                "this is a state of torch.optim.NAdam with weight decay added to the gradient, which paci_rt.NAdam "
                "keeps apart: load one with decoupled_weight_decay=True or weight_decay=0"
            )
        return super().merge_options(own, saved)

    def run(self, state: FusedState, positions: list[int], step: FlatStep) -> None:
        """One pass over weights, gradients and both moments."""
        ahead = step.get("ahead")
        products = state.numbers["mu_product"][positions]
        sizes: list[list[tuple[float, float]]] = []
        for repeat in range(1 if ahead is None else ahead.repeats):
            numbers = [first + repeat for _, _, first in step["pieces"]]
            products, one_each = _nadam_sizes(products, numbers, state.param_group)
            sizes.append(one_each)
        adam_step(state, step, [pair for piece in zip(*sizes, strict=True) for pair in piece])
        if ahead is None:
            state.numbers["mu_product"][positions] = products


def adam_step(state: FusedState, step: FlatStep, sizes: Sequence[tuple[float, float]] = ()) -> None:
    """AdamW's step, or with step sizes NAdam's; see :class:`paci_rt.optim.steps_native.AdamWStep`."""
    beta1, beta2 = state.param_group["betas"]
    state.steps.adamw_step(
        **step,
        exp_avg=state.flat["exp_avg"],
        exp_avg_sq=state.flat["exp_avg_sq"],
        betas=(float(beta1), float(beta2)),
        eps=float(state.param_group["eps"]),
        step_sizes=sizes,
    )


def _nadam_sizes(
    products: Tensor, steps: Sequence[int], options: dict[str, Any]
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Products of the momenta up to ``steps``, from those before, and what moments and gradients are multiplied by.

    The momenta are computed one by one in double precision and the products in fp32, as torch does: both are the same
    wherever a parameter stands.
    """
    lr, beta1, decay = float(options["lr"]), float(options["betas"][0]), float(options["momentum_decay"])

    def momentum(step: int) -> float:
        return float(beta1 * (1.0 - 0.5 * 0.96 ** (step * decay)))

    now = [momentum(step) for step in steps]
    products = products * torch.tensor(now)
    sizes = []
    for step, mu, product in zip(steps, now, products.tolist(), strict=True):
        following = momentum(step + 1)
        sizes.append((lr * following / (1.0 - product * following), lr * (1.0 - mu) / (1.0 - product)))
    return products, sizes
