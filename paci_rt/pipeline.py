"""The user's side: schedules with the interface of ``torch.distributed.pipelining``, and ``LocalPipeline``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from paci_rt import schedules
from paci_rt.lowering import TiedWeight
from paci_rt.runtime import Pipeline
from paci_rt.stage import LossFn, PipelineStage
from paci_rt.transport import LocalTransport, Transport

NamedParams = list[tuple[str, nn.Parameter]]


class _Schedule(Pipeline):
    """A pipeline whose other stages live in other processes; torch's schedule interface.

    Args:
        stage: this process's :class:`~paci_rt.PipelineStage`.
        n_microbatches, loss_fn: as torch's.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec: must stay None; batches are cut along dimension 0.
        scale_grads: as torch's.
        optimizer: steps with the schedule; None leaves gradients in ``.grad`` (flush schedules only).
        lr_scheduler: any ``torch.optim.lr_scheduler``, stepped after each local update.
        transport: None finds one: gloo between processes, local where the pipeline has one stage.

    The other arguments are those of :class:`Pipeline`.
    """

    name: ClassVar[str]

    def __init__(
        self,
        stage: PipelineStage,
        n_microbatches: int,
        loss_fn: LossFn | None = None,
        args_chunk_spec: None = None,
        kwargs_chunk_spec: None = None,
        output_merge_spec: None = None,
        scale_grads: bool = True,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        slack: int = 0,
        buffers: int | None = None,
        tied_weights: Sequence[TiedWeight] = (),
        transport: Transport | None = None,
        trace: bool = False,
    ) -> None:
        for name, spec in (
            ("args_chunk_spec", args_chunk_spec),
            ("kwargs_chunk_spec", kwargs_chunk_spec),
            ("output_merge_spec", output_merge_spec),
        ):
            if spec is not None:
                raise ValueError(f"{name} is not None: batches are cut along dimension 0; leave it out")
        super().__init__(
            [stage],
            self.name,
            n_microbatches,
            loss_fn,
            optimizers=[optimizer],
            lr_schedulers=None if lr_scheduler is None else [lr_scheduler],
            slack=slack,
            buffers=buffers,
            tied_weights=tied_weights,
            transport=_find_transport(stage) if transport is None else transport,
            trace=trace,
            scale_grads=scale_grads,
        )


def _find_transport(stage: PipelineStage) -> Transport:
    if stage.num_stages == 1:
        return LocalTransport()
    from paci_rt.transport.gloo import GlooTransport  # imports torch.distributed

    return GlooTransport(stage.group, num_stages=stage.num_stages)


class SchedulePACI(_Schedule):
    """Asynchronous 1F1B with a local update every ``n_microbatches`` (PACI, arXiv 2606.07881)."""

    name = "paci"


class ScheduleAsync1F1B(_Schedule):
    """Asynchronous 1F1B that updates after every backward; ``n_microbatches`` updates a ``step``."""

    name = "async-1f1b"


class Schedule1F1B(_Schedule):
    """1F1B with a flush before every update (PipeDream-Flush)."""

    name = "1f1b"


class ScheduleGPipe(_Schedule):
    """All forwards, then all backwards, then the update."""

    name = "gpipe"


_CLASSES: dict[str, type[_Schedule]] = {
    cls.name: cls for cls in (SchedulePACI, Schedule1F1B, ScheduleGPipe, ScheduleAsync1F1B)
}


def get_schedule_class(name: str) -> type[_Schedule]:
    """The schedule class called ``name``, in any case, as torch's function of that name.

    Raises:
        ValueError: no schedule has that name; the message suggests the nearest.
    """
    return _CLASSES[schedules.get(name).name]


class LocalPipeline(Pipeline):
    """All stages in one process: for notebooks, for tests, and as the oracle of distributed runs.

    Stages run one after another in the order of the same action streams, so the numbers are those of a distributed
    run, bit for bit; only the seconds are not.

    Args:
        modules: one slice a stage, first to last.
        schedule: name of the schedule.
        n_microbatches, loss_fn: as for the schedules.
        optimizer: a function from one stage's list of ``(name, parameter)`` pairs to its optimizer, for example
            ``lambda params: paci_rt.AdamW(params, lr=3e-4)``; or a list of optimizers, one a stage; or None.
        lr_scheduler: a function from an optimizer to its learning-rate scheduler, or a list of schedulers.

    The other arguments are those of :class:`Pipeline`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        schedule: str = "paci",
        n_microbatches: int,
        loss_fn: LossFn,
        optimizer: Callable[[NamedParams], torch.optim.Optimizer] | Sequence[torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | Sequence[Any] | None = None,
        slack: int = 0,
        buffers: int | None = None,
        tied_weights: Sequence[TiedWeight] = (),
        trace: bool = False,
        scale_grads: bool = True,
    ) -> None:
        if not modules:
            raise ValueError("modules is empty: give one module a stage")
        stages = [PipelineStage(module, at, len(modules)) for at, module in enumerate(modules)]
        optimizers: list[Any] = [None] * len(stages)
        if callable(optimizer):
            optimizers = [optimizer(list(stage.named_parameters())) for stage in stages]
        elif optimizer is not None:
            optimizers = list(optimizer)
            if len(optimizers) != len(stages):
                raise ValueError(f"{len(optimizers)} optimizers for {len(stages)} stages: give one a stage")
        if callable(lr_scheduler):
            lr_scheduler = [lr_scheduler(one) for one in optimizers]
        super().__init__(
            stages,
            schedule,
            n_microbatches,
            loss_fn,
            optimizers=optimizers,
            lr_schedulers=lr_scheduler,
            slack=slack,
            buffers=buffers,
            tied_weights=tied_weights,
            transport=LocalTransport(),
            trace=trace,
            scale_grads=scale_grads,
        )
