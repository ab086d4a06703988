"""Weight prediction: run a forward at the weights that momentum says the backward will see.

``w - s · lr · Δ`` for ``s`` updates ahead, with Δ the momentum buffer (SGD) or ``m̂ / (√v̂ + ε)``, both moments
corrected for their bias (Adam, AdamW). SpecTrain: Chen et al., arXiv 1809.02839; for Adam: PipeOptim, arXiv 2312.00839.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from paci_rt.optim import SGD, AdamW
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.weights.base import StageWeights
from paci_rt.weights.scratch import ScratchWeights

_ADAM = (AdamW, torch.optim.Adam, torch.optim.AdamW)


_SGD = (SGD, torch.optim.SGD)


class Predictor:
    """Puts predicted weights in the place of a stage's weights for the time of a forward.

    Weights with fp32 masters are restored from those; of the others one scratch copy is kept meanwhile.

    Args:
        stage_optimizer: the stage's optimizer.

    Raises:
        ValueError: the optimizer's next steps cannot be told from its state.
    """

    def __init__(self, stage_optimizer: StageOptimizer) -> None:
        optimizer = stage_optimizer.optimizer
        known = isinstance(optimizer, (*_ADAM, *_SGD))
        still = isinstance(optimizer, _SGD) and any(group["momentum"] == 0 for group in optimizer.param_groups)
        if not known or still:
            name = type(optimizer).__name__ + (" without momentum" if still else "")
            raise ValueError(
                f"policy 'predict' cannot foresee the steps of {name}: use AdamW, Adam, or SGD with momentum above 0"
            )
        assert optimizer is not None
        self._stage_optimizer, self._optimizer = stage_optimizer, optimizer
        self._true = ScratchWeights(stage_optimizer)

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch copies."""
        return self._true.nbytes

    @contextmanager
    def ahead(self, updates: int) -> Iterator[None]:
        """Within it, the parameters are where ``updates`` more updates would bring them."""
        self._stage_optimizer.before_reading()
        options = {id(param): group for group in self._optimizer.param_groups for param in group["params"]}
        with torch.no_grad():
            for number, group in enumerate(self._stage_optimizer.groups):
                kept = self._true.kept[number]
                if kept is not None:
                    kept.copy_(group.weight)
                for position, param in enumerate(group.params):
                    state = self._stage_optimizer.state_views(number, position)
                    if state:  # parameters that were never updated stay where they are
                        step = self._direction(state, options[id(param)], param)
                        # Through the flat buffer: the version counters of the parameters stand still.
                        group.view(group.weight, position).sub_(updates * step)
        try:
            yield
        finally:
            for number in range(len(self._stage_optimizer.groups)):
                self._true.restore(number)

    def _direction(self, state: dict[str, Any], options: dict[str, Any], param: Tensor) -> Tensor:
        """One update of ``param`` as momentum alone would make it, fp32 or the parameter's dtype."""
        lr = float(options["lr"])
        if isinstance(self._optimizer, _SGD):
            buffer: Tensor | None = state.get("momentum_buffer")
            return torch.zeros_like(param) if buffer is None else lr * buffer
        beta1, beta2 = (float(beta) for beta in options["betas"])
        count = float(state["step"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        root: Tensor = (square / (1 - beta2**count)).sqrt_().add_(float(options["eps"]))
        return torch.div(mean, root).mul_(lr / (1 - beta1**count))


class PredictedWeights(StageWeights):
    """Policy ``predict``: a forward runs as many updates ahead as will come before its backward.

    Args:
        stage_optimizer: the stage's optimizer, whose momentum shows where the weights are going.
    """

    def __init__(self, stage_optimizer: StageOptimizer) -> None:
        self._predictor = Predictor(stage_optimizer)
        self.extra_bytes = self._predictor.nbytes

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        ahead = window - current  # the backward of a window runs at the version of its number
        return current, nullcontext() if ahead <= 0 else self._predictor.ahead(ahead)
