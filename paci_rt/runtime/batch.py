"""What the user gives to one ``step`` or ``eval``: checked, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paci_rt.runtime import trees
from paci_rt.runtime.split_merge import NO_SPECS, ChunkSpecs, check_target, merge, split, split_call
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.streams import hand_to_caller
from paci_rt.wording import shown


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
        return self.loss_fn(output, trees.on_device(self.target, self.device))


@dataclass(kw_only=True)
class Batch:
    """What the user gave to one ``step`` or ``eval``, by micro-batch, and what comes out of it.

    Attributes:
        args: positional arguments of the first stage.
        kwargs: keyword arguments, by stage and micro-batch.
        losses: functions from the last stage's output to the loss.
        training: False for a forward-only pass.
        start_window: window before which the pipeline was last empty.
        last: nothing is owed after it: a drain.
        among: evaluations that travel with it, an :class:`paci_rt.runtime.evaluation.Among`.
        from_gpu: some of it is on a GPU, perhaps still to be computed there by the caller.
        modes: of forwards that an earlier step left (:mod:`paci_rt.runtime.late_forwards`), by stage and micro-batch.
    """

    args: Mapping[int, tuple[Any, ...]] = field(default_factory=dict)
    kwargs: Mapping[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)
    losses: Mapping[int, LossOf] = field(default_factory=dict)
    training: bool = True
    start_window: int = 0
    keep_outputs: bool = False
    last: bool = False
    from_gpu: bool = False
    among: Any = None
    modes: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    loss_values: dict[int, Tensor] = field(default_factory=dict)


def bind_loss(loss_fn: LossFn | None, loss_kwargs: dict[str, Any] | None) -> LossFn | None:
    """``loss_fn`` with the keyword arguments of one call.

    Raises:
        TypeError: they are no dictionary with names for keys.
    """
    if loss_kwargs is not None and (
        not isinstance(loss_kwargs, Mapping) or not all(isinstance(name, str) for name in loss_kwargs)
    ):
        raise TypeError(f"loss_kwargs is {shown(loss_kwargs)}: give a dictionary of keyword arguments for loss_fn")
    return None if loss_fn is None else partial(loss_fn, **(loss_kwargs or {}))


def cut_batch(
    stages: Sequence[PipelineStage],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: Any,
    losses: list[Tensor] | None,
    loss_fn: LossFn | None,
    indices: range,
    *,
    specs: ChunkSpecs = NO_SPECS,
    training: bool = True,
) -> Batch:
    """Check everything before anything runs, and cut it into micro-batches.

    Every rank may be given everything, and checks that it can be cut. What its stages cannot use is ignored.

    Args:
        stages: the stages of this process, in order.
        args, kwargs, target, losses: as ``Pipeline.step`` was given them.
        loss_fn: ``loss_fn(output, target)``; None computes no losses.
        indices: numbers of the micro-batches.
        specs: how inputs are cut.
        training: whether a backward follows, which needs a target.

    Raises:
        ValueError: input or target missing, or too small to be cut, or with a spec that does not fit.
        TypeError: ``losses`` is no list.
    """
    count, first, last = len(indices), stages[0], stages[-1]
    if losses is not None and not isinstance(losses, list):
        raise TypeError(f"losses is a {type(losses).__name__}: give a list, which step() fills")
    if first.is_first and not args and not kwargs:
        raise ValueError("no inputs given: the first stage needs step(x)")
    if last.is_last and target is None and training:
        raise ValueError("no target given: the last stage needs step(target=y)")
    if last.is_last and losses is not None and (target is None or loss_fn is None):
        missing = "no target" if loss_fn is not None else "no loss_fn, which was None when the schedule was made"
        raise ValueError(f"losses were asked for with {missing}: leave losses out, or give what they are computed from")
    args_parts, kwargs_parts = split_call(args, kwargs, count, specs)
    targets = None if target is None else split(target, count, "target")
    if specs.args is None and specs.kwargs is None:
        check_target(args, kwargs, target, count)
    batch = Batch(training=training)
    used: list[Any] = [kwargs]
    if first.is_first:
        batch.args = dict(zip(indices, args_parts, strict=True))
        used.append(args)
    if kwargs:
        batch.kwargs = {
            (stage.stage_index, m): part for stage in stages for m, part in zip(indices, kwargs_parts, strict=True)
        }
    if last.is_last and targets is not None and loss_fn is not None:
        batch.losses = {m: LossOf(loss_fn, part, last.device) for m, part in zip(indices, targets, strict=True)}
        used.append(target)
    batch.from_gpu = trees.on_gpu(used)
    return batch


def batch_results(batch: Batch, last: PipelineStage, losses: list[Tensor] | None, spec: Any) -> Any:
    """Fill ``losses`` and put the outputs together where ``last``, this process's last stage, is the pipeline's."""
    if last.stream is not None:
        hand_to_caller((list(batch.outputs.values()), list(batch.loss_values.values())), last.stream.device)
    if losses is not None and last.is_last:
        losses.clear()
        losses.extend(batch.loss_values[m] for m in sorted(batch.loss_values))
    if not batch.outputs:
        return None
    return merge([batch.outputs[m] for m in sorted(batch.outputs)], spec)
