"""What a pipeline says about itself: which stages it has, and what was counted in them."""

from __future__ import annotations

import time
from typing import Any

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.assemble import Setup
from paci_rt.runtime.audit import StageAudit
from paci_rt.runtime.executor import Executor
from paci_rt.runtime.guard import Guard
from paci_rt.runtime.pipeline_state import PipelineState
from paci_rt.runtime.replicas import Replicas, reset_reduce_stats
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.stats import pipeline_stats
from paci_rt.schedules.lowering import Lowering
from paci_rt.trace import Event
from paci_rt.transport import DEFAULT_TIMEOUT_S


class PipelineView(PipelineState):
    """The part of :class:`paci_rt.runtime.engine.Pipeline` that only looks."""

    asked_for: Setup
    _executor: Executor
    _lowering: Lowering
    _loss_fn: LossFn | None
    _n_microbatches: int
    _policy: str
    _ranks: list[int]

    @property
    def loss_fn(self) -> LossFn | None:
        """``loss_fn(output, target)``, as it was given."""
        return self._loss_fn

    @property
    def n_microbatches(self) -> int:
        """Micro-batches that a step cuts its batch into."""
        return self._n_microbatches

    @property
    def stages(self) -> list[PipelineStage]:
        """The stages of this process."""
        return [runtime.stage for runtime in self._executor.runtimes.values()]

    @property
    def ranks(self) -> list[int]:
        """The ranks that this process runs: its own, or all of them."""
        return list(self._ranks)

    @property
    def transfer_timeout_s(self) -> float:
        """Deadline of a wait for another stage, in seconds."""
        return float(getattr(self._executor.transport, "timeout_s", DEFAULT_TIMEOUT_S))

    @property
    def replicas(self) -> Replicas | None:
        """The replicas of this process's stages; None where it was given none."""
        return self.asked_for.replicas

    @property
    def has_first(self) -> bool:
        """Whether this process takes the inputs."""
        return self.stages[0].is_first

    @property
    def has_last(self) -> bool:
        """Whether this process takes the targets and holds losses and outputs."""
        return self.stages[-1].is_last

    @property
    def events(self) -> list[Event]:
        """Compute actions executed so far, with ``trace=True``."""
        self._executor.settle()
        return self._executor.events

    @property
    def audits(self) -> list[StageAudit]:
        """What was counted, stage by stage."""
        return [runtime.audit for runtime in self._executor.runtimes.values()]

    @property
    def _optimizers(self) -> list[StageOptimizer]:
        return [runtime.optimizer for runtime in self._executor.runtimes.values()]

    @property
    def guards(self) -> dict[int, Guard | None]:
        return {at: runtime.guard for at, runtime in self._executor.runtimes.items()}

    def stats(self) -> dict[str, Any]:
        """Counted facts about this process's stages since the start or the last :meth:`reset_stats`.

        Keys: ``schedule policy transport transport_stats stages chunks accumulation slack windows micro_batches wall_s
        compute_s utilization evaluation_s exposed_comm_s replicas reduce_s exposed_reduce_s exposed_gather_s drift
        max_drift drift_bound delay max_delay peak_in_flight peak_pending peak_rank_in_flight copied_input_bytes
        lookahead_s lookahead_forwards memory peak_bytes saving_wait_s``; of gradients, by stage, ``grad_norm
        nonfinite_windows spiked_windows skipped_windows taken_back_windows clipped_windows norm_lags``
        (:class:`paci_rt.runtime.audit.StageAudit`). ``transport_stats`` is what transports for GPUs say
        (:meth:`paci_rt.transport.device.transport.DeviceTransport.stats`). Seconds and bytes; ``utilization`` is
        ``compute_s / (wall_s * ranks of this process)``; ``drift`` and ``delay`` (:mod:`paci_rt.schedules.policies`)
        map stage to a histogram over micro-batches; ``peak_pending`` counts micro-batches between I and W;
        ``evaluation_s`` are seconds of evaluation within steps, which are in no other; ``copied_input_bytes`` is what
        was copied of the caller's batches because :meth:`step` returned before their backwards; ``lookahead_s`` is the
        part of ``compute_s`` that went into look-ahead; ``memory`` maps stage to bytes of weights, masters, optimizer,
        accumulators, versions (extra weights), activations (peak), temporaries (of a backward, by its graph), messages
        (of the process; under its first stage), snapshot (of a checkpoint that is written beside training, peak) and
        total; ``saving_wait_s`` is what a save waited for the one before. ``reduce_s`` is what sums over replicas took,
        ``exposed_reduce_s`` and ``exposed_gather_s`` what stages waited for them and for weights of other replicas.
        """
        self._executor.settle()
        replicas = 1 if self.replicas is None else self.replicas.count
        found = pipeline_stats(self._lowering, self._policy, self._executor, self._optimizers, replicas)
        return {**found, "saving_wait_s": self.saving_wait_s}

    def reset_stats(self) -> None:
        """Start counting anew, for example after the first window."""
        self._executor.settle()
        for runtime in self._executor.runtimes.values():
            runtime.audit.reset()
            runtime.weights.reset_stats()
            reset_reduce_stats(runtime.optimizer)
        self._executor.first_start_s = self._executor.last_end_s = time.perf_counter()
        self._executor.copied_input_bytes = 0
