"""The stages of one process under one schedule: batching batches, draining, evaluating, counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paci_rt.action import Action
from paci_rt.clock import HostClock
from paci_rt.errors import PaciError, StageError
from paci_rt.runtime import trees
from paci_rt.runtime.assemble import Setup, bind, make_setup, ranks_here, unbind
from paci_rt.runtime.audit import RankAudit
from paci_rt.runtime.batch import Batch, batch_results, bind_loss, cut_batch
from paci_rt.runtime.beside import leave
from paci_rt.runtime.caller_memory import gradients_set_aside, keep_safe
from paci_rt.runtime.device_clock import clock_for
from paci_rt.runtime.evaluation import Evaluation, PipelineEvaluation
from paci_rt.runtime.executor import Executor
from paci_rt.runtime.late_forwards import LateForwards
from paci_rt.runtime.module_watch import ModuleWatch
from paci_rt.runtime.replicas import Replicas
from paci_rt.runtime.safety import Safety
from paci_rt.runtime.schedulers import Follower, check_schedulers
from paci_rt.runtime.split_merge import ChunkSpecs
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.stage_runtime import StageRuntime
from paci_rt.runtime.streams import joined
from paci_rt.schedules import Slack, StepCosts
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.schedules.placement import V
from paci_rt.schedules.validate import validate
from paci_rt.status import IN_A_V, board
from paci_rt.transport import Transport, hand_over


class Pipeline(PipelineEvaluation):
    """What all schedules share; use one of the subclasses or :class:`LocalPipeline`.

    Args:
        stages: the stages of this process, in the order of the model.
        schedule: name of the schedule family.
        n_microbatches: micro-batches that one ``step`` cuts its batch into; the window ``a`` of an asynchronous
            schedule (``async-1f1b`` alone updates after each of them).
        loss_fn: ``loss_fn(output, target)`` on the last stage, returning a scalar. None, and no optimizer, runs forward
            only, under any schedule.
        optimizers: one per stage, or None to leave gradients in ``.grad`` (flush schedules only).
        lr_schedulers: one per stage or None, stepped after each local update; :mod:`paci_rt.runtime.schedulers`.
        chunks: stages per rank, see :class:`paci_rt.schedules.Placement`.
        slack: additional warm-up forwards (asynchronous schedules): one number for every stage but the last, or one a
            stage; :func:`paci_rt.plan_slack` says how many hide the latency of links.
        policy: which weights forwards and backwards use, see :mod:`paci_rt.schedules.policies`; None is the schedule's
            own.
        lookahead: run forwards that come before an update of theirs at the weights that the gradients seen so far
            would make of the present ones (asynchronous schedules; :mod:`paci_rt.weights.lookahead`). None does so
            under ``paci`` with policy ``bounded`` or ``recompute``, where the optimizer can.
        costs: what a searched schedule is fitted to; None means forward, I and W of equal length and no hop.
        activation_limit: what a rank may hold under ``paci-v``, in whole stages of two pieces each; None is the least
            that costs no time.
        buffers: 1 runs the update in line in one gradient buffer, 2 double-buffers; None means 1 on the CPU.
        tied_weights: weights that live on two stages.
        transport: how stages reach each other.
        trace: record an event for every compute action in ``events``.
        scale_grads: divide gradients by the number of micro-batches of the update, once, as torch does.
        specs, safety: how batches are cut and outputs put together; :class:`paci_rt.runtime.safety.Safety`.
        replicas: other pipelines over the same stages, with which each update is made together.

    Raises:
        ValueError, ScheduleError, StageError: an argument that cannot work; nothing has been changed then.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        schedule: str,
        n_microbatches: int,
        loss_fn: LossFn | None,
        *,
        optimizers: Sequence[torch.optim.Optimizer | None],
        lr_schedulers: Sequence[Any] | None,
        chunks: int,
        slack: Slack | Sequence[int],
        policy: str | None,
        lookahead: bool | None,
        costs: StepCosts | None,
        activation_limit: float | None,
        buffers: int | None,
        tied_weights: Sequence[TiedWeight],
        transport: Transport,
        trace: bool,
        scale_grads: bool,
        specs: ChunkSpecs,
        safety: Safety | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        setup = make_setup(
            stages,
            schedule,
            n_microbatches,
            loss_fn,
            optimizers=optimizers,
            chunks=chunks,
            slack=slack,
            policy=policy,
            lookahead=lookahead,
            costs=costs,
            activation_limit=activation_limit,
            buffers=buffers,
            tied_weights=tied_weights,
            scale_grads=scale_grads,
            safety=safety,
            replicas=replicas,
        )
        self.asked_for = setup
        self._lowering, self._policy = setup.lowering, setup.policy
        transport = hand_over(transport, self._lowering.shape.places)
        validate(self._lowering, capacity=transport.capacity)
        self._ranks = ranks_here(stages, self._lowering.shape)
        self._has_backward = not setup.forward_only
        board().words[IN_A_V] = int(self._lowering.shape.placement == V)
        for stage in stages if self._has_backward else ():
            stage.require_free()
            stage.has_backward = True
        self._loss_fn, self._n_microbatches = loss_fn, n_microbatches
        self._specs, self.scale_grads = specs, scale_grads
        self._windows_per_step = n_microbatches // self._lowering.shape.accumulation
        self._next_window = self._start_window = 0
        self._was_empty = True  # since the caller could change weights
        self._queued: list[Evaluation] = []  # for the next step
        self._evaluated = 0  # micro-batches of all that was queued
        self._proved = set[int]()  # how many at once can run
        self._failure: BaseException | None = None
        self._closed = False
        self._lr_schedulers = check_schedulers(lr_schedulers, optimizers)
        self._executor = Executor(
            self._bind(setup, stages, optimizers),
            transport,
            ties=setup.lowering.ties,
            settles=setup.lowering.settles,
            explain=self._explain,
            trace=trace,
        )
        lags = not self._lowering.family.flush and self._lowering.shape.chunks > 1
        self._late = LateForwards(stages) if lags else None
        self._watch = ModuleWatch(setup, self._executor.runtimes, here=len(self._ranks), late=lags)

    def _bind(
        self, setup: Setup, stages: Sequence[PipelineStage], optimizers: Sequence[torch.optim.Optimizer | None]
    ) -> list[StageRuntime]:
        """A runtime for every stage, or none of them where one fails."""
        self._clocks: dict[torch.device, HostClock] = {}  # one a device, so that stages there share its origin
        audits = {rank: RankAudit(rank=rank) for rank in self._ranks}
        runtimes: list[StageRuntime] = []
        try:
            for at, (stage, optimizer) in enumerate(zip(stages, optimizers, strict=True)):
                if stage.device not in self._clocks:
                    self._clocks[stage.device] = clock_for(stage.device)
                audit = audits[setup.lowering.shape.rank_of(stage.stage_index)]
                runtime = bind(setup, stage, audit, optimizer, self._clocks[stage.device])
                runtimes.append(runtime)
                scheduler = self._lr_schedulers[at] if self._lr_schedulers else None
                runtime.after_update = None if scheduler is None else Follower(scheduler)
        except BaseException:
            unbind(runtimes)
            raise
        return runtimes

    # --- running ---

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train on one batch, cut into ``n_microbatches`` along dimension 0.

        A flush schedule returns with the pipeline empty. An asynchronous one returns with it full: the backwards of
        the last micro-batches run in the next ``step``, or in :meth:`drain`. In a V (``paci-v``) so do their forwards
        on later stages: ``losses`` has then those that are known, the others are appended when they come, and outputs
        are not returned.

        Stages on a GPU take inputs and targets from the CPU, best in pinned memory. Several of them in one process then
        go from one asynchronous step to the next without a gap. Inputs that are on the GPU may still have to be
        computed by the caller's stream, which follows the step before, so that all stages wait for that. A step may
        return before pinned memory has been copied: call :meth:`synchronize` before you write into it again.

        Args:
            args: the whole batch, for the first stage. All ranks may make the same call: what a rank cannot use is
                ignored.
            target: the whole batch of targets, for the last stage.
            losses: cleared, then filled with one detached loss a micro-batch, on the last stage.
            return_outputs: whether the last stage returns its outputs, put together.
            loss_kwargs: more keyword arguments for ``loss_fn``.
            kwargs: keyword arguments of this process's stages; tensors are cut like ``args``.

        Raises:
            ValueError: input or target missing, or not to be cut as the chunk specs say; nothing has run then.
            ActionError, PeerLostError, DriftBoundError: an action failed; the pipeline cannot go on.
        """
        if not self._has_backward:
            options = {"target": target, "losses": losses, "loss_kwargs": loss_kwargs}
            return self.eval(*args, return_outputs=return_outputs, **options, **kwargs)
        if not torch.is_grad_enabled():
            under = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
            raise RuntimeError(f"step() under torch.{under}() cannot train: call eval() instead")
        self._check_usable()
        self._follow_modules()
        accumulation = self._lowering.shape.accumulation
        windows = range(self._next_window, self._next_window + self._windows_per_step)
        indices = range(windows.start * accumulation, windows.stop * accumulation)
        loss_fn = self._bind_loss(loss_kwargs)
        batch = cut_batch(self.stages, args, kwargs, target, losses, loss_fn, indices, specs=self._specs)
        batch.keep_outputs = return_outputs and self._late is None
        batch.from_gpu |= trees.on_gpu(loss_kwargs)
        batch.start_window = start = self._start_window
        streams = {
            rank: [action for k in windows for action in self._lowering.window(rank, k, start)] for rank in self._ranks
        }
        owing = None if self._lowering.family.flush else streams.values()
        self._executor.copied_input_bytes += keep_safe(batch, self.stages, owing)
        if self._queued:
            self._carry_queued(streams, batch, windows.start, start)
        self._next_window = windows.stop
        if self._late is not None:
            self._late.join(batch)
        self._run(streams, batch)
        if batch.among is not None:
            self._collect_carried(batch.among)
        self._watch.check_after_step()
        if self._late is not None:
            batch_results(batch, self.stages[-1], None, self._specs.outputs)
            return self._late.keep(batch, indices, streams.values(), losses)
        return batch_results(batch, self.stages[-1], losses, self._specs.outputs)

    def synchronize(self) -> None:
        """Wait until all that was issued has run; on the CPU it has."""
        for stage in self.stages:
            if stage.device.type == "cuda":
                torch.cuda.synchronize(stage.device)

    def drain(self) -> None:
        """Run the backwards and updates still owed; afterwards the pipeline is empty and all stages agree.

        On a GPU an update may still be on its way when an asynchronous schedule's :meth:`step` returns, on a stream of
        its own: drain before you read or change parameters.
        """
        start, end = self._start_window, self._next_window
        if start < end:
            streams = {rank: self._lowering.drain(rank, start, end) for rank in self._ranks}
            batch = Batch(last=True, start_window=start)
            if self._late is not None:
                self._late.join(batch)
            with self._watch.as_begun():
                self._run(streams, batch)
            if self._late is not None:
                self._late.keep(batch, range(0), streams.values(), None)
            self._start_window = end
            self._restart(end)
        self._await_updates()
        self._was_empty = True
        self._executor.transport.flush()
        if self._queued:
            self._evaluate_queued()

    def close(self) -> None:
        """Give the stages and the optimizers back. Idempotent; the pipeline cannot be used afterwards.

        On a GPU the caller's streams go on behind all updates: the memory that these work in may be free from now on,
        for whatever the caller does next.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._await_updates()
        except Exception:
            if self._failure is None:  # after a failure of the device nothing works there
                raise
        unbind(self._executor.runtimes.values())
        self._executor.transport.close()
        if self.replicas is not None:
            self.replicas.group.close()
        leave(self, failed=self._failure is not None)

    # --- inside ---

    def _follow_modules(self) -> None:
        """Bind what changed in the modules since the last step."""
        self._watch.follow(self.drain, owed=self._start_window < self._next_window)

    def _restart(self, version: int) -> None:
        """The pipeline is empty, and every stage holds ``version``."""
        for runtime in self._executor.runtimes.values():
            runtime.restart(version)

    def _bind_loss(self, loss_kwargs: dict[str, Any] | None) -> LossFn | None:
        return bind_loss(self._loss_fn, loss_kwargs)

    def _run(self, streams: dict[int, list[Action]], batch: Batch) -> None:
        self._check_usable()
        for bound in self._optimizers:
            for group in bound.groups:
                group.check_views()
        with gradients_set_aside([param for stage in self.stages for param in stage.parameters()]):
            try:
                with joined(self.stages, behind_caller=self._was_empty or batch.from_gpu):
                    self._executor.run(streams, batch)
            except BaseException as error:
                self._failure = error
                self._executor.transport.fail(error)
                raise
            self._was_empty = self._lowering.family.flush or not batch.training
            if self._was_empty:
                self._await_updates()

    def _await_updates(self) -> None:
        """On a GPU: what the caller does from now on sees all updates."""
        for bound in self._optimizers:
            bound.before_reading()

    def _check_usable(self) -> None:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("a pipeline cannot run inside a transform of torch.func: call it outside grad or vmap")
        if self._closed:
            raise StageError("this pipeline is closed: make a new one")
        if self.saving is not None:
            self.saving.raise_if_failed()
        if self._failure is not None:
            cause = str(self._failure).splitlines()[0] if str(self._failure) else type(self._failure).__name__
            raise PaciError(f"this pipeline failed earlier and cannot go on: {cause}") from self._failure

    def _explain(self, failing: Action) -> str:
        """The rank x step grid around a failing action."""
        end = self._next_window + self._windows_per_step
        return self._lowering.grid(failing, self._start_window, end)
