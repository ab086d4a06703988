"""Forwards of a step's micro-batches that run in a later step, or in a drain: what they need is kept for them.

Under an asynchronous schedule in a V, a rank runs its later stage's forward some micro-batches behind its earlier
stage's. So when a step returns, the last micro-batches of its batch have still to pass the later stages: keyword
arguments, targets and the mode that they were given in are theirs, and so is the list that takes their losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor

from paci_rt.action import Action, Op
from paci_rt.runtime.batch import Batch, LossOf
from paci_rt.runtime.modes import Mode
from paci_rt.runtime.stage import PipelineStage

Key = tuple[int, int]
"""Stage and micro-batch."""


class LateForwards:
    """What is kept from step to step.

    Args:
        stages: of this process, in the order of the model.
    """

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        self._stages = list(stages)
        self._kwargs: dict[Key, Mapping[str, Any]] = {}
        self._targets: dict[int, LossOf] = {}
        self._modes: dict[Key, Mode] = {}
        self._lists: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._modes)

    def join(self, batch: Batch) -> None:
        """Give ``batch``, of a step or a drain, what is left of those before."""
        if self._modes:
            batch.losses = {**self._targets, **batch.losses}
            batch.kwargs = {**self._kwargs, **batch.kwargs}
            batch.modes = self._modes

    def keep(
        self, batch: Batch, indices: range, streams: Iterable[Sequence[Action]], losses: list[Tensor] | None
    ) -> None:
        """After a step over micro-batches ``indices``, or a drain over none: hand out the losses that came, and keep
        what is still needed.

        Args:
            losses: the list that the step was given.
        """
        ran = {(one.stage, one.index) for one in chain.from_iterable(streams) if one.op is Op.F}
        left = {key: mode for key, mode in self._modes.items() if key not in ran}
        for stage in self._stages:
            left |= {(at, m): stage.mode for m in indices if (at := stage.stage_index, m) not in ran}
        self._modes = left
        self._kwargs = {key: batch.kwargs[key] for key in left if key in batch.kwargs}
        last = self._stages[-1].stage_index
        self._targets = {m: batch.losses[m] for at, m in left if at == last and m in batch.losses}
        if losses is not None and self._stages[-1].is_last:
            losses.clear()
            self._lists |= dict.fromkeys(indices, losses)
        for m in sorted(batch.loss_values):
            given = self._lists.pop(m, None)
            if given is not None:
                given.append(batch.loss_values[m])


@contextmanager
def as_given(stage: PipelineStage, mode: Mode) -> Iterator[None]:
    """Within it, ``stage`` runs under the ``mode`` of the step that gave a micro-batch."""
    now = stage.mode
    if mode is now:
        yield
        return
    with mode.resumed(now):
        stage.mode = mode
        try:
            yield
        finally:
            stage.mode = now
