"""Statistics and state of a pipeline's stages, keyed by stage and by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paci_rt.executor import Executor
from paci_rt.lowering import Lowering
from paci_rt.optim import BoundOptimizer
from paci_rt.stage import PipelineStage


def pipeline_stats(
    lowering: Lowering, policy: str, executor: Executor, bounds: Sequence[BoundOptimizer]
) -> dict[str, Any]:
    """The dictionary that ``Pipeline.stats`` documents."""
    runtimes = list(executor.runtimes.values())
    audits = [runtime.audit for runtime in runtimes]
    start_s = executor.first_start_s
    wall_s = 0.0 if start_s is None else executor.last_end_s - start_s
    compute_s = sum(audit.compute_s for audit in audits)
    memory = {}
    for runtime, bound in zip(runtimes, bounds, strict=True):
        audit = runtime.audit
        parts = {**bound.memory, "versions": runtime.weights.extra_bytes, "activations": audit.peak_activation_bytes}
        for part, held_bytes in (runtime.ties.memory if runtime.ties is not None else {}).items():
            parts[part] += held_bytes
        memory[audit.stage] = {**parts, "total": sum(parts.values())}
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
        "exposed_comm_s": sum(audit.exposed_comm_s for audit in audits),
        "drift": {audit.stage: dict(sorted(audit.drift.items())) for audit in audits},
        "max_drift": max((drift for audit in audits for drift in audit.drift), default=0),
        "drift_bound": max(audit.drift_bound for audit in audits),
        "delay": {audit.stage: dict(sorted(audit.delay.items())) for audit in audits},
        "max_delay": max((delay for audit in audits for delay in audit.delay), default=0),
        "peak_in_flight": {audit.stage: audit.peak_in_flight for audit in audits},
        "peak_pending": {audit.stage: audit.peak_pending for audit in audits},
        "peak_rank_in_flight": {rank.rank: rank.peak_in_flight for rank in ranks.values()},
        "lookahead_s": sum(runtime.weights.ahead_s for runtime in runtimes),
        "lookahead_forwards": sum(runtime.weights.ahead_forwards for runtime in runtimes),
        "nonfinite_gradients": sum(int(audit.nonfinite_gradients) for audit in audits),
        "memory": memory,
        "peak_bytes": max(
            rank.peak_held_bytes
            + sum(part["total"] - part["activations"] for stage, part in memory.items() if shape.rank_of(stage) == at)
            for at, rank in ranks.items()
        ),
    }


def collect_state(
    named: Mapping[str, nn.Parameter],
    stages: Sequence[PipelineStage],
    bounds: Sequence[BoundOptimizer],
    lr_schedulers: Sequence[Any],
    windows: int,
) -> dict[str, Any]:
    """Copies of parameters and optimizer state by the names of ``named``, which say where a stage's names collide."""
    optimizer = {}
    for names, bound in zip(_names_of(named, stages), bounds, strict=True):
        for own_name, state in bound.state_by_name().items():
            optimizer[names[own_name]] = state
    return {
        "params": {name: param.detach().clone() for name, param in named.items()},
        "optimizer": optimizer,
        "lr_scheduler": lr_schedulers[0].state_dict() if lr_schedulers else None,
        "windows": windows,
    }


def load_state(
    state: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    stages: Sequence[PipelineStage],
    bounds: Sequence[BoundOptimizer],
    lr_schedulers: Sequence[Any],
) -> None:
    """Check everything, then copy it into the parameters and the optimizers.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs.
    """
    params, optimizer = state["params"], state["optimizer"]
    missing, unexpected = sorted(named.keys() - params.keys()), sorted(params.keys() - named.keys())
    if missing or unexpected:
        raise ValueError(f"state does not fit this pipeline: missing {missing}, unexpected {unexpected}")
    for name, param in named.items():
        if params[name].shape != param.shape:
            raise ValueError(
                f"state does not fit this pipeline: {name!r} has shape {tuple(params[name].shape)}, "
                f"the parameter {tuple(param.shape)}"
            )
    for names, bound in zip(_names_of(named, stages), bounds, strict=True):
        own = {own_name: optimizer[name] for own_name, name in names.items() if name in optimizer}
        bound.load_state_by_name(own)
    with torch.no_grad():
        for name, param in named.items():
            param.copy_(params[name])
    if state.get("lr_scheduler") is not None:
        for scheduler in lr_schedulers:
            scheduler.load_state_dict(state["lr_scheduler"])
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr


def _names_of(named: Mapping[str, nn.Parameter], stages: Sequence[PipelineStage]) -> list[dict[str, str]]:
    """For each stage its modules' own parameter names and the names in ``named``."""
    of_param = {param: name for name, param in named.items()}
    return [{own_name: of_param[param] for own_name, param in stage.named_parameters()} for stage in stages]
