"""What a process of a run saw, and the seconds that count as training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from paci_rt.runtime.engine import Pipeline
from paci_rt.train import journal
from paci_rt.train.config import TrainConfig
from paci_rt.train.prefetch import Prefetch
from paci_rt.train.results import EvalPoint, StageResult, StepPoint
from paci_rt.train.validation import Validation

Window = tuple[Tensor | None, Tensor | None]
"""Inputs and targets, where the process has a use for them."""


class Context(Protocol):
    """Where this process stands in the run; ``paci_rt.launch.Context`` is one.

    It may also have ``restarts``, ``run_id`` and ``should_stop(step)``.
    """

    rank: int
    local: bool

    def report(self, obj: dict[str, Any]) -> None: ...


class TrainingClock:
    """Seconds of training. It stands still while a run starts, validates or saves; all stages stop it together.

    Args:
        barrier: waits for all stages.
        left_out: seconds so far that this process spent on other things while the clock ran.
    """

    def __init__(self, barrier: Callable[[], Any], left_out: Callable[[], float] = lambda: 0.0) -> None:
        self._barrier, self._left_out = barrier, left_out
        self._before_s = 0.0
        self._since: float | None = None

    @property
    def stopped(self) -> bool:
        return self._since is None

    def start(self) -> None:
        self._barrier()
        self._since = time.perf_counter() - self._left_out()

    def stop(self) -> None:
        """Wait for the slowest stage, whose drain is training too, and stop."""
        self._barrier()
        self._before_s, self._since = self.seconds(), None

    def seconds(self) -> float:
        return self.reading()(time.perf_counter())

    def reading(self) -> Callable[[float], float]:
        """From a time on ``time.perf_counter`` to what this clock shows then, if nothing is left out from now on."""
        before_s, since = self._before_s, self._since
        left_out = self._left_out()
        return lambda at: before_s + (0.0 if since is None else at - left_out - since)


class Log:
    """Keeps what this process saw and reports it from the last stage. Stages on a GPU are asked once in ``LATE`` steps,
    since asking waits for them.

    Args:
        earlier_s: seconds of training behind the checkpoint that the run went on from; points of the curves have them
            too, as they have its steps and tokens.
    """

    LATE = 10

    def __init__(
        self,
        config: TrainConfig,
        ctx: Context,
        pipeline: Pipeline,
        clock: TrainingClock,
        windows: Prefetch[Window],
        earlier_s: float = 0.0,
    ) -> None:
        self._config, self._ctx, self._pipeline, self._clock = config, ctx, pipeline, clock
        self._windows, self._earlier_s = windows, earlier_s
        self._steps: list[StepPoint] = []
        self._evals: list[EvalPoint] = []
        self._mark: tuple[float, float, int] | None = None  # clock, seconds of computing and tokens after one window
        # Steps, what the clock showed then, and losses of the step, or that of a validation.
        self._late: deque[tuple[int, float, list[Tensor] | Tensor | float]] = deque()
        self._every = 1 if pipeline.stages[0].device.type == "cpu" else self.LATE

    def seconds(self) -> float:
        """Seconds of training since the very first step."""
        return self._earlier_s + self._clock.seconds()

    def stepped(self, step: int, losses: list[Tensor]) -> None:
        """``step`` windows have run; ``losses`` gets one per micro-batch, on the last stage; in a V some come later."""
        self._late.append((step, self._clock.seconds(), losses))
        if self._mark is None:
            tokens = step * self._config.tokens_per_window
            self._mark = self._late[0][1], self._pipeline.stats()["compute_s"], tokens
            self.catch_up()
        elif len(self._late) >= self._every:
            self.catch_up()

    def catch_up(self) -> None:
        """Read what :meth:`stepped` was told."""
        while self._late and self._known(self._late[0][2]):
            step, elapsed_s, losses = self._late.popleft()
            if isinstance(losses, list):
                self._read(step, elapsed_s, losses)
            else:
                tokens, val_loss = step * self._config.tokens_per_window, float(losses)
                at_s = self._earlier_s + elapsed_s
                self._evals.append(EvalPoint(step=step, tokens=tokens, elapsed_s=at_s, val_loss=val_loss))
                self._ctx.report({"kind": "eval", "steps": self._config.steps, **asdict(self._evals[-1])})

    def _known(self, losses: list[Tensor] | Tensor | float) -> bool:
        whole = self._pipeline.n_microbatches if self._pipeline.has_last else 0
        return not isinstance(losses, list) or len(losses) == whole

    def _read(self, step: int, elapsed_s: float, losses: list[Tensor]) -> None:
        tokens = step * self._config.tokens_per_window
        assert self._mark is not None
        shows = isinstance(self._ctx, journal.Heard) and journal.due(self._config, step)
        if not self._pipeline.has_last and not shows:
            return
        stats = self._pipeline.stats()
        steady_s, compute_s = self._steady(stats)
        rates = {"tokens_per_s": self._config.tokens_per_window / elapsed_s, "utilization": 0.0}
        if tokens > self._mark[2]:
            rates["tokens_per_s"] = (tokens - self._mark[2]) / (elapsed_s - self._mark[0])
            rates["utilization"] = compute_s / (steady_s * len(self._pipeline.ranks))
        if shows:
            self._ctx.report(journal.stage_report(self._config, step, stats, rates["utilization"], self._ctx))
        if not self._pipeline.has_last:
            return
        loss = float(torch.stack(losses).mean())
        self._steps.append(StepPoint(step=step, tokens=tokens, elapsed_s=self._earlier_s + elapsed_s, loss=loss))
        more = {"skipped_windows": max(stats["skipped_windows"].values()), "data_stall_s": self._windows.stall_s}
        self._ctx.report({"kind": "step", "steps": self._config.steps, **asdict(self._steps[-1]), **rates, **more})

    def evaluated(self, step: int, val_loss: Tensor | float | None, elapsed_s: float) -> None:
        """The held-back set's loss after ``step`` windows and ``elapsed_s`` of training, on the last stage."""
        if val_loss is not None:
            self._late.append((step, elapsed_s, val_loss))
            if self._clock.stopped:
                self.catch_up()

    @contextmanager
    def validating(self, step: int, held_back: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Validate within the step that runs inside, after ``step`` windows, on ``held_back``, int64
        ``[sequences, seq]`` each."""
        validation = Validation(self._pipeline, *held_back, self._config.batch_size)
        validation.ask(drained=False)
        seconds_of = self._clock.reading()
        yield
        self.evaluated(step, validation.answer(), seconds_of(self._pipeline.evaluation_began_s))

    def result(self, params_sha256: str | None, stopped: int | None = None) -> StageResult:
        """Everything, after the clock has stopped for good; ``stopped``: the step before which SIGTERM ended it."""
        stats = self._pipeline.stats()
        if self._mark is None:  # a restart found everything done
            self._mark = self._clock.seconds(), stats["compute_s"], 0
        steady_s, compute_s = self._steady(stats)
        return StageResult(
            stats=stats,
            wall_s=self._clock.seconds(),
            steady_s=steady_s,
            steady_compute_s=compute_s,
            steps=tuple(self._steps),
            evals=tuple(self._evals),
            params_sha256=params_sha256,
            events=tuple(self._pipeline.events),
            stopped=stopped,
            data_stall_s=self._windows.stall_s,
        )

    def _steady(self, stats: dict[str, Any]) -> tuple[float, float]:
        """Training clock and seconds of computing since the first window ended here."""
        assert self._mark is not None
        return self._clock.seconds() - self._mark[0], stats["compute_s"] - self._mark[1]
