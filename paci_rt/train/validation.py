"""The loss over the held-back set, with the pipeline drained or full."""

from __future__ import annotations

import torch
from torch import Tensor

from paci_rt.runtime.engine import Pipeline


class Validation:
    """A fixed held-back set, and the pipeline that is to be asked about it.

    Args:
        pipeline: of the run.
        x, y: inputs and targets, int64 ``[sequences, seq]``.
        batch_size: sequences at a time, which the pipeline cuts as it cuts a window.
    """

    def __init__(self, pipeline: Pipeline, x: Tensor, y: Tensor, batch_size: int) -> None:
        self._pipeline = pipeline
        self._batches = list(zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True))
        self._losses: list[list[Tensor]] = []

    def ask(self, *, drained: bool) -> None:
        """Evaluate now, after a drain, or within the next step; :meth:`answer` comes after that."""
        self._losses = [[] for _ in self._batches]
        for (x, y), losses in zip(self._batches, self._losses, strict=True):  # [batch, seq]
            if self._pipeline.stages[0].device.type != "cpu":
                x, y = x.pin_memory(), y.pin_memory()
            args = (x,) if self._pipeline.has_first else ()
            target = y if self._pipeline.has_last else None
            self._pipeline.eval(*args, target=target, losses=losses, return_outputs=False, drained=drained)

    def answer(self) -> Tensor | None:
        """Mean nats per token, a scalar; None off the last stage."""
        if not self._pipeline.has_last:
            return None
        # Micro-batches are equal, see TrainConfig.
        return torch.stack([torch.stack(losses).mean() for losses in self._losses]).mean()


def evaluate(pipeline: Pipeline, x: Tensor, y: Tensor, batch_size: int) -> float | None:
    """Mean nats per token over sequences x and their targets y, int64 ``[sequences, seq]``, after a drain; None off the
    last stage."""
    validation = Validation(pipeline, x, y, batch_size)
    validation.ask(drained=True)
    answer = validation.answer()
    return None if answer is None else float(answer)
