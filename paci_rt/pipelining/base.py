"""What the schedule classes share: torch's constructors and base classes, and the attributes that trainers read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from paci_rt.runtime.agreement import among_processes
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.loss_scale import LossScaler
from paci_rt.runtime.replicas import find_replicas
from paci_rt.runtime.safety import Safety
from paci_rt.runtime.split_merge import NO_SPECS, ChunkSpecs
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.tied_weights import declared_ties
from paci_rt.runtime.torch_stages import adopt
from paci_rt.schedules import Slack, StepCosts
from paci_rt.schedules import get as get_family
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.transport import DEFAULT_TIMEOUT_S, Transport, make_transport


class _PipelineSchedule(Pipeline):
    """A pipeline whose other stages live in other processes; see :class:`PipelineScheduleSingle`."""

    name: ClassVar[str]

    @among_processes
    def __init__(
        self,
        stages: list[PipelineStage],
        n_microbatches: int,
        loss_fn: LossFn | None,
        specs: ChunkSpecs,
        scale_grads: bool,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        lr_scheduler: Any = None,
        slack: Slack | Sequence[int] = 0,
        policy: str | None = None,
        lookahead: bool | None = None,
        costs: StepCosts | None = None,
        activation_limit: float | None = None,
        buffers: int | None = None,
        tied_weights: Sequence[TiedWeight] = (),
        transport: Transport | str | None = "auto",
        transfer_timeout_s: float = DEFAULT_TIMEOUT_S,
        trace: bool = False,
        on_nonfinite: str | None = None,
        max_grad_norm: float | None = None,
        skip_spikes: float | None = None,
        loss_scale: LossScaler | None = None,
        mesh: Any = None,
        replica_group: Any = None,
        shard_optimizer: bool = False,
        overlap: int | None = None,
    ) -> None:
        if not hasattr(type(self), "name"):
            raise TypeError(f"{type(self).__name__} is a base class: take a schedule of get_schedule_class(name)")
        register_with_torch()
        tied_weights = declared_ties([stage.submod for stage in stages], tied_weights)
        if not stages:
            raise ValueError("stages is empty: give the stages of this rank")
        order = sorted(range(len(stages)), key=lambda at: stages[at].stage_index)
        optimizers = one_each("optimizer", optimizer, stages) or [None] * len(stages)
        lr_schedulers = one_each("lr_scheduler", lr_scheduler, stages)
        stages = [stages[at] for at in order]
        replicas = find_replicas(
            stages,
            mesh=mesh,
            replica_group=replica_group,
            shard_optimizer=shard_optimizer,
            overlap=overlap,
            timeout_s=transfer_timeout_s,
        )
        super().__init__(
            stages,
            self.name,
            n_microbatches,
            loss_fn,
            optimizers=[optimizers[at] for at in order],
            lr_schedulers=None if lr_schedulers is None else [lr_schedulers[at] for at in order],
            chunks=len(stages),
            slack=slack,
            policy=policy,
            lookahead=lookahead,
            costs=costs,
            activation_limit=activation_limit,
            buffers=buffers,
            tied_weights=tied_weights,
            transport=_find_transport(transport, stages, self.name, transfer_timeout_s),
            trace=trace,
            scale_grads=scale_grads,
            specs=specs,
            safety=Safety(
                on_nonfinite=on_nonfinite,
                max_grad_norm=max_grad_norm,
                skip_spikes=skip_spikes,
                loss_scale=loss_scale,
            ),
            replicas=replicas,
        )

    # Torch's trainers read these.

    @property
    def _num_stages(self) -> int:
        return self.stages[0].num_stages

    @property
    def pp_group_size(self) -> int:
        """Processes of the pipeline."""
        return self._lowering.shape.ranks

    @property
    def rank(self) -> int:
        """The place of this process among them; the first of several in one process."""
        return self.ranks[0]


class PipelineScheduleSingle(_PipelineSchedule):
    """Base class of the schedules with one stage per rank, with torch's constructor.

    Args:
        stage: this process's :class:`~paci_rt.PipelineStage`, or torch's, by hand or by ``Pipe.build_stage``.
        n_microbatches, loss_fn, scale_grads: as torch's. ``loss_fn=None`` without an optimizer runs forward only.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec: torch's: how ``step`` cuts its arguments and puts outputs
            together, in classes of ``torch.distributed.pipelining.microbatch``. None is along dimension 0.
        options: by keyword. ``optimizer`` steps with the schedule; None leaves gradients in ``.grad`` (flush schedules
            only). ``lr_scheduler`` is stepped after each local update. ``transport`` says how stages reach each other:
            a name of :data:`paci_rt.transport.TRANSPORTS`, see :func:`paci_rt.transport.make_transport`, or a
            ready-made transport. ``transfer_timeout_s`` is the deadline of every single wait for another stage, in
            seconds; for a transport by name. ``on_nonfinite``, ``max_grad_norm``, ``skip_spikes`` and ``loss_scale``
            say what to do about gradients that are not finite, or large: :class:`~paci_rt.runtime.safety.Safety`.
            ``mesh`` or ``replica_group`` say which processes hold the same stages, for data parallelism, and
            ``shard_optimizer`` and ``overlap`` how they share the work: :mod:`paci_rt.runtime.replicas`. The others are
            those of :class:`~paci_rt.runtime.engine.Pipeline`.

    Raises:
        DisagreementError: processes were asked for different things; see :mod:`paci_rt.runtime.agreement`.

    Example:
        >>> issubclass(paci_rt.SchedulePACI, paci_rt.PipelineScheduleSingle)
        True
    """

    def __init__(
        self,
        stage: PipelineStage,
        n_microbatches: int,
        loss_fn: LossFn | None = None,
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        scale_grads: bool = True,
        **options: Any,
    ) -> None:
        stages = _adopted(stage, options)
        specs = chunk_specs(args_chunk_spec, kwargs_chunk_spec, output_merge_spec)
        super().__init__(stages, n_microbatches, loss_fn, specs, scale_grads, **options)

    @property
    def _stage(self) -> PipelineStage:
        return self.stages[0]


class PipelineScheduleMulti(_PipelineSchedule):
    """Base class of the schedules with several stages per rank, with torch's constructor.

    Args:
        stages: this process's stages, in any order: which they are says the schedule's placement
            (:class:`paci_rt.schedules.Placement`).
        backward_requires_autograd, defer_pp_recv: accepted because torch has them. Backwards always run through
            autograd, and a receive is waited for only where its tensors are used.

    The other arguments are those of :class:`PipelineScheduleSingle`; ``optimizer`` and ``lr_scheduler`` are lists, one
    for each stage, in the order of ``stages``.

    Example:
        >>> paci_rt.get_schedule_class("Interleaved1F1B").__mro__[1].__name__
        'PipelineScheduleMulti'
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        n_microbatches: int,
        loss_fn: LossFn | None = None,
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        defer_pp_recv: bool = False,
        **options: Any,
    ) -> None:
        specs = chunk_specs(args_chunk_spec, kwargs_chunk_spec, output_merge_spec)
        super().__init__(_adopted(stages, options), n_microbatches, loss_fn, specs, scale_grads, **options)

    @property
    def _stages(self) -> list[PipelineStage]:
        return self.stages


def _adopted(given: Any, options: dict[str, Any]) -> list[PipelineStage]:
    """The stages that a constructor was given, one or several, torch's among them made ours."""
    return [adopt(one, options.get("tied_weights", ())) for one in (given if isinstance(given, Sequence) else [given])]


def register_with_torch() -> None:
    """Make ``isinstance`` and ``issubclass`` with torch's base classes hold, where somebody has imported those."""
    torchs = sys.modules.get("torch.distributed.pipelining.schedules")
    if torchs is not None and hasattr(torchs, "get_schedule_class"):  # it has been imported to its end
        torchs.PipelineScheduleSingle.register(PipelineScheduleSingle)
        torchs.PipelineScheduleMulti.register(PipelineScheduleMulti)
        torchs.PipelineStage.register(PipelineStage)


def chunk_specs(args: Any, kwargs: Any, outputs: Any) -> ChunkSpecs:
    """Torch's three arguments in one."""
    if args is None and kwargs is None and outputs is None:
        return NO_SPECS
    return ChunkSpecs(args=args, kwargs=kwargs, outputs=outputs)


def one_each(name: str, given: Any, stages: Sequence[PipelineStage]) -> list[Any] | None:
    """What was given for every stage; None where nothing was."""
    if given is None:
        return None
    listed = list(given) if isinstance(given, Sequence) else [given]
    if len(listed) != len(stages):
        raise ValueError(f"{len(listed)} {name}s for {len(stages)} stages: give one per stage")
    return listed


def _find_transport(
    transport: Transport | str | None, stages: Sequence[PipelineStage], schedule: str, timeout_s: float
) -> Transport:
    if transport is not None and not isinstance(transport, str):
        return transport
    return make_transport(
        transport or "auto",
        group=stages[0].group,
        num_stages=stages[0].num_stages,
        chunks=len(stages),
        placement=get_family(schedule).placement,
        timeout_s=timeout_s,
        device=stages[0].device,
    )
