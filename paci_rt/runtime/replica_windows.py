"""When a window's sums begin to travel between replicas: as soon as its last gradient is in."""

from __future__ import annotations

from typing import Any, Protocol

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.audit import StageAudit
from paci_rt.runtime.tied_weights import TiedExchange
from paci_rt.weights.base import StageWeights


class Trained(Protocol):
    """What is asked of a stage's runtime."""

    complete: int
    accumulation: int
    ties: TiedExchange | None
    guard: Any
    optimizer: StageOptimizer
    weights: StageWeights
    audit: StageAudit


def one_more(runtime: Trained, micro_batch: int) -> None:
    """The gradients of a micro-batch are complete on a stage."""
    runtime.complete += 1
    if runtime.complete == runtime.accumulation:
        runtime.complete = 0
        if runtime.ties is None or not runtime.ties.owns:  # else the reader's come last
            seal_for_replicas(runtime, micro_batch // runtime.accumulation)


def seal_for_replicas(runtime: Trained, window: int) -> None:
    """All gradients of ``window`` are in: seal it, and let its sums travel."""
    replicas = runtime.optimizer.replicas
    assert replicas is not None
    runtime.weights.before_seal(window, runtime.audit.version)
    # A reader's gradients of a tied weight go to the owner by themselves; whether they are finite is for all to know.
    flag = runtime.guard is not None and runtime.ties is not None and runtime.ties.nonfinite()
    scale = 1.0 if runtime.guard is None else runtime.guard.scale(window)
    replicas.begin(window, flag=flag, scale=scale)
