"""What a run does between steps, with an empty pipeline and a stopped clock; where it goes on after a restart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

import paci_rt
from paci_rt import checkpoint, status
from paci_rt.report.runs import RESULT
from paci_rt.runtime.beside import settle
from paci_rt.runtime.checkpoint_save import first_lost
from paci_rt.runtime.engine import Pipeline
from paci_rt.schedules import limits
from paci_rt.train import config_file, journal
from paci_rt.train.config import TrainConfig
from paci_rt.train.progress import Context, Log, TrainingClock
from paci_rt.train.validation import evaluate

SECONDS = "elapsed_s"
"""In a checkpoint's ``extra``: seconds of training behind it."""


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Validates and saves, as it is asked to.

    Attributes:
        given: the options as they were given; after a restart ``config`` resumes from somewhere else.
        validates: whether this process has a part in validations.
        group: of the pipeline, beside the one for its messages.
        ties: tied weights. held_back: inputs and targets, int64 ``[sequences, seq]``.
    """

    config: TrainConfig
    given: TrainConfig
    ctx: Context
    pipeline: Pipeline
    validates: bool
    group: dist.ProcessGroup | None
    ties: Sequence[paci_rt.TiedWeight]
    clock: TrainingClock
    log: Log
    held_back: tuple[Tensor, Tensor]
    written: list[tuple[int, checkpoint.Saving]] = field(default_factory=list)
    """A checkpoint that may still be written, of which nobody was told, and its step."""

    def __call__(self, step: int, *, validate: bool, save: bool, beside: bool = False) -> None:
        """After ``step`` windows. The clock is left stopped.

        Args:
            beside: let the checkpoint be written while training goes on.
        """
        config, board = self.config, status.board()
        self.pipeline.drain()
        self.log.catch_up()
        self.pipeline.synchronize()
        self.clock.stop()
        val_loss = None
        if validate and self.validates:
            board.enter("validation", step=step)
            val_loss = evaluate(self.pipeline, *self.held_back, config.batch_size)
            self.log.evaluated(step, val_loss, self.clock.seconds())
        if save and config.out is not None:
            require_finite(self.pipeline, step, val_loss if config.on_nonfinite == "raise" else None)
            board.enter("saving the checkpoint", step=step)
            self._save(step, config.out, beside=beside)

    def _save(self, step: int, out: str, *, beside: bool) -> None:
        config, ctx = self.config, self.ctx
        extra = {"config": self.given.to_json(), "run": run_id(ctx), SECONDS: self.log.seconds()}
        how: dict[str, Any] = {"keep": config.keep_checkpoints, "gathered": config.gather_checkpoints}
        how |= {"extra": extra, "tied_weights": self.ties, "group": self.group, "blocking": not beside}
        settle(self.pipeline)
        self.tell_saved()
        saving = checkpoint.save(out, self.pipeline, **how)
        if saving is None:
            self._tell(step, out)
        else:
            self.written.append((step, saving))

    def tell_saved(self) -> None:
        """Say that a checkpoint is there, once it is."""
        if self.written and self.written[0][1].done():
            step, saving = self.written.pop()
            saving.raise_if_failed()
            if not saving.failed and self.config.out is not None:
                self._tell(step, self.config.out)

    def _tell(self, step: int, out: str) -> None:
        ctx = self.ctx
        if ctx.rank == 0:  # both belong to the checkpoint that is there now
            config_file.save(self.given, out)
            with suppress(OSError):
                Path(out, RESULT).unlink()
        if ctx.rank == 0 and isinstance(ctx, journal.Heard):
            ctx.report({"kind": "saved", "step": step})


def seconds_in(extra: Mapping[str, Any]) -> float:
    """Seconds of training that a checkpoint has behind it, by its ``extra``; 0 where it does not say."""
    value: Any = extra.get(SECONDS)
    return float(value) if limits.is_number(value, 1e12) else 0.0


def require_finite(pipeline: Pipeline, step: int, val_loss: float | None) -> None:
    """Raise NonFiniteError rather than save, over a good checkpoint, what is not finite."""
    found = first_lost(pipeline)
    if found is None and val_loss is not None and not math.isfinite(val_loss):
        found = pipeline.stages[-1].stage_index, f"the validation loss is {val_loss}"
    if found is not None:
        at, what = found
        text = f"stage {at}: {what} after update {step}, so no checkpoint was written; lower the learning rate (--lr)"
        raise paci_rt.NonFiniteError(f"{at}U{step - 1}", text, at, step - 1)


def after_restart(config: TrainConfig, ctx: Context) -> TrainConfig:
    """The options with which a run goes on that was started again: from its own last checkpoint, where it has one."""
    if not restarts(ctx) or config.out is None or not run_id(ctx):
        return config
    try:
        index = checkpoint.read_index(config.out)
    except ValueError:
        return config  # nothing was saved yet
    return replace(config, resume=config.out) if index["extra"].get("run") == run_id(ctx) else config


def restarts(ctx: Context) -> int:
    """How often the run was started again before."""
    return int(getattr(ctx, "restarts", 0))


def run_id(ctx: Context) -> str:
    """What tells the run from others; empty where nothing starts it again."""
    return str(getattr(ctx, "run_id", ""))
