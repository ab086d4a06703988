"""Checkpoints of pipelines with replicas: one writes, all load, and what fails on one fails on all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.distributed as dist

from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.replicas import Replicas, among, require_same_weights
from paci_rt.runtime.together import failure_of, raise_any

_WHAT = "have not come to this point of saving or loading a checkpoint"


def several(schedule: Pipeline) -> Replicas | None:
    """The replicas of a schedule; None where there is one only."""
    replicas = schedule.replicas
    return None if replicas is None or replicas.count == 1 else replicas


def is_first_replica(schedule: Pipeline) -> bool:
    """Whether checkpoints have the random generators of this replica."""
    replicas = several(schedule)
    return replicas is None or replicas.group.rank == 0


def group_of(schedule: Pipeline, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group in which the processes of one pipeline talk about a checkpoint."""
    return schedule.stages[0].group if group is None and several(schedule) is not None else group


def save_once(
    replicas: Replicas, schedule: Pipeline, extra: Mapping[str, Any] | None, save: Callable[[], None]
) -> None:
    """Let the first replica ``save``; all return when it has, or raise."""
    json.dumps(dict(extra or {}))
    schedule.drain()
    require_same_weights(replicas, schedule.stages)
    with on_all(replicas):
        if replicas.group.rank == 0:
            save()
        elif replicas.shard_optimizer:
            schedule.state_dict()  # the first one gathers it


@contextmanager
def on_all(replicas: Replicas | None) -> Iterator[None]:
    """What fails in here on one replica ends in an error on all of them."""
    if replicas is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failures = among(replicas, failure_of(own), _WHAT)
    if own is not None:
        raise own
    raise_any(failures)


@contextmanager
def held_once(replicas: Replicas, hold: AbstractContextManager[None]) -> Iterator[None]:
    """Let the first replica ``hold`` a folder; the others wait until it does."""
    with ExitStack() as held:
        with on_all(replicas):
            if replicas.group.rank == 0:
                held.enter_context(hold)
        yield
