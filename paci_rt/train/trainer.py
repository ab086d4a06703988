"""Train a language model through a pipeline. Every process of a run calls :func:`train`; it reads top to bottom.

Precision is a property of the parameters (``--dtype``), never of autocast: autocast makes a low-precision copy of each
weight in every forward and autograd keeps it until the backward, which with several micro-batches in flight is the
very weight stash that PACI does without. ``bf16`` trains bf16 parameters, and the optimizer keeps fp32 masters.

Gradients that are not finite never reach a weight, nor a checkpoint. Clipping by norm (``--clip-grad-norm``) is exact
under schedules that flush; under the others each stage goes by the newest norms that it has heard of.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import paci_rt
from paci_rt import checkpoint, status
from paci_rt.errors import CheckpointError
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.replicas import require_same_weights
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.train import config_file
from paci_rt.train.agree import agree_on_run
from paci_rt.train.build import build_pipeline, own_options, set_options
from paci_rt.train.config import TrainConfig
from paci_rt.train.data import Corpus, load_corpus
from paci_rt.train.gather import gathered_sha256
from paci_rt.train.model import HELD_BACK, parameter_shapes, tied_weights
from paci_rt.train.pause import Pause, after_restart, restarts, seconds_in
from paci_rt.train.prefetch import Prefetch
from paci_rt.train.progress import Context, Log, TrainingClock, Window
from paci_rt.train.replicas import Place, find_place
from paci_rt.train.results import StageResult
from paci_rt.train.saved import check_same_shape
from paci_rt.transport.collective import barrier, new_group


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
        return _train(after_restart(config, ctx), ctx, held, config)


def _train(config: TrainConfig, ctx: Context, held: ExitStack, given: TrainConfig) -> StageResult:
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
    earlier_s = 0.0
    if config.resume is not None:
        board.enter("loading the checkpoint")
        earlier_s = resume(config, pipeline, lr_schedulers, ties, group, first_step)
    clock = TrainingClock(
        barrier=lambda: None if world is None else meet(world, timeout_s), left_out=lambda: pipeline.evaluation_s
    )
    windows = held.enter_context(batches(config, corpus, pipeline, first_step, place))
    log = Log(config, place.reports(ctx), pipeline, clock, windows, earlier_s)
    rows = corpus.validation(config.eval_batches * config.batch_size, config.seq_len)  # int64 [sequences, seq], both
    held_back = config.shape.examples(*rows, HELD_BACK)
    pause = Pause(
        config=config,
        given=given,
        ctx=ctx,
        pipeline=pipeline,
        validates=place.first,
        group=group,
        ties=ties,
        clock=clock,
        log=log,
        held_back=held_back,
    )

    clock.start()
    board.enter("training")
    should_stop = getattr(ctx, "should_stop", lambda _: False)
    for step in range(first_step, config.steps):
        board.words[status.STEP] = step
        if should_stop(step):
            pause(step, validate=False, save=True)
            return ended(log.result(None, stopped=step), pipeline, world)
        validate, save = due(config, step, first=step == first_step, restarted=restarts(ctx) > 0)
        within = validate and not config.eval_drained and not save  # a checkpoint drains anyway
        if save or (validate and not within):
            pause(step, validate=validate, save=save, beside=config.async_checkpoint)
            clock.start()
            board.enter("training", step=step)
        x, y = windows.take(step)  # int64 [batch, seq], both; None where this process has no use for it
        losses: list[Tensor] = []
        with log.validating(step, held_back) if within and place.first else nullcontext():
            pipeline.step(*(() if x is None else (x,)), target=y, losses=losses, return_outputs=False)
        log.stepped(step + 1, losses)
        pause.tell_saved()
    pause(config.steps, validate=True, save=True)

    board.enter("the final gather", step=config.steps)
    if pipeline.replicas is not None:
        require_same_weights(pipeline.replicas, pipeline.stages)
    digest = params_sha256(config, pipeline, ctx, group) if place.first else None
    return ended(log.result(digest), pipeline, world)


def resume(
    config: TrainConfig,
    pipeline: Pipeline,
    lr_schedulers: Sequence[LambdaLR],
    ties: Sequence[TiedWeight],
    group: dist.ProcessGroup | None,
    first_step: int,
) -> float:
    """Load the checkpoint of ``config.resume``; learning rates go on as these options say, from ``first_step``.

    Returns:
        Seconds of training that are behind it.
    """
    assert config.resume is not None
    given = own_options(lr_schedulers)
    extra = checkpoint.load(config.resume, pipeline, tied_weights=ties, group=group)
    set_options(lr_schedulers, given, config, first_step)
    return seconds_in(extra)


def due(config: TrainConfig, step: int, *, first: bool, restarted: bool) -> tuple[bool, bool]:
    """Whether a validation, and whether a checkpoint, comes before window ``step``, which may be the run's first."""
    validate = config.eval_interval > 0 and (step % config.eval_interval == 0 or (first and not restarted))
    return validate, config.save_interval > 0 and step % config.save_interval == 0 and not first


def ended(result: StageResult, pipeline: Pipeline, group: dist.ProcessGroup | None) -> StageResult:
    """Give back what a run took."""
    pipeline.close()
    if group is not None:
        dist.destroy_process_group(group)
    return result


def meet(group: dist.ProcessGroup, timeout_s: float) -> None:
    """Wait for all stages, for as long as they show signs of life."""
    barrier(group, timeout_s, kind="clock", what="have not come to this barrier beside training")


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
