"""Where a process of a training run stands among pipelines that train together, and what it reads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

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
        """The context for the log: the first replica tells everything, the others their losses alone."""
        return ctx if self.first else LossOnly(ctx)

    def own_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This replica's part of the global batch, in the order of the replicas."""
        return tuple(tensor.tensor_split(self.replicas)[self.replica] for tensor in tensors)


class LossOnly:
    """Of a replica that is not the first: its part of a window's loss is reported, for :class:`Together`."""

    rank = -1

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def report(self, obj: dict[str, Any]) -> None:
        if obj["kind"] == "step":
            self._ctx.report({"kind": "share", "step": obj["step"], "loss": obj["loss"]})


class Together:
    """Passes the reports of a run on, in order; the loss of a step becomes the mean of all replicas.

    A step waits for the shares of all, and so does what its process said after it. What is still incomplete when a run
    fails is dropped: the next start trains it again.
    """

    def __init__(self, replicas: int, on_report: Callable[[dict[str, Any]], None]) -> None:
        self._others, self._on_report = replicas - 1, on_report
        self._waiting: deque[dict[str, Any]] = deque()
        self._shares: dict[int, list[float]] = {}

    def __call__(self, report: dict[str, Any]) -> None:
        kind = report["kind"]
        if kind == "restart":
            self._waiting.clear()
            self._shares.clear()
        if kind == "share":
            self._shares.setdefault(report["step"], []).append(report["loss"])
        elif self._others and kind in ("step", "eval"):
            self._waiting.append(report)
        else:
            self._on_report(report)
        while self._waiting and self._complete(self._waiting[0]):
            self._on_report(self._whole(self._waiting.popleft()))

    def _complete(self, report: dict[str, Any]) -> bool:
        return report["kind"] == "eval" or len(self._shares.get(report["step"], [])) == self._others

    def _whole(self, report: dict[str, Any]) -> dict[str, Any]:
        if report["kind"] == "eval":
            return report
        return report | {"loss": mean_loss([report["loss"], *self._shares.pop(report["step"])])}


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
    return replace(points[0], loss=mean_loss([one.loss for one in points]))


def mean_loss(losses: Sequence[float]) -> float:
    """Of equal parts; the same bits in any order of them."""
    return (math.fsum(losses) if all(map(math.isfinite, losses)) else sum(losses)) / len(losses)
