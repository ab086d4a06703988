"""SGD as one native pass over flat parameters."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.fused import FusedOptimizer, FusedState, check_option
from paci_rt.optim.steps_native import FlatStep


class SGD(FusedOptimizer):
    """``torch.optim.SGD`` as one native pass over flat parameters; see :class:`paci_rt.AdamW`.

    Args:
        params: parameters or groups, as for ``torch.optim.SGD``.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as there.

    Raises:
        ValueError: a value is out of range, or Nesterov momentum without momentum or with dampening.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [layer], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=lambda params: paci_rt.SGD(params, lr=0.25)
        ... )
        >>> _ = pipeline.step(torch.ones(4, 2), target=torch.ones(4, 1))  # the gradient is -2 in both weights
        >>> pipeline.drain()
        >>> layer.weight.tolist()
        [[0.5, 0.5]]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        check_option(0 <= momentum < math.inf, f"momentum={momentum}: must be finite and not negative")
        check_option(math.isfinite(dampening), f"dampening={dampening}: must be finite")
        check_option(
            not nesterov or (momentum > 0 and dampening == 0),
            f"nesterov=True needs momentum above 0 and dampening 0, got momentum={momentum}, dampening={dampening}",
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """A momentum buffer, or nothing where the group has no momentum."""
        names = ("momentum_buffer",) if float(param_group["momentum"]) != 0 else ()
        return FusedState(self, param_group, group, names)

    def merge_options(self, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """As for all; a group that a schedule took without momentum has no buffer for it.

        Raises:
            ValueError: the saved momentum would need one.
        """
        if self.fused_states and float(own["momentum"]) == 0 and float(saved["momentum"]) != 0:
            raise ValueError(
                f"the state was saved with momentum={saved['momentum']}, and this SGD was given to a schedule without: "
                "construct it with momentum above 0"
            )
        return super().merge_options(own, saved)

    def run(self, state: FusedState, positions: list[int], step: FlatStep) -> None:
        """One pass over weights, gradients and the momentum buffer, which the first update of a parameter sets.

        Raises:
            ValueError: there is momentum, but there was none when the schedule took the optimizer.
        """
        options = state.param_group
        momentum = float(options["momentum"])
        if momentum != 0 and "momentum_buffer" not in state.flat:
            raise ValueError(
                "the momentum of a parameter group became non-zero after the optimizer was given to a schedule: "
                "construct SGD with momentum above 0"
            )
        state.steps.sgd_step(
            **step,
            momentum_buffer=state.flat.get("momentum_buffer"),
            momentum=momentum,
            dampening=float(options["dampening"]),
            nesterov=bool(options["nesterov"]),
        )
