"""Evaluation: after a drain, or by forwards that travel among the micro-batches of the next step."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paci_rt.action import Action
from paci_rt.clock import HostClock
from paci_rt.runtime.batch import Batch, batch_results, cut_batch
from paci_rt.runtime.modes import Settings, modules_of, settings_now
from paci_rt.runtime.pipeline_view import PipelineView
from paci_rt.runtime.random_state import RandomState, generators_of
from paci_rt.runtime.split_merge import ChunkSpecs
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.trees import map_tensors
from paci_rt.schedules.evaluation import evaluation_forwards, goes_among, prove, with_evaluation


@dataclass(kw_only=True)
class Evaluation:
    """One call of ``eval`` whose forwards have not run yet.

    Attributes:
        batch: what it was given, copied, by the numbers of its micro-batches.
        indices: these numbers, which go on from one evaluation to the next.
        losses: to fill, on the last stage.
        settings: of torch, when it was asked for.
    """

    batch: Batch
    indices: range
    losses: list[Tensor] | None
    settings: Settings


@dataclass
class Among:
    """The evaluations that one step carries.

    Attributes:
        evaluations: in their order.
        stages: of this process.
        alone: all its stages are of one rank, so nothing else runs between these forwards.
        spent_s: seconds that this process has spent on evaluation within steps so far.
        began_s: when the first forward on the last stage began, on ``time.perf_counter``, without what these
            evaluations took before it on other stages of this process.
    """

    evaluations: Sequence[Evaluation]
    stages: Sequence[PipelineStage]
    alone: bool
    spent_s: Callable[[], float]
    began_s: float = 0.0
    _batches: dict[int, Batch] = field(default_factory=dict)
    _held: ExitStack = field(default_factory=ExitStack)
    _left: int = 0

    def __post_init__(self) -> None:
        self._batches = {m: one.batch for one in self.evaluations for m in one.indices}
        self._before_s = self.spent_s()
        self._total = self._left = len(self._batches) * len(self.stages)

    def batch_of(self, index: int) -> Batch:
        """What micro-batch ``index`` is part of."""
        return self._batches[index]

    @contextmanager
    def apart(self, stage: PipelineStage) -> Iterator[None]:
        """Within it, a forward on ``stage`` evaluates; see :func:`evaluating`."""
        if stage.is_last and not self.began_s:
            self.began_s = time.perf_counter() - (self.spent_s() - self._before_s)
        if not self.alone:
            with evaluating([stage]):
                yield
            return
        if self._left == self._total:
            self._held.enter_context(evaluating(self.stages))
        self._left -= 1
        try:
            yield
        except BaseException:
            self._left = 0
            raise
        finally:
            if self._left == 0:
                self._held.close()


@contextmanager
def evaluating(stages: Sequence[PipelineStage]) -> Iterator[None]:
    """Within it, modules are in evaluation mode, and random numbers that are drawn are not those of the training."""
    modules = modules_of([stage.submod for stage in stages])
    training = [module for module in modules if module.training]
    own = generators_of(modules)
    random = {device: RandomState.take(device, own) for device in {stage.device for stage in stages}}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for device, state in random.items():
            state.put(device)


class PipelineEvaluation(PipelineView):
    """The part of :class:`paci_rt.runtime.engine.Pipeline` that evaluates."""

    _clocks: dict[torch.device, HostClock]
    _has_backward: bool
    _specs: ChunkSpecs
    _queued: list[Evaluation]
    _proved: set[int]
    _evaluated: int
    _windows_per_step: int
    evaluation_began_s = 0.0
    """When the last evaluation within a step began on the last stage, see :class:`Among`."""

    @property
    def evaluation_s(self) -> float:
        """Seconds that this process spent on evaluation among training, as far as they are known."""
        return sum(runtime.audit.evaluation_s for runtime in self._executor.runtimes.values())

    @abstractmethod
    def _bind_loss(self, loss_kwargs: dict[str, Any] | None) -> LossFn | None: ...

    @abstractmethod
    def _run(self, streams: dict[int, list[Action]], batch: Batch) -> None: ...

    def eval(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        drained: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Forward only, without gradients; arguments and result as for :meth:`step`.

        Without ``target`` it gives outputs and no losses. After a drain the modules stay in their mode: call
        ``module.eval()`` first where that matters.

        With ``drained=False`` nothing runs now and nothing is returned. The forwards travel among the micro-batches of
        the next :meth:`step`, or run in :meth:`drain` if that comes first, and ``losses`` is filled then. The batch is
        copied. They change nothing of what is trained: modules are in evaluation mode for them, and random numbers
        that they draw are not those of the training. They see the weights as they are after the updates of all steps
        before, as after a drain, under schedules that flush, and under the others where a window has more micro-batches
        than any stage runs ahead (``a >= P``); else stages differ by at most the drift bound.

        Raises:
            ValueError: as :meth:`step`; ``drained=False`` without a place for losses on the last stage, or under a
                schedule that has several stages a rank and does not flush.
        """
        self._check_usable()
        loss_fn = self._bind_loss(loss_kwargs)
        drained = drained or not self._has_backward
        family, shape = self._lowering.family, self._lowering.shape
        if not drained and not goes_among(shape, flush=family.flush):
            raise ValueError(
                f"eval(drained=False) under {family.name}: with {shape.chunks} stages a rank and no flush, evaluations "
                "have no place among the micro-batches; leave drained=False out"
            )
        if not drained and self.stages[-1].is_last and (losses is None or target is None):
            raise ValueError("eval(drained=False) gives losses and nothing else: give target= and losses=, a list")
        if not drained and any(losses is one.losses for one in self._queued if losses is not None):
            raise ValueError("eval(drained=False) was given a list of losses that waits for another one: give its own")
        first = 0 if drained else self._evaluated
        indices = range(first, first + self._n_microbatches)
        cut = {"specs": self._specs, "training": False}
        batch = cut_batch(self.stages, args, kwargs, target, losses, loss_fn, indices, **cut)  # type: ignore[arg-type]
        one = Evaluation(batch=batch, indices=indices, losses=losses, settings=settings_now())
        if drained:
            self.drain()
            return self._evaluate(one, return_outputs)
        self._evaluated = indices.stop
        _copy(batch)
        if losses is not None:
            losses.clear()
        self._queued.append(one)
        return None

    def _evaluate(self, one: Evaluation, return_outputs: bool) -> Any:
        """Run an evaluation in an empty pipeline."""
        one.batch.keep_outputs = return_outputs
        first, count = one.indices.start, len(one.indices)
        streams = {rank: self._lowering.forward_only(rank, first, count) for rank in self._ranks}
        clock = self._clocks[self.stages[-1].device]
        begin = clock.mark()
        self._run(streams, one.batch)
        # Statistics are about training.
        clock.between(begin, clock.mark(), lambda start, end: self._executor.leave_out(end - start))
        self._executor.transport.flush()  # the caller may close the pipeline, or end the process
        return batch_results(one.batch, self.stages[-1], one.losses, self._specs.outputs)

    def _evaluate_queued(self) -> None:
        """Run what waits for a step, in an empty pipeline."""
        queued, self._queued = self._queued, []
        for one in queued:
            with evaluating(self.stages):
                self._evaluate(one, False)

    def _carry_queued(self, streams: dict[int, list[Action]], batch: Batch, k: int, start: int) -> None:
        """Put the forwards that wait for a step into ``streams``, which begin with window ``k``.

        Args:
            streams: by rank.
            batch: of the step.
            k: its first window.
            start: window before which the pipeline was last empty.

        Raises:
            ValueError: the step is taken under other settings than the evaluation; nothing has run then.
            ScheduleError: the transport's channels are too small for it; nothing has run either.
        """
        now = settings_now()
        if any(one.settings != now for one in self._queued):
            raise ValueError(
                "eval(drained=False) and the step that carries it were called under different settings of torch "
                "(autocast, default dtype, precision ...): call both under the same"
            )
        count, capacity = sum(len(one.indices) for one in self._queued), self._executor.transport.capacity
        if capacity is not None and count not in self._proved:
            prove(self._lowering, count, capacity)
            self._proved.add(count)
        queued, self._queued = self._queued, []
        batch.among = Among(queued, self.stages, alone=len(self._ranks) == 1, spent_s=lambda: self.evaluation_s)
        batch.from_gpu |= any(one.batch.from_gpu for one in queued)
        for rank, stream in streams.items():
            forwards = [
                action
                for one in queued
                for action in evaluation_forwards(self._lowering, rank, one.indices.start, len(one.indices))
            ]
            size = len(stream if self._windows_per_step == 1 else self._lowering.window(rank, k, start))
            streams[rank] = with_evaluation(self._lowering, stream[:size], k, forwards) + stream[size:]

    def _collect_carried(self, among: Among) -> None:
        """Give the losses of what a step carried to the caller."""
        self.evaluation_began_s = among.began_s
        for one in among.evaluations:
            batch_results(one.batch, self.stages[-1], one.losses, self._specs.outputs)


def _copy(batch: Batch) -> None:
    """Keep what the caller may overwrite before the step comes."""
    made: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = tensor.detach().clone()
        return made[id(tensor)]

    batch.args = {m: map_tensors(copied, args) for m, args in batch.args.items()}
    batch.kwargs = {key: map_tensors(copied, kwargs) for key, kwargs in batch.kwargs.items()}
    for loss in batch.losses.values():
        loss.target = map_tensors(copied, loss.target)
