"""Where a process of a training run stands among pipelines that train together, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt import status
from paci_rt.train.config import TrainConfig
from paci_rt.train.results import StageResult, StepPoint
from paci_rt.transport.collective import barrier, lost


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process of ``replicas`` pipelines: rank ``r`` of the run has stage ``r % stages`` of replica ``r // stages``.

    Attributes:
        replica: of how many ``replicas``. stage: the process's place in its pipeline.
        zero1, overlap: as in the options.
        pipeline, others: groups of its pipeline, and of the processes that hold the same stages; None where it needs
            none.
    """

    replica: int = 0
    replicas: int = 1
    stage: int = 0
    zero1: bool = False
    overlap: int | None = None
    pipeline: Any = None
    others: Any = None

    @property
    def first(self) -> bool:
        """Whether this replica validates, reports and saves."""
        return self.replica == 0

    @property
    def options(self) -> dict[str, Any]:
        """What a schedule is told."""
        if self.replicas == 1:
            return {}
        return {"replica_group": self.others, "shard_optimizer": self.zero1, "overlap": self.overlap}

    def reports(self, ctx: Any) -> Any:
        """The context for the log: of the first replica alone."""
        return ctx if self.first else Silent()

    def own_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This replica's part of the global batch, in the order of the replicas."""
        return tuple(tensor.tensor_split(self.replicas)[self.replica] for tensor in tensors)


class Silent:
    """Reports to nobody: the first replica does."""

    rank = -1

    def report(self, obj: dict[str, Any]) -> None:
        pass


def find_place(config: TrainConfig, rank: int, *, local: bool) -> Place:
    """The place of a process of the run; every process calls this, since all of them make the groups.

    Raises:
        MeetingError: some processes did not come in time.
    """
    if local or config.replicas == 1:
        return Place(stage=rank)
    ranks, timeout_s = config.stages, config.transfer_timeout
    replica, stage = divmod(rank, ranks)
    status.board().take_place(replica, stage, ranks)
    barrier(None, timeout_s, kind="replicas", what="have not come to make groups")
    lines = [list(range(at * ranks, (at + 1) * ranks)) for at in range(config.replicas)]
    lines += [list(range(at, ranks * config.replicas, ranks)) for at in range(ranks)]
    try:
        timeout = timedelta(seconds=timeout_s)
        groups = [dist.new_group(line, backend="gloo", timeout=timeout) for line in lines]
    except RuntimeError as error:
        others = [other for other in range(dist.get_world_size()) if other != rank]
        raise lost(error, "making groups", others) from error
    return Place(
        replica=replica,
        replicas=config.replicas,
        stage=stage,
        zero1=config.zero1,
        overlap=config.overlap,
        pipeline=groups[replica],
        others=groups[config.replicas + stage],
    )


def of_first_replica(config: TrainConfig, results: list[StageResult]) -> list[StageResult]:
    """Results of the first replica's processes, with the losses of all and the seconds of the slowest."""
    if config.replicas == 1:
        return results
    pipelines = [results[at : at + config.stages] for at in range(0, len(results), config.stages)]
    mine = [replace(one[0], wall_s=max(other.wall_s for other in one)) for one in zip(*pipelines, strict=True)]
    last = config.places.last_rank
    curves = [one[last].steps for one in pipelines]
    steps = tuple(_mean(points) for points in zip(*curves, strict=True))
    return [*mine[:last], replace(mine[last], steps=steps), *mine[last + 1 :]]


def _mean(points: tuple[StepPoint, ...]) -> StepPoint:
    return replace(points[0], loss=float(torch.tensor([one.loss for one in points], dtype=torch.float64).mean()))
