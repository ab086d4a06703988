"""Builds what the executor runs: checks what a pipeline was asked for, then binds each stage to its optimizer, weights,
audit, tied weights and clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from paci_rt import schedules
from paci_rt.clock import HostClock
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.replicas import ReplicaSums
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.optim.update_stream import UpdateStream
from paci_rt.runtime.argument_types import check_types
from paci_rt.runtime.audit import RankAudit, StageAudit
from paci_rt.runtime.guard import Guard
from paci_rt.runtime.module_checks import check_parameters, check_wrappers
from paci_rt.runtime.replica_checks import check_replicas, overlap_of
from paci_rt.runtime.replicas import Replicas
from paci_rt.runtime.safety import SKIPPING, Safety, resolve_safety
from paci_rt.runtime.shared_memory import check_memory
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.stage_runtime import StageRuntime
from paci_rt.runtime.tied_weights import TiedExchange
from paci_rt.schedules import ScheduleFamily, Shape, Slack, StepCosts, limits, policies
from paci_rt.schedules.base import check_takes
from paci_rt.schedules.lowering import Lowering, TiedWeight
from paci_rt.weights.base import StageWeights
from paci_rt.weights.lookahead import AheadWeights, can_look_ahead, require_look_ahead
from paci_rt.weights.predict import PredictedWeights
from paci_rt.weights.stash import KeptVersions


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a pipeline runs, checked.

    Attributes:
        lowering: the schedule, its integers and its tied weights.
        policy: which weights forwards and backwards use.
        lookahead: whether early forwards look ahead; ``lookahead_required``: whether it is an error if they cannot.
        divisor: what the summed gradients of a window are divided by.
        buffers: gradient buffers a stage.
        forward_only: no backward, and so no gradients and no updates.
        loss_fn: of the last stage.
        safety: what is done about gradients that are not finite, or large.
        replicas: of the stages of this process; None where it has none.
    """

    lowering: Lowering
    policy: str
    lookahead: bool
    lookahead_required: bool
    divisor: int
    buffers: int
    forward_only: bool
    loss_fn: LossFn | None
    safety: Safety
    replicas: Replicas | None = None
    scale_grads: bool = True


def make_setup(
    stages: Sequence[PipelineStage],
    schedule: str,
    n_microbatches: int,
    loss_fn: LossFn | None,
    *,
    optimizers: Sequence[torch.optim.Optimizer | None],
    chunks: int,
    slack: Slack | Sequence[int],
    policy: str | None,
    lookahead: bool | None,
    costs: StepCosts | None,
    activation_limit: float | None,
    buffers: int | None,
    tied_weights: Sequence[TiedWeight],
    scale_grads: bool,
    safety: Safety | None,
    replicas: Replicas | None = None,
) -> Setup:
    """Check the arguments of a pipeline against each other; they are those of :class:`paci_rt.runtime.engine.Pipeline`.

    Raises:
        ValueError, ScheduleError: an argument that cannot work.
    """
    check_types(
        schedule=schedule,
        loss_fn=loss_fn,
        optimizers=optimizers,
        chunks=chunks,
        policy=policy,
        lookahead=lookahead,
        costs=costs,
        buffers=buffers,
        tied_weights=tied_weights,
        scale_grads=scale_grads,
    )
    family = schedules.get(schedule)
    check_memory(stages, tied_weights)
    limits.check_integer("n_microbatches", n_microbatches, 1, limits.MOST_MICRO_BATCHES)
    check_takes(family, chunks=chunks)
    accumulation = 1 if family.one_micro_batch_windows else n_microbatches
    shape = Shape(
        num_stages=stages[0].num_stages,
        accumulation=accumulation,
        slack=slack,  # type: ignore[arg-type]  # Shape makes a tuple of any list
        chunks=chunks,
        placement=family.placement,
        costs=StepCosts() if costs is None else costs,
        activation_limit=activation_limit,
        overlap=overlap_of(replicas, family, accumulation, policy),
    )
    check_takes(family, slack=shape.slack, activation_limit=activation_limit)
    forward_only = loss_fn is None and all(optimizer is None for optimizer in optimizers)
    if not forward_only:
        if loss_fn is None and stages[-1].is_last:
            raise ValueError(
                "loss_fn is None, and an optimizer was given: the last stage needs loss_fn(output, target) to start "
                "the backward; to run forward only, leave the optimizer out"
            )
        _check_optimizers(family, optimizers, tied_weights)
    policy = policies.resolve(family, shape, policy)
    safety = resolve_safety(safety, optimizers, family, shape, policy, tied_weights)
    settles = safety.settles(family, shape.num_stages)
    check_replicas(replicas, family, shape, policy, buffers, safety, optimizers, tied_weights)
    lowering = Lowering(family=family, shape=shape, ties=tuple(tied_weights), settles=settles)
    _check_ties(tied_weights, policy, family, shape)
    return Setup(
        lowering=lowering,
        policy=policy,
        lookahead=policies.looks_ahead(family, policy, lookahead),
        lookahead_required=bool(lookahead),
        divisor=accumulation * (1 if replicas is None else replicas.count) if scale_grads else 1,
        buffers=(2 if shape.overlap else 1) if buffers is None else buffers,
        forward_only=forward_only,
        loss_fn=loss_fn,
        safety=safety,
        replicas=replicas,
        scale_grads=scale_grads,
    )


def _check_optimizers(
    family: ScheduleFamily, optimizers: Sequence[torch.optim.Optimizer | None], tied_weights: Sequence[TiedWeight]
) -> None:
    if all(optimizer is not None for optimizer in optimizers):
        return
    if not family.flush:
        raise ValueError(
            f"optimizer is None: {family.name} updates each stage on its own while the pipeline is full, so it "
            "owns the optimizer; pass optimizer=paci_rt.AdamW(stage.parameters(), ...) or any torch.optim"
        )
    if tied_weights:
        raise ValueError("tied_weights need optimizer=: their update is part of the schedule")


def _check_ties(tied_weights: Sequence[TiedWeight], policy: str, family: ScheduleFamily, shape: Shape) -> None:
    if tied_weights and policy == "2bw":
        raise ValueError(
            "tied_weights under policy '2bw': the copy that follows has one version, not two; untie the weights, "
            "or use policy 'stash' or 'bounded'"
        )
    if tied_weights and policy == "stash" and shape.places.rank_of(0) == shape.places.last_rank and shape.chunks > 1:
        raise ValueError(
            f"tied_weights under policy 'stash' and {family.name}: the last stage has several micro-batches in flight, "
            "and the copy that follows one version; untie the weights, or use policy 'bounded'"
        )


def ranks_here(stages: Sequence[PipelineStage], shape: Shape) -> list[int]:
    """The ranks that this process runs: one, or all.

    Raises:
        ValueError: it has other stages than those of a rank.
    """
    indices = [stage.stage_index for stage in stages]
    if indices == list(range(shape.num_stages)):
        return list(range(shape.ranks))
    rank = shape.rank_of(indices[0])
    if indices != list(shape.stages_of(rank)):
        raise ValueError(
            f"this process has stages {indices} of {shape.num_stages}: with {shape.chunks} a rank in a "
            f"{shape.placement}, rank {rank} of {shape.ranks} runs {list(shape.stages_of(rank))}"
        )
    place = place_among_processes(stages, shape)
    if place not in (None, rank):
        raise ValueError(
            f"this process is number {place} of its group and has stages {indices} of {shape.num_stages}, which in a "
            f"{shape.placement} are those of rank {rank}: give it stages {list(shape.stages_of(place))}"
        )
    return [rank]


def place_among_processes(stages: Sequence[PipelineStage], shape: Shape) -> int | None:
    """This process's number in the group of its pipeline; None where there is no such group."""
    sized = dist.is_available() and dist.is_initialized() and stages[0].group_size == shape.ranks
    return stages[0].group_rank if sized else None


def bind(
    setup: Setup,
    stage: PipelineStage,
    rank: RankAudit,
    optimizer: torch.optim.Optimizer | None,
    clock: HostClock,
    *,
    may_wait: bool = True,
    left: Collection[nn.Parameter] = (),
) -> StageRuntime:
    """Bind a stage to everything that it needs to run; what fails leaves it as it was.

    Args:
        may_wait: without an optimizer, parameters on the meta device are left for later.
        left: parameters that the optimizer may list although they left the stage.

    Raises:
        ValueError: the optimizer does not fit the stage, or cannot do what the schedule asks of it.
        StageError: a parameter that cannot be trained.
    """
    if setup.forward_only:
        return _bind_forward_only(setup, stage, rank, clock)
    check_wrappers(stage.submod, stage.stage_index)
    check_parameters(stage.submod, stage.stage_index, stage.device, may_wait=may_wait and optimizer is None)
    named = {name: param for name, param in stage.named_parameters() if not param.is_meta}
    ties = TiedExchange(setup.lowering.ties, stage.stage_index, named) if setup.lowering.ties else None
    followers = set() if ties is None else ties.read_params  # the owner's stage updates these
    named = {name: param for name, param in named.items() if param not in followers}
    family, shape, policy = setup.lowering.family, setup.lowering.shape, setup.policy
    ignored = {*followers, *left}
    among = setup.replicas.group if setup.replicas is not None and setup.replicas.shard_optimizer else None
    asynchronous = not family.flush
    bound = bind_optimizer(
        optimizer, named, buffers=setup.buffers, asynchronous=asynchronous, ignored=ignored, shard_among=among
    )
    try:
        weights = _connect(setup, stage, rank, bound, ties, clock)
    except BaseException:
        bound.unbind()
        raise
    drift_bound, delay_bound = policies.bounds(policy, family, shape, rank.rank)
    recompute = policies.recomputes(policy, family, shape, rank.rank)
    loss_fn = setup.loss_fn if stage.is_last else None
    stage.reruns.watch(loss_fn, recompute=recompute, drifts=drift_bound > 0)
    audit = StageAudit(stage=stage.stage_index, rank=rank, drift_bound=drift_bound, delay_bound=delay_bound)
    return StageRuntime(
        stage=stage,
        audit=audit,
        optimizer=bound,
        weights=weights,
        accumulation=shape.accumulation,
        divisor=setup.divisor,
        recompute=recompute,
        ties=ties,
        guard=_guard(setup, stage, bound, weights, ties, audit),
        clock=clock,
    )


def _connect(
    setup: Setup,
    stage: PipelineStage,
    rank: RankAudit,
    bound: StageOptimizer,
    ties: TiedExchange | None,
    clock: HostClock,
) -> StageWeights:
    """Connect a bound optimizer with replicas, streams, tied weights and its stage; returns the stage's weights."""
    if setup.replicas is not None:
        sharded = setup.replicas.shard_optimizer
        bound.replicas = ReplicaSums(bound, setup.replicas.group, stage=stage.stage_index, sharded=sharded)
    bound.compute_products_by(stage.wgrad)
    if stage.update_stream is not None and isinstance(bound.order, UpdateStream):
        bound.order.move_to(stage.update_stream)
    weights = make_weights(setup, bound, rank.rank, clock, stage.stage_index)
    if setup.lookahead_required:
        require_look_ahead(bound)
    if ties is not None:
        ties.bind(bound)
    stage.attach(ties if ties is not None else bound)
    return weights


def _guard(
    setup: Setup,
    stage: PipelineStage,
    bound: StageOptimizer,
    weights: StageWeights,
    ties: TiedExchange | None,
    audit: StageAudit,
) -> Guard | None:
    """What looks at a stage's gradients before its weights take them; None where the caller takes the steps."""
    if bound.optimizer is None:
        return None
    return Guard(
        setup.safety,
        setup.lowering,
        stage,
        optimizer=bound,
        weights=weights,
        ties=ties,
        audit=audit,
        divisor=setup.divisor,
    )


def _bind_forward_only(setup: Setup, stage: PipelineStage, rank: RankAudit, clock: HostClock) -> StageRuntime:
    """A stage that another schedule may train: nothing is taken from it."""
    return StageRuntime(
        stage=stage,
        audit=StageAudit(stage=stage.stage_index, rank=rank, drift_bound=0, delay_bound=0),
        optimizer=bind_optimizer(None, {}, asynchronous=False),
        weights=StageWeights(),
        accumulation=setup.lowering.shape.accumulation,
        divisor=setup.divisor,
        clock=clock,
        owns_stage=False,
    )


def unbind(runtimes: Iterable[StageRuntime]) -> None:
    """Give stages and optimizers back to the user."""
    for runtime in runtimes:
        if runtime.owns_stage:
            runtime.stage.detach()
            runtime.stage.forget()
        runtime.optimizer.unbind()


def make_weights(
    setup: Setup, bound: StageOptimizer, rank: int, clock: HostClock, stage: int | None = None
) -> StageWeights:
    """The weights of a stage of ``rank`` under the policy of ``setup``.

    Raises:
        ValueError: ``predict`` with an optimizer that has no momentum to go by.
    """
    family, shape, policy = setup.lowering.family, setup.lowering.shape, setup.policy
    if policy in ("stash", "2bw"):
        return KeptVersions(policy, bound.groups, policies.versions_held(policy, family, shape, rank))
    if not policies.bounds(policy, family, shape, rank)[1]:  # no forward comes before an update of its micro-batch's
        return StageWeights()
    if policy == "predict":
        return PredictedWeights(bound)
    if not setup.lookahead or not can_look_ahead(bound):
        return StageWeights()
    return AheadWeights(
        bound,
        accumulation=shape.accumulation,
        divisor=setup.divisor,
        early=policies.early_forwards(family, shape, rank, stage),
        replicas=1 if setup.replicas is None else setup.replicas.count,
        overlap=shape.overlap,
        careful=setup.safety.on_nonfinite in SKIPPING,
        clock=clock,
    )
