"""What ``Pipeline.stats`` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.executor import Executor
from paci_rt.runtime.replicas import merged_reduce_stats
from paci_rt.schedules.lowering import Lowering

WINDOW_COUNTS = ("nonfinite_windows", "spiked_windows", "skipped_windows", "taken_back_windows", "clipped_windows")
"""Windows that are counted stage by stage."""

MEMORY_PARTS = (
    "weights",
    "masters",
    "optimizer",
    "accumulators",
    "versions",
    "activations",
    "temporaries",
    "messages",
    "snapshot",
)
"""What the bytes of a stage are made of, in the order of tables."""


def pipeline_stats(
    lowering: Lowering, policy: str, executor: Executor, bounds: Sequence[StageOptimizer], replicas: int
) -> dict[str, Any]:
    """The dictionary that ``Pipeline.stats`` documents."""
    runtimes = list(executor.runtimes.values())
    audits = [runtime.audit for runtime in runtimes]
    start_s = executor.first_start_s
    wall_s = 0.0 if start_s is None else executor.last_end_s - start_s
    compute_s = sum(audit.compute_s for audit in audits)
    memory = _memory(executor, bounds)
    shape = lowering.shape
    ranks = {audit.rank.rank: audit.rank for audit in audits}
    return {
        "schedule": lowering.family.name,
        "policy": policy,
        "transport": executor.transport.name,
        "transport_stats": executor.transport.stats() if hasattr(executor.transport, "stats") else {},
        "stages": shape.num_stages,
        "chunks": shape.chunks,
        "accumulation": shape.accumulation,
        "slack": list(shape.slack) if isinstance(shape.slack, tuple) else shape.slack,
        "windows": max(audit.windows for audit in audits),
        "micro_batches": max(audit.micro_batches for audit in audits),
        "wall_s": wall_s,
        "compute_s": compute_s,
        "utilization": compute_s / (wall_s * len(ranks)) if wall_s > 0 else 0.0,
        "evaluation_s": sum(audit.evaluation_s for audit in audits),
        "exposed_comm_s": sum(audit.exposed_comm_s for audit in audits),
        "replicas": replicas,
        **merged_reduce_stats(bounds),
        "drift": {audit.stage: dict(sorted(audit.drift.items())) for audit in audits},
        "max_drift": max((drift for audit in audits for drift in audit.drift), default=0),
        "drift_bound": max(audit.drift_bound for audit in audits),
        "delay": {audit.stage: dict(sorted(audit.delay.items())) for audit in audits},
        "max_delay": max((delay for audit in audits for delay in audit.delay), default=0),
        "peak_in_flight": {audit.stage: audit.peak_in_flight for audit in audits},
        "peak_pending": {audit.stage: audit.peak_pending for audit in audits},
        "peak_rank_in_flight": {rank.rank: rank.peak_in_flight for rank in ranks.values()},
        "copied_input_bytes": executor.copied_input_bytes,
        "lookahead_s": sum(runtime.weights.ahead_s for runtime in runtimes),
        "lookahead_forwards": sum(runtime.weights.ahead_forwards for runtime in runtimes),
        "nonfinite_gradients": sum(int(audit.nonfinite_gradients) for audit in audits),
        "grad_norm": {audit.stage: None if audit.grad_norm is None else float(audit.grad_norm) for audit in audits},
        **{key: {audit.stage: getattr(audit, key) for audit in audits} for key in WINDOW_COUNTS},
        "norm_lags": {audit.stage: dict(sorted(audit.norm_lags.items())) for audit in audits},
        "memory": memory,
        "peak_bytes": max(
            rank.peak_held_bytes
            + _beside_activations([memory[stage] for stage in memory if shape.rank_of(stage) == at])
            for at, rank in ranks.items()
        ),
    }


def _memory(executor: Executor, bounds: Sequence[StageOptimizer]) -> dict[int, dict[str, int]]:
    """Peak bytes of each stage by part, and their total."""
    memory: dict[int, dict[str, int]] = {}
    for runtime, bound in zip(executor.runtimes.values(), bounds, strict=True):
        audit = runtime.audit
        versions = runtime.weights.extra_bytes + (0 if runtime.guard is None else runtime.guard.extra_bytes)
        sink = bound if runtime.ties is None else runtime.ties
        parts = {**bound.memory, "versions": versions, "activations": audit.peak_activation_bytes}
        parts["temporaries"] = sink.backward_bytes
        parts["messages"] = 0 if memory else getattr(executor.transport, "message_bytes", 0)  # of the whole process
        parts["snapshot"] = audit.peak_snapshot_bytes
        for part, held_bytes in (runtime.ties.memory if runtime.ties is not None else {}).items():
            parts[part] += held_bytes
        memory[audit.stage] = {**parts, "total": sum(parts.values())}
    return memory


def _beside_activations(of_rank: Sequence[dict[str, int]]) -> int:
    """Bytes of a rank's stages without activations; of their backwards one runs at a time."""
    kept = sum(part["total"] - part["activations"] - part["temporaries"] for part in of_rank)
    return kept + max(part["temporaries"] for part in of_rank)
