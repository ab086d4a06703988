"""Checkpoints of pipelines with replicas: one writes, all load, and what fails on one fails on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.distributed as dist

from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.replicas import Replicas, among
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


def generators_of_all(replicas: Replicas, own: dict[str, Any]) -> dict[str, Any]:
    """The random generators of this process, and beside them those of the same stages in the other replicas."""
    return {**own, "replicas": among(replicas, own, _WHAT)}


def own_generators(saved: dict[str, Any], schedule: Pipeline) -> dict[str, Any] | None:
    """What this process takes of the generators that were saved; None where it keeps its own.

    As many replicas as wrote the checkpoint all go on where they were. Of another number the first one does.
    """
    replicas = several(schedule)
    every = saved.get("replicas", [saved])
    if replicas is not None and len(every) == replicas.count:
        return dict(every[replicas.group.rank])
    return saved if is_first_replica(schedule) else None


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
