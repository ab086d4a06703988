"""What a training run found out: measured by each process, merged into one result with the keys of ``--json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from paci_rt.runtime.stats import WINDOW_COUNTS
from paci_rt.trace import Event
from paci_rt.train.config import TrainConfig

TRAIN_LOSS_WINDOWS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPoint:
    """One window: ``step`` local updates, ``tokens`` and seconds of training since the very first one, whichever run of
    those that resumed one another made it; nats per token."""

    step: int
    tokens: int
    elapsed_s: float
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalPoint:
    """One validation: as :class:`StepPoint`, with the loss over the held-back set after ``step`` updates."""

    step: int
    tokens: int
    elapsed_s: float
    val_loss: float


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one process measured; it holds one stage, or all of them with the local transport.

    Attributes:
        stats: of its schedule, over all windows of this run.
        wall_s: the training clock at the end: everything but start-up, validation forwards and saving.
        steady_s, steady_compute_s: training clock and seconds of computing since the first window ended here.
        steps, evals: what the last stage saw; empty elsewhere.
        params_sha256: of the whole model; on the first process, None elsewhere.
        events: executed actions, if they were recorded.
        stopped: the step before which SIGTERM ended it in order; None where nothing did.
        data_stall_s: seconds that training waited for its next window.
    """

    stats: dict[str, Any]
    wall_s: float
    steady_s: float
    steady_compute_s: float
    steps: tuple[StepPoint, ...] = ()
    evals: tuple[EvalPoint, ...] = ()
    params_sha256: str | None = None
    events: tuple[Event, ...] = ()
    stopped: int | None = None
    data_stall_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A whole run. The first block are the keys of ``paci-rt train --json``; seconds, bytes, nats per token.

    Attributes:
        steps: local updates since the very first; tokens: what they have seen.
        train_loss: mean over the last ten windows. val_loss: over the held-back set, at the end.
        wall_s: training time, without start-up, validation forwards and saving.
        tokens_per_s: without the first window of the process either (unless there is no other).
        utilization: seconds of computing over seconds of training, mean over the stages, the same windows.
        max_drift, peak_memory_bytes: the largest of any stage; drift_bound: what the schedule allows.
        windows: local updates of this run, fewer than steps after a resume.
        policy, transport, chunks: as they were run. delay, max_delay: see ``paci_rt.schedules.policies``.
        lookahead_s: what look-ahead took, all stages together. evaluation_s: what validations took among the training,
            likewise. data_stall_s: seconds that a process waited for its next
            window, the largest of any.
        drift, delay, memory, peak_in_flight: by stage. nonfinite_gradients: how many values were NaN or infinite.
        nonfinite_windows, spiked_windows, skipped_windows, taken_back_windows, clipped_windows, norm_lags: by stage, as
            ``Pipeline.stats`` has them.
        curve, evals: loss over training; events: executed actions, not in the JSON.
    """

    schedule: str
    stages: int
    accumulation: int
    steps: int
    tokens: int
    train_loss: float
    val_loss: float
    wall_s: float
    tokens_per_s: float
    utilization: float
    max_drift: int
    drift_bound: int
    peak_memory_bytes: int
    params_sha256: str

    policy: str
    transport: str
    chunks: int
    max_delay: int
    windows: int
    exposed_comm_s: float
    lookahead_s: float
    nonfinite_gradients: int
    drift: dict[int, dict[int, int]]
    delay: dict[int, dict[int, int]]
    memory: dict[int, dict[str, int]]
    peak_in_flight: dict[int, int]
    curve: tuple[StepPoint, ...]
    evals: tuple[EvalPoint, ...]
    config: dict[str, Any]
    nonfinite_windows: dict[int, int] = field(default_factory=dict)
    spiked_windows: dict[int, int] = field(default_factory=dict)
    skipped_windows: dict[int, int] = field(default_factory=dict)
    taken_back_windows: dict[int, int] = field(default_factory=dict)
    clipped_windows: dict[int, int] = field(default_factory=dict)
    norm_lags: dict[int, dict[int, int]] = field(default_factory=dict)
    data_stall_s: float = 0.0
    evaluation_s: float = 0.0
    events: tuple[Event, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; numbers that JSON does not know (a diverged loss) become None, stage numbers strings."""
        values = asdict(self)
        del values["events"]
        return _plain(values)  # type: ignore[no-any-return]


def merge(config: TrainConfig, results: Sequence[StageResult]) -> RunResult:
    """One result from those of all processes, in the order of their ranks."""
    # The one that sees the losses, and the end of the first window everywhere.
    last = results[config.places.last_rank if len(results) > 1 else 0]
    assert last.evals
    assert results[0].params_sha256 is not None
    stats = [result.stats for result in results]
    wall_s = max(result.wall_s for result in results)
    windows = len(last.steps)
    if windows > 1:
        seconds, counted = last.steady_s, windows - 1
        utilization = sum(result.steady_compute_s / result.steady_s for result in results) / config.stages
    else:
        seconds, counted = max(wall_s, 1e-9), windows  # no window where a restart found everything done
        utilization = sum(one["compute_s"] for one in stats) / (seconds * config.stages)
    recent = [point.loss for point in last.steps[-TRAIN_LOSS_WINDOWS:]]
    memory = _by_stage(stats, "memory")
    return RunResult(
        schedule=config.schedule,
        stages=config.stages,
        accumulation=config.accumulation,
        steps=config.steps,
        tokens=config.steps * config.tokens_per_window,
        train_loss=sum(recent) / len(recent) if recent else math.nan,
        val_loss=last.evals[-1].val_loss,
        wall_s=wall_s,
        tokens_per_s=counted * config.tokens_per_window / seconds,
        utilization=utilization,
        max_drift=max(one["max_drift"] for one in stats),
        drift_bound=max(one["drift_bound"] for one in stats),
        peak_memory_bytes=max(one["peak_bytes"] for one in stats),
        params_sha256=results[0].params_sha256,
        policy=stats[0]["policy"],
        transport=stats[0]["transport"],
        chunks=config.chunks,
        max_delay=max(one["max_delay"] for one in stats),
        windows=windows,
        exposed_comm_s=sum(one["exposed_comm_s"] for one in stats),
        lookahead_s=sum(one["lookahead_s"] for one in stats),
        nonfinite_gradients=sum(one["nonfinite_gradients"] for one in stats),
        drift=_by_stage(stats, "drift"),
        delay=_by_stage(stats, "delay"),
        memory=memory,
        peak_in_flight=_by_stage(stats, "peak_in_flight"),
        curve=last.steps,
        evals=last.evals,
        config=config.to_json(),
        norm_lags=_by_stage(stats, "norm_lags"),
        evaluation_s=sum(one["evaluation_s"] for one in stats),
        data_stall_s=max(result.data_stall_s for result in results),
        **{key: _by_stage(stats, key) for key in WINDOW_COUNTS},
        events=tuple(event for result in results for event in result.events),
    )


def with_earlier(result: RunResult, steps: Sequence[StepPoint], evals: Sequence[EvalPoint]) -> RunResult:
    """``result`` of a run that was started again, with the points that its earlier starts reported in front.

    Windows that were lost and trained again count once, as the last start saw them.
    """
    first = result.curve[0].step if result.curve else result.steps + 1
    before: dict[int, StepPoint] = {point.step: point for point in steps if point.step < first}
    curve = (*(before[step] for step in sorted(before)), *result.curve)
    seen = {point.step: point for point in evals if not result.evals or point.step < result.evals[0].step}
    recent = [point.loss for point in curve[-TRAIN_LOSS_WINDOWS:]]
    return replace(
        result,
        curve=curve,
        evals=(*(seen[step] for step in sorted(seen)), *result.evals),
        train_loss=sum(recent) / len(recent) if recent else result.train_loss,
    )


def _by_stage(stats: Sequence[dict[str, Any]], key: str) -> dict[int, Any]:
    return dict(sorted((stage, value) for one in stats for stage, value in one[key].items()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
