"""Train a language model through a pipeline. Every process of a run calls :func:`train`; it reads top to bottom.

Precision is a property of the parameters (``--dtype``), never of autocast: autocast makes a low-precision copy of each
weight in every forward and autograd keeps it until the backward, which with several micro-batches in flight is the
very weight stash that PACI does without. ``bf16`` trains bf16 parameters, and the optimizer keeps fp32 masters.

Gradients that are not finite never reach a weight, nor a checkpoint. Clipping by norm (``--clip-grad-norm``) is exact
under schedules that flush; under the others each stage goes by the newest norms that it has heard of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import paci_rt
from paci_rt import checkpoint, status
from paci_rt.errors import CheckpointError
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.replicas import require_same_weights
from paci_rt.train import config_file, journal
from paci_rt.train.agree import agree_on_run
from paci_rt.train.config import TrainConfig
from paci_rt.train.data import Corpus, load_corpus
from paci_rt.train.gather import gathered_sha256
from paci_rt.train.model import HELD_BACK, build_stage, cross_entropy, parameter_shapes, tied_weights
from paci_rt.train.prefetch import Prefetch
from paci_rt.train.replicas import Place, find_place
from paci_rt.train.results import EvalPoint, StageResult, StepPoint
from paci_rt.train.saved import check_same_shape
from paci_rt.train.validation import Validation, evaluate
from paci_rt.transport import make_transport
from paci_rt.transport.collective import barrier, new_group

DUMPS = "dumps"
"""Folder in --out for what the stages of a failed run did last."""


class Context(Protocol):
    """Where this process stands in the run; ``paci_rt.launch.Context`` is one.

    It may also have ``restarts``, ``run_id`` and ``should_stop(step)``.
    """

    rank: int
    local: bool

    def report(self, obj: dict[str, Any]) -> None: ...


def train(config: TrainConfig, ctx: Context) -> StageResult:
    """Train stage ``ctx.rank``, or all of them where ``ctx.local``.

    The process of the last stage reports each window (``kind="step"``) and each validation (``kind="eval"``).

    Raises:
        ValueError: unusable data.
        CheckpointError: the one to resume from is damaged or does not fit, or ``out`` is in use or cannot be used.
        DisagreementError: another process was given other options, data or code.
        ActionError, PeerLostError, TransferTimeoutError, DriftBoundError: the pipeline failed.
    """
    with ExitStack() as held:
        return _train(after_restart(config, ctx), ctx, held)


def _train(config: TrainConfig, ctx: Context, held: ExitStack) -> StageResult:
    corpus, first_step = preflight(config, after_restart=config.resume is not None and restarts(ctx) > 0)
    board, timeout_s = status.board(), config.transfer_timeout
    board.enter("meeting the other stages")
    if not ctx.local:
        agree_on_run(config, corpus, first_step)
    place = find_place(config, ctx.rank, local=ctx.local)
    pipeline, lr_schedulers = build_pipeline(config, ctx, place)
    # A group of our own, because the default one carries the pipeline's messages.
    world = None if ctx.local else new_group(timeout_s)
    group = world if place.pipeline is None else place.pipeline
    ties = tied_weights(config.shape, config.stages * config.chunks)
    if config.out is not None:
        gathered = config.gather_checkpoints
        held.enter_context(checkpoint.hold(config.out, pipeline, group=group, gathered=gathered))
    if config.resume is not None:
        board.enter("loading the checkpoint")
        given = own_options(lr_schedulers)
        checkpoint.load(config.resume, pipeline, tied_weights=ties, group=group)
        set_options(lr_schedulers, given, config, first_step)
    clock = TrainingClock(
        barrier=lambda: None if world is None else meet(world, timeout_s), left_out=lambda: pipeline.evaluation_s
    )
    windows = held.enter_context(batches(config, corpus, pipeline, first_step, place))
    log = Log(config, place.reports(ctx), pipeline, clock, windows)
    held_back = corpus.validation(config.eval_batches * config.batch_size, config.seq_len)  # int64 [sequences, seq]
    held_back = config.shape.examples(*held_back, HELD_BACK)
    validation = Validation(pipeline, *held_back, config.batch_size)

    def rest(step: int, *, validate: bool, save: bool) -> None:
        """Empty the pipeline and stop the clock for what is not training."""
        pipeline.drain()
        log.catch_up()
        pipeline.synchronize()
        clock.stop()
        val_loss = None
        if validate and place.first:
            board.enter("validation", step=step)
            val_loss = evaluate(pipeline, *held_back, config.batch_size)
            log.evaluated(step, val_loss, clock.seconds())
        if save and config.out is not None:
            require_finite(pipeline, step, val_loss if config.on_nonfinite == "raise" else None)
            board.enter("saving the checkpoint", step=step)
            extra = {"config": config.to_json(), "run": run_id(ctx)}
            how: dict[str, Any] = {"keep": config.keep_checkpoints, "gathered": config.gather_checkpoints}
            checkpoint.save(config.out, pipeline, extra=extra, tied_weights=ties, group=group, **how)
            if ctx.rank == 0 and not (restarts(ctx) and config.resume == config.out):  # whose options are there
                config_file.save(config, config.out)
            if ctx.rank == 0 and isinstance(ctx, journal.Heard):
                ctx.report({"kind": "saved", "step": step})

    clock.start()
    board.enter("training")
    should_stop = getattr(ctx, "should_stop", lambda _: False)
    for step in range(first_step, config.steps):
        board.words[status.STEP] = step
        if should_stop(step):
            rest(step, validate=False, save=True)
            return ended(log.result(None, stopped=step), pipeline, world)
        first = step == first_step and not restarts(ctx)
        validate = config.eval_interval > 0 and (step % config.eval_interval == 0 or first)
        save = config.save_interval > 0 and step % config.save_interval == 0 and step > first_step
        within = validate and not config.eval_drained and not save  # a checkpoint drains anyway
        if save or (validate and not within):
            rest(step, validate=validate, save=save)
            clock.start()
            board.enter("training", step=step)
        x, y = windows.take(step)  # int64 [batch, seq], both; None where this process has no use for it
        losses: list[Tensor] = []
        inputs = () if x is None else (x,)
        target = y
        asks = within and place.first
        if asks:
            validation.ask(drained=False)
        seconds_of = clock.reading()
        pipeline.step(*inputs, target=target, losses=losses, return_outputs=False)
        if asks:
            log.evaluated(step, validation.answer(), seconds_of(pipeline.evaluation_began_s))
        log.stepped(step + 1, losses)
    rest(config.steps, validate=True, save=True)

    board.enter("the final gather", step=config.steps)
    if pipeline.replicas is not None:
        require_same_weights(pipeline.replicas, pipeline.stages)
    digest = params_sha256(config, pipeline, ctx, group) if place.first else None
    return ended(log.result(digest), pipeline, world)


def ended(result: StageResult, pipeline: Pipeline, group: dist.ProcessGroup | None) -> StageResult:
    """Give back what a run took."""
    pipeline.close()
    if group is not None:
        dist.destroy_process_group(group)
    return result


def meet(group: dist.ProcessGroup, timeout_s: float) -> None:
    """Wait for all stages, for as long as they show signs of life."""
    barrier(group, timeout_s, kind="clock", what="have not come to this barrier beside training")


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


def preflight(config: TrainConfig, *, after_restart: bool = False) -> tuple[Corpus, int]:
    """Open the data and look at the checkpoint to resume: all that can be wrong outside the options themselves.

    Cheap, so that a launcher can call it before it starts any process.

    Returns:
        The corpus, and the local updates that the checkpoint has behind it (0 without one).

    Raises:
        ValueError: the data cannot be used. CheckpointError: nor the checkpoint, with these options.
    """
    corpus = load_corpus(config.data, vocab_size=config.shape.data_vocab_size, seq_len=config.seq_len)
    if config.out is not None:
        config_file.text_of(config)
    if config.resume is None:
        return corpus, 0
    index = checkpoint.read_index(config.resume)
    saved = index["extra"].get("config")
    names = ("model", "dtype", "optimizer")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), str) for name in names):
        raise CheckpointError(f"--resume {config.resume}: this checkpoint was not written by paci-rt train")
    for name in names:
        if saved[name] != getattr(config, name):
            raise CheckpointError(
                f"--resume {config.resume} was trained with --{name} {saved[name]}, not {getattr(config, name)}; "
                f"use --{name} {saved[name]}"
            )
    check_same_shape(config, saved)
    if config.steps <= index["windows"] and not after_restart:
        raise CheckpointError(
            f"--resume {config.resume} has {index['windows']} steps behind it and --steps {config.steps} counts them; "
            "ask for more"
        )
    return corpus, int(index["windows"])


def build_pipeline(config: TrainConfig, ctx: Context, place: Place | None = None) -> tuple[Pipeline, list[LambdaLR]]:
    """The schedule with its stages and optimizers in this process, and one learning-rate scheduler per stage."""
    pieces = config.stages * config.chunks
    place = Place(stage=ctx.rank) if place is None else place
    here = range(pieces) if ctx.local else range(place.stage, pieces, config.stages)
    modules = [
        build_stage(config.shape, at, pieces, seed=config.seed, dtype=config.torch_dtype, partition=config.partition)
        for at in here
    ]
    optimizers = [make_optimizer(config, module.named_parameters()) for module in modules]
    lr_schedulers = [LambdaLR(optimizer, config.lr_factor) for optimizer in optimizers]
    options: dict[str, Any] = {
        "n_microbatches": config.accumulation,
        "loss_fn": cross_entropy,
        "slack": config.slack,
        "policy": config.policy,
        "lookahead": config.lookahead,
        "costs": config.step_costs,
        "buffers": config.buffers,
        "tied_weights": tied_weights(config.shape, pieces),
        "trace": config.trace,
        "on_nonfinite": config.on_nonfinite,
        "max_grad_norm": config.clip_grad_norm,
        "skip_spikes": config.skip_spikes,
    }
    if ctx.local:
        options |= {"schedule": config.schedule, "chunks": config.chunks}
        options |= {"optimizer": optimizers, "lr_scheduler": lr_schedulers}
        return paci_rt.LocalPipeline(modules, device=config.torch_device(0), **options), lr_schedulers
    device = config.torch_device(ctx.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that no library makes a context on another one by accident
    stages = [
        paci_rt.PipelineStage(module, at, pieces, device, group=place.pipeline)
        for module, at in zip(modules, here, strict=True)
    ]
    options |= {"optimizer": optimizers, "lr_scheduler": lr_schedulers, **place.options}
    options["transfer_timeout_s"] = config.transfer_timeout
    options["transport"] = make_transport(
        config.transport,
        group=place.pipeline,
        num_stages=pieces,
        chunks=config.chunks,
        timeout_s=config.transfer_timeout,
        events_dir="" if config.out is None else Path(config.out) / DUMPS,
        device=device,
    )
    return paci_rt.get_schedule_class(config.schedule)(stages, **options), lr_schedulers


def make_optimizer(config: TrainConfig, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Weight decay on matrices and embeddings, none on biases and LayerNorms; ``muon`` has a group of its own for the
    matrices inside blocks."""
    hidden, others, vectors = [], [], []
    for name, param in named:
        if param.dim() < 2:
            vectors.append(param)
        elif config.optimizer == "muon" and param.dim() == 2 and name.startswith(config.shape.blocks):
            hidden.append(param)
        else:
            others.append(param)
    groups: list[dict[str, Any]] = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind, betas = config.optimizer, (config.beta1, config.beta2)
    if kind == "muon":
        groups = [{**group, "use_muon": False} for group in groups]
        groups.append({"params": hidden, "weight_decay": config.weight_decay, "use_muon": True})
        return paci_rt.Muon(groups, lr=config.lr, betas=betas, momentum=config.momentum)
    if kind.endswith("sgd"):
        sgd = torch.optim.SGD if kind == "torch-sgd" else paci_rt.SGD
        return sgd(groups, lr=config.lr, momentum=config.momentum)
    classes: dict[str, Any] = {
        "adamw": paci_rt.AdamW,
        "nadam": paci_rt.NAdam,
        "lion": paci_rt.Lion,
        "torch-adamw": torch.optim.AdamW,
    }
    optimizer: torch.optim.Optimizer = classes[kind](groups, lr=config.lr, betas=betas)
    return optimizer


def own_options(lr_schedulers: Sequence[LambdaLR]) -> list[list[dict[str, Any]]]:
    """By stage and parameter group the options that the optimizers were made with."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in scheduler.optimizer.param_groups]
        for scheduler in lr_schedulers
    ]


def set_options(
    lr_schedulers: Sequence[LambdaLR], given: Sequence[Sequence[dict[str, Any]]], config: TrainConfig, step: int
) -> None:
    """After a resume: the options of the next update are this run's, not the checkpoint's, and its rate follows from
    ``step``."""
    for scheduler, options in zip(lr_schedulers, given, strict=True):
        scheduler.base_lrs = [config.lr for _ in scheduler.base_lrs]
        for group, own in zip(scheduler.optimizer.param_groups, options, strict=True):
            group.update({**own, "lr": config.lr * config.lr_factor(step), "initial_lr": config.lr})


def require_finite(pipeline: Pipeline, step: int, val_loss: float | None) -> None:
    """Raise NonFiniteError rather than save, over a good checkpoint, what is not finite."""
    wrong = [
        (stage.stage_index, name)
        for stage in pipeline.stages
        for name, param in stage.named_parameters()
        if not bool(param.detach().isfinite().all())
    ]
    last = pipeline.stages[-1].stage_index
    at, name = wrong[0] if wrong else (last, "")
    if not wrong and (val_loss is None or math.isfinite(val_loss)):
        return
    what = f"parameter {name!r} is not finite" if wrong else f"the validation loss is {val_loss}"
    text = (
        f"stage {at}: {what} after {step} local updates, so no checkpoint was written; lower the learning rate (--lr)"
    )
    raise paci_rt.NonFiniteError(f"{at}U{step - 1}", text, at, step - 1, None, name)


Window = tuple[Tensor | None, Tensor | None]


def batches(config: TrainConfig, corpus: Corpus, pipeline: Pipeline, first_step: int, place: Place) -> Prefetch[Window]:
    """Inputs and targets of every window, those that this process needs, read ahead of the training."""

    def read(step: int) -> Window:
        if not (pipeline.has_first or pipeline.has_last):
            return None, None
        tokens = corpus.batch(step, config.batch_size, config.seq_len, config.seed)  # int64 [batch, seq], both
        x, y = pinned(pipeline, *place.own_rows(*config.shape.examples(*tokens, config.seed, step)))
        return x if pipeline.has_first else None, y if pipeline.has_last else None

    return Prefetch(read, range(first_step, config.steps))


def pinned(pipeline: Pipeline, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as the stages of this process can take them without waiting."""
    return tensors if pipeline.stages[0].device.type == "cpu" else tuple(tensor.pin_memory() for tensor in tensors)


def params_sha256(config: TrainConfig, pipeline: Pipeline, ctx: Context, group: dist.ProcessGroup | None) -> str | None:
    """Hash of the uncut model's parameters, which travel to rank 0 one at a time; None on the others."""
    mine = dict(pipeline.named_parameters())
    shapes = parameter_shapes(config.shape)
    if ctx.local:
        return paci_rt.params_sha256((name, mine[name]) for name in shapes)
    assert group is not None
    return gathered_sha256(mine, shapes, config.torch_dtype, group, config.transfer_timeout)


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
    since asking waits for them."""

    LATE = 10

    def __init__(
        self, config: TrainConfig, ctx: Context, pipeline: Pipeline, clock: TrainingClock, windows: Prefetch[Window]
    ) -> None:
        self._config, self._ctx, self._pipeline, self._clock = config, ctx, pipeline, clock
        self._windows = windows
        self._steps: list[StepPoint] = []
        self._evals: list[EvalPoint] = []
        self._mark: tuple[float, float, int] | None = None  # clock, seconds of computing and tokens after one window
        self._late: list[
            tuple[int, float, list[Tensor] | Tensor | float]
        ] = []  # losses of a step, or that of a validation
        self._every = 1 if pipeline.stages[0].device.type == "cpu" else self.LATE

    def stepped(self, step: int, losses: list[Tensor]) -> None:
        """``step`` windows have run; ``losses`` has one per micro-batch, on the last stage."""
        self._late.append((step, self._clock.seconds(), losses))
        if self._mark is None or len(self._late) >= self._every:
            self.catch_up()

    def catch_up(self) -> None:
        """Read what :meth:`stepped` was told."""
        for step, elapsed_s, losses in self._late:
            if isinstance(losses, list):
                self._read(step, elapsed_s, losses)
            else:
                tokens, val_loss = step * self._config.tokens_per_window, float(losses)
                self._evals.append(EvalPoint(step=step, tokens=tokens, elapsed_s=elapsed_s, val_loss=val_loss))
                self._ctx.report({"kind": "eval", "steps": self._config.steps, **asdict(self._evals[-1])})
        self._late.clear()

    def _read(self, step: int, elapsed_s: float, losses: list[Tensor]) -> None:
        tokens = step * self._config.tokens_per_window
        if self._mark is None:
            self._mark = elapsed_s, self._pipeline.stats()["compute_s"], tokens
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
        self._steps.append(StepPoint(step=step, tokens=tokens, elapsed_s=elapsed_s, loss=loss))
        more = {"skipped_windows": max(stats["skipped_windows"].values()), "data_stall_s": self._windows.stall_s}
        self._ctx.report({"kind": "step", "steps": self._config.steps, **asdict(self._steps[-1]), **rates, **more})

    def evaluated(self, step: int, val_loss: Tensor | float | None, elapsed_s: float) -> None:
        """The held-back set's loss after ``step`` windows and ``elapsed_s`` of training, on the last stage."""
        if val_loss is not None:
            self._late.append((step, elapsed_s, val_loss))
            if self._clock.stopped:
                self.catch_up()

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
