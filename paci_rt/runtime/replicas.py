"""Replicas of a pipeline: what a schedule was given, checked, and what all of them must have in common.

Every stage has as many replicas as there are pipelines. They train on other micro-batches of one global batch and make
one update of the sum. So R replicas with windows of ``a`` micro-batches are one pipeline with windows of ``R * a``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from paci_rt.errors import DisagreementError
from paci_rt.optim.shards import WeightGathers
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.stage import PipelineStage
from paci_rt.runtime.state_dict import params_sha256
from paci_rt.transport import collective
from paci_rt.wording import shown

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from paci_rt.transport.replicas import ReplicaGroup

PIPELINE = "pp"
"""What the dimension of the pipeline is called in a mesh, as in torchtitan; the other one may have any name."""


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """The replicas of a process's stages.

    Attributes:
        group: all of them.
        shard_optimizer: each keeps the optimizer's state of its own part alone (ZeRO-1).
        overlap: micro-batches of the next window that run while sums travel; None is half a window where it can be.
    """

    group: ReplicaGroup
    shard_optimizer: bool = False
    overlap: int | None = None

    @property
    def count(self) -> int:
        return self.group.size


def find_replicas(
    stages: Sequence[PipelineStage],
    *,
    mesh: DeviceMesh | None,
    replica_group: dist.ProcessGroup | None,
    shard_optimizer: bool,
    overlap: int | None,
    timeout_s: float,
) -> Replicas | None:
    """What a schedule's arguments about replicas mean; None where it has none. Sets the stages' group by the mesh.

    Raises:
        ValueError: they cannot work; the message names the reason.
    """
    if mesh is None and replica_group is None:
        for name, value, empty in (("shard_optimizer", shard_optimizer, False), ("overlap", overlap, None)):
            if value != empty:
                raise ValueError(f"{name} is {shown(value)} and there are no replicas: give mesh= or replica_group=")
        return None
    if type(shard_optimizer) is not bool:
        raise ValueError(f"shard_optimizer is {shown(shard_optimizer)}: give True or False")
    if mesh is not None:
        if replica_group is not None:
            raise ValueError(
                "mesh and replica_group were given: the mesh has the replicas already, so give one of them"
            )
        replica_group = _by_mesh(mesh, stages)
        if replica_group is None:
            return find_replicas(
                stages,
                mesh=None,
                replica_group=None,
                shard_optimizer=shard_optimizer,
                overlap=overlap,
                timeout_s=timeout_s,
            )
    if not isinstance(replica_group, dist.ProcessGroup) or dist.get_rank(replica_group) < 0:
        raise ValueError(
            f"replica_group is {shown(replica_group)}: give the process group of those that hold the same stages, in "
            "which this process is"
        )
    devices = sorted({stage.device.type for stage in stages})
    if devices != ["cpu"]:
        raise ValueError(
            f"mesh or replica_group was given and the stages are on {', '.join(devices)}: replicas run on the CPU; use "
            "one pipeline on GPUs"
        )
    from paci_rt.transport.replicas import ReplicaGroup

    group = ReplicaGroup(replica_group, timeout_s)
    return Replicas(group=group, shard_optimizer=shard_optimizer, overlap=overlap)


def _by_mesh(mesh: Any, stages: Sequence[PipelineStage]) -> dist.ProcessGroup | None:
    """The group of replicas in a mesh; None where the pipeline is all that there is."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh is {shown(mesh)}: give a torch.distributed.device_mesh.DeviceMesh")
    names = mesh.mesh_dim_names or ()
    said = ", ".join(f"{name} of {size}" for name, size in zip(names, mesh.shape, strict=False)) or "no names"
    if PIPELINE not in names or len(names) > 2:
        raise ValueError(
            f"the mesh has dimensions {said}: give one with a dimension {PIPELINE!r} for the stages and at most one "
            'more for replicas, as init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "pp"))'
        )
    chunks, num_stages = len(stages), stages[0].num_stages
    group = mesh.get_group(PIPELINE)
    if dist.get_world_size(group) * chunks != num_stages:
        raise ValueError(
            f"the mesh has {said}, and the pipeline {num_stages} stages, {chunks} a process: give it "
            f"{num_stages // chunks} processes in dimension {PIPELINE!r}"
        )
    if stages[0].stage_index != dist.get_rank(group):
        raise ValueError(
            f"this process is number {dist.get_rank(group)} in dimension {PIPELINE!r} of the mesh and has stage "
            f"{stages[0].stage_index}: give it the stage of its place, mesh.get_local_rank({PIPELINE!r})"
        )
    for stage in stages:
        if stage.group is not None and _members(stage.group) != _members(group):
            raise ValueError(
                f"PipelineStage(group=...) has ranks {_members(stage.group)} and the mesh's {PIPELINE!r} "
                f"{_members(group)}: leave group out, the mesh says it"
            )
        stage.group = group
    return next((mesh.get_group(name) for name in names if name != PIPELINE), None)


def _members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def facts_of_replicas(replicas: Replicas | None, overlap: int) -> dict[str, Any]:
    """What the processes of a pipeline must have been given alike."""
    if replicas is None:
        return {"replicas": 1, "shard_optimizer": False, "overlap": 0}
    return {"replicas": replicas.count, "shard_optimizer": replicas.shard_optimizer, "overlap": overlap}


def groups_given(options: Mapping[str, Any]) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups of the pipeline and of the replicas in a schedule's arguments, where they are right as far as that."""
    mesh, replicas = options.get("mesh"), options.get("replica_group")
    if not dist.is_available() or not dist.is_initialized():
        return None, None
    if mesh is None:
        fine = isinstance(replicas, dist.ProcessGroup) and dist.get_rank(replicas) >= 0
        return None, replicas if fine else None
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if PIPELINE not in names or len(names) > 2 or replicas is not None:
        return None, None
    return mesh.get_group(PIPELINE), next((mesh.get_group(name) for name in names if name != PIPELINE), None)


def facts_of_stages(stages: Sequence[PipelineStage]) -> dict[str, Any]:
    """What replicas must have in common besides: the same stages, with the same weights at the start."""
    found: dict[str, Any] = {"the stages of a process": [stage.stage_index for stage in stages]}
    for stage in stages:
        at = stage.stage_index
        named = [*stage.named_parameters(), *stage.submod.named_buffers()]
        trained = {name: [list(one.shape), str(one.dtype), one.requires_grad] for name, one in stage.named_parameters()}
        found[f"the parameters of stage {at}"] = digest_text(trained)
        if not any(tensor.is_meta for _, tensor in named):
            found[f"the weights of stage {at}"] = params_sha256(sorted(named, key=lambda pair: pair[0]))[:16]
    return found


def digest_text(value: Any) -> str:
    """A short hash of a JSON-ready value, and how many entries it has."""
    return f"{hashlib.sha256(repr(value).encode()).hexdigest()[:12]} ({len(value)} of them)"


def require_same_weights(replicas: Replicas, stages: Sequence[PipelineStage]) -> None:
    """Make sure that all replicas have the same bits; all of them call this, with nothing in flight.

    Raises:
        DisagreementError: they have not. MeetingError: one did not come in time.
    """
    own = {
        f"stage {stage.stage_index}": params_sha256(sorted(stage.named_parameters(), key=lambda pair: pair[0]))[:16]
        for stage in stages
    }
    told = among(replicas, own, "have not come to compare their weights")
    wrong = [at for at in own if len({theirs[at] for theirs in told}) > 1]
    if wrong:
        said = ", ".join(
            f"{theirs[wrong[0]]} on rank {at}" for at, theirs in zip(replicas.group.ranks, told, strict=True)
        )
        raise DisagreementError(
            f"the weights of {wrong[0]} differ between replicas ({said}): change weights on all of them alike, and "
            "start all with the same number of threads, on hosts of one kind"
        )


def among(replicas: Replicas, value: Any, what: str) -> list[Any]:
    """``value`` of every replica, in their order."""
    group = replicas.group
    if group.size == 1:
        return [value]
    return collective.gather(value, group.group, group.timeout_s, kind="replicas", what=what)


def merged_reduce_stats(bounds: Sequence[StageOptimizer]) -> Mapping[str, float]:
    """Seconds that sums of replicas took, and seconds of them that stages waited for."""
    sums = [bound.replicas for bound in bounds if bound.replicas is not None]
    return {
        "reduce_s": sum(one.reduce_s for one in sums),
        "exposed_reduce_s": sum(one.waited_s for one in sums),
        "exposed_gather_s": sum(one.order.waited_s for one in bounds if isinstance(one.order, WeightGathers)),
    }


def reset_reduce_stats(bound: StageOptimizer) -> None:
    """Count seconds anew."""
    if bound.replicas is not None:
        bound.replicas.reduce_s = bound.replicas.waited_s = 0.0
    if isinstance(bound.order, WeightGathers):
        bound.order.waited_s = 0.0
