"""Lion, by its sign of momentum (arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.fused import FusedOptimizer, FusedState
from paci_rt.optim.steps_native import FlatStep


class Lion(FusedOptimizer):
    """Lion (Chen et al., arXiv 2302.06675) as one native pass: the weight moves by ``lr`` against the sign of
    ``beta1 * exp_avg + (1 - beta1) * grad``, weight decay is decoupled, and the momentum ``exp_avg`` keeps a share
    ``beta2``. Zero has no sign; a NaN stays one.

    Its steps have the size of ``lr`` in every element, so rates are a third to a tenth of AdamW's, and weight decay is
    larger by as much.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of the direction and of the momentum.
        weight_decay: share of a weight, times ``lr``, that an update takes away.
        maximize: go with the sign.

    Raises:
        ValueError: a value is out of range.

    Example:
        Every weight moves by ``lr``, whatever the size of its gradient:

        >>> layer = nn.Linear(4, 2)
        >>> before = layer.weight.detach().clone()
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [layer], n_microbatches=1, loss_fn=nn.MSELoss(), optimizer=lambda params: paci_rt.Lion(params, lr=0.5)
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.full((8, 2), 9.0))
        >>> pipeline.drain()
        >>> torch.allclose(layer.weight - before, torch.tensor(0.5))
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """The momentum."""
        return FusedState(self, param_group, group, ("exp_avg",))

    def run(self, state: FusedState, positions: list[int], step: FlatStep) -> None:
        """One pass over weights, gradients and the momentum."""
        beta1, beta2 = state.param_group["betas"]
        state.steps.lion_step(**step, exp_avg=state.flat["exp_avg"], betas=(float(beta1), float(beta2)))
