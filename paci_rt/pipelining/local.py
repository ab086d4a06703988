"""All stages in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from paci_rt.optim.backend import usable
from paci_rt.pipelining.base import chunk_specs, one_each
from paci_rt.runtime.argument_types import as_device, check_modules
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.loss_scale import LossScaler
from paci_rt.runtime.safety import Safety
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.tied_weights import declared_ties
from paci_rt.runtime.torch_stages import check_replicated, from_one_pipe
from paci_rt.schedules import Slack, StepCosts
from paci_rt.schedules import get as get_family
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.schedules.placement import V
from paci_rt.transport import LocalTransport, Transport

NamedParams = list[tuple[str, nn.Parameter]]


class LocalPipeline(Pipeline):
    """All stages in one process: for notebooks, for tests, and as the oracle of distributed runs.

    Stages run one after another in the order of the same action streams, so the numbers are those of a distributed
    run, bit for bit; only the seconds are not.

    Args:
        modules: one slice per stage, first to last: ``chunks`` times as many as ranks.
        schedule: name of the schedule.
        chunks: stages per rank; None is 2 where they lie in a V, else 1.
        n_microbatches, loss_fn, args_chunk_spec, kwargs_chunk_spec, output_merge_spec: as for the schedules.
        optimizer: a function from one stage's list of ``(name, parameter)`` pairs to its optimizer, for example
            ``lambda params: paci_rt.AdamW(params, lr=3e-4)``; or a list of optimizers, one per stage; or None.
        lr_scheduler: a function from an optimizer to its learning-rate scheduler, or a list of schedulers.
        transport: None is unbounded mailboxes in this process.
        device: where the stages run, one device for all or one per stage; None is where each module is.
        streams: on GPUs one ``torch.cuda.Stream`` a stage, for example of an SM partition of its own; a stage with None
            computes on the stream that is current in a step. Without ``streams`` every stage gets a new one.
        update_streams: likewise the streams of their updates; None is a new one per stage.

    The other arguments are those of :class:`Pipeline` and, on gradients that are not finite, or large, those of
    :class:`~paci_rt.runtime.safety.Safety`.

    Example:
        >>> stages = [nn.Linear(8, 8), nn.Linear(8, 2)]
        >>> pipeline = paci_rt.LocalPipeline(
        ...     stages, n_microbatches=4, loss_fn=nn.MSELoss(), optimizer=lambda params: paci_rt.AdamW(params, lr=1e-3)
        ... )
        >>> for _ in range(3):
        ...     outputs = pipeline.step(torch.ones(8, 8), target=torch.ones(8, 2))
        >>> pipeline.drain()
        >>> stats = pipeline.stats()
        >>> stats["windows"], stats["drift"], stats["drift_bound"]
        (3, {0: {0: 10, 1: 2}, 1: {0: 12}}, 1)
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        schedule: str = "paci",
        n_microbatches: int,
        loss_fn: LossFn | None = None,
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        optimizer: Callable[[NamedParams], torch.optim.Optimizer] | Sequence[torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | Sequence[Any] | None = None,
        chunks: int | None = None,
        slack: Slack | Sequence[int] = 0,
        policy: str | None = None,
        lookahead: bool | None = None,
        costs: StepCosts | None = None,
        activation_limit: float | None = None,
        buffers: int | None = None,
        tied_weights: Sequence[TiedWeight] = (),
        trace: bool = False,
        scale_grads: bool = True,
        on_nonfinite: str | None = None,
        max_grad_norm: float | None = None,
        skip_spikes: float | None = None,
        loss_scale: LossScaler | None = None,
        transport: Transport | None = None,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        streams: Sequence[torch.cuda.Stream | None] | None = None,
        update_streams: Sequence[torch.cuda.Stream | None] | None = None,
    ) -> None:
        _check_modules(modules, tied_weights)
        tied_weights = declared_ties(modules, tied_weights)
        stages = _stages(modules, device, streams, update_streams)
        optimizers: list[Any] = [None] * len(stages)
        if callable(optimizer):
            optimizers = [optimizer(list(stage.named_parameters())) for stage in stages]
        elif optimizer is not None:
            optimizers = one_each("optimizer", optimizer, stages) or []
        if callable(lr_scheduler):
            if optimizer is None:
                raise ValueError("lr_scheduler needs optimizer=: without one the schedule takes no step to follow")
            lr_scheduler = [lr_scheduler(one) for one in optimizers]
        else:
            lr_scheduler = one_each("lr_scheduler", lr_scheduler, stages)
        super().__init__(
            stages,
            schedule,
            n_microbatches,
            loss_fn,
            optimizers=optimizers,
            lr_schedulers=lr_scheduler,
            chunks=_chunks(schedule, chunks),
            slack=slack,
            policy=policy,
            lookahead=lookahead,
            costs=costs,
            activation_limit=activation_limit,
            buffers=buffers,
            tied_weights=tied_weights,
            transport=LocalTransport() if transport is None else transport,
            trace=trace,
            scale_grads=scale_grads,
            specs=chunk_specs(args_chunk_spec, kwargs_chunk_spec, output_merge_spec),
            safety=Safety(
                on_nonfinite=on_nonfinite,
                max_grad_norm=max_grad_norm,
                skip_spikes=skip_spikes,
                loss_scale=loss_scale,
            ),
        )


def _chunks(schedule: str, chunks: int | None) -> int:
    if chunks is None and isinstance(schedule, str):
        return 2 if get_family(schedule).placement == V else 1
    return 1 if chunks is None else chunks


def _check_modules(modules: Sequence[nn.Module], tied_weights: Sequence[TiedWeight]) -> None:
    check_modules(modules)
    if from_one_pipe(modules):
        check_replicated(modules, tied_weights)


def _stages(
    modules: Sequence[nn.Module],
    device: torch.device | str | Sequence[torch.device | str] | None,
    streams: Sequence[torch.cuda.Stream | None] | None,
    update_streams: Sequence[torch.cuda.Stream | None] | None,
) -> list[PipelineStage]:
    """A stage for each module, on its device and streams."""
    count = len(modules)
    if device is None:
        devices: list[torch.device | str] = [_device_of(module) for module in modules]
    else:
        devices = list(device) if isinstance(device, (list, tuple)) else [device] * count  # type: ignore[list-item]
    for name, given in (("device", devices), ("streams", streams), ("update_streams", update_streams)):
        if given is not None and len(given) != count:
            raise ValueError(f"{len(given)} of {name} for {count} stages: give one per stage")
    stages = []
    for at, (module, where) in enumerate(zip(modules, devices, strict=True)):
        place = usable(as_device(where))
        if streams is not None:
            stream = streams[at]
        else:
            stream = torch.cuda.Stream(place) if place.type == "cuda" else None
        updates = None if update_streams is None else update_streams[at]
        stages.append(PipelineStage(module, at, count, place, stream=stream, update_stream=updates))
    return stages


def _device_of(module: nn.Module) -> torch.device:
    first = next((param for param in module.parameters() if not param.is_meta), None)
    return torch.device("cpu") if first is None else first.device
