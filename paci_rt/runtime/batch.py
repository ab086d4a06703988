"""What the user gives to one ``step`` or ``eval``: checked, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paci_rt.runtime import microbatch
from paci_rt.runtime.stage import LossFn, PipelineStage


@dataclass(slots=True)
class LossOf:
    """From the last stage's output to the loss of one micro-batch.

    Attributes:
        loss_fn: ``loss_fn(output, target)``.
        target: the micro-batch's part.
        device: of the last stage.
    """

    loss_fn: LossFn
    target: Any
    device: torch.device

    def __call__(self, output: Any) -> Tensor:
        return self.loss_fn(output, microbatch.on_device(self.target, self.device))


@dataclass(kw_only=True)
class Batch:
    """What the user gave to one ``step`` or ``eval``, by micro-batch, and what comes out of it.

    Attributes:
        args: positional arguments of the first stage.
        kwargs: keyword arguments, by stage and micro-batch.
        losses: functions from the last stage's output to the loss.
        training: False for a forward-only pass.
        start_window: window before which the pipeline was last empty.
        from_gpu: some of it is on a GPU, perhaps still to be computed there by the caller.
    """

    args: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)
    kwargs: Mapping[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)
    losses: Mapping[int, LossOf] = field(default_factory=dict)
    training: bool = True
    start_window: int = 0
    keep_outputs: bool = False
    from_gpu: bool = False
    outputs: dict[int, Any] = field(default_factory=dict)
    loss_values: dict[int, Tensor] = field(default_factory=dict)


def cut_batch(
    stages: Sequence[PipelineStage],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: Any,
    losses: list[Tensor] | None,
    loss_fn: LossFn | None,
    indices: range,
) -> Batch:
    """Check everything before anything runs, and cut it along dimension 0.

    Args:
        stages: the stages of this process, in order.
        args, kwargs, target, losses: as ``Pipeline.step`` was given them.
        loss_fn: ``loss_fn(output, target)``; the last stage needs one.
        indices: numbers of the micro-batches.

    Raises:
        ValueError: input or target missing, on a wrong stage, or too small to be cut.
        TypeError: ``losses`` is no list.
    """
    count, first, last = len(indices), stages[0], stages[-1]
    if args and not first.is_first:
        raise ValueError(f"inputs given to stage {first.stage_index}: only the first stage (0) takes them")
    if first.is_first and not args and not kwargs:
        raise ValueError("no inputs given: the first stage needs step(x)")
    if target is not None and not last.is_last:
        owner = last.num_stages - 1
        raise ValueError(f"target given to stage {last.stage_index}: only the last stage ({owner}) takes targets")
    if last.is_last and target is None:
        raise ValueError("no target given: the last stage needs step(target=y)")
    if losses is not None and not isinstance(losses, list):
        raise TypeError(f"losses is a {type(losses).__name__}: give a list, which step() fills")
    batch = Batch()
    if first.is_first:
        batch.args = dict(zip(indices, microbatch.split(args, count, "args"), strict=True))
    if kwargs:
        parts = microbatch.split(kwargs, count, "kwargs")
        batch.kwargs = {
            (stage.stage_index, m): part for stage in stages for m, part in zip(indices, parts, strict=True)
        }
    if last.is_last:
        assert loss_fn is not None
        targets = microbatch.split(target, count, "target")
        batch.losses = {m: LossOf(loss_fn, part, last.device) for m, part in zip(indices, targets, strict=True)}
    batch.from_gpu = microbatch.on_gpu((args, kwargs, target))
    return batch
