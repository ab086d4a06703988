"""Training and the writing of a checkpoint beside each other: how one waits for the other, or stops it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch.distributed as dist

from paci_rt.errors import CheckpointError
from paci_rt.runtime.pipeline_state import PipelineState
from paci_rt.runtime.together import alone
from paci_rt.transport import collective
from paci_rt.transport.patience import BesidePatience

_WHAT = "have not written their part of a checkpoint"


def settle(schedule: PipelineState) -> float:
    """Wait for the checkpoint that is being written, if there is one; seconds that it took.

    Raises:
        CheckpointError: it failed, and nobody was told yet.
    """
    saving, begin = schedule.saving, time.perf_counter()
    if saving is None:
        return 0.0
    schedule.saving = None
    try:
        saving.settle()
    finally:
        waited_s = time.perf_counter() - begin
        schedule.saving_wait_s += waited_s
    return waited_s


def leave(schedule: PipelineState, *, failed: bool) -> None:
    """Settle, or stop the writing where a pipeline of several processes has ``failed``: the others may be gone."""
    saving = schedule.saving
    several = schedule.replicas is not None and schedule.replicas.count > 1
    if failed and saving is not None and (several or not alone(schedule)):
        schedule.saving = None
        saving.give_up()
    else:
        settle(schedule)


@contextmanager
def all_written(schedule: PipelineState) -> Iterator[None]:
    """Go on behind the block when nothing is written any more.

    Raises:
        CheckpointError: what was written at the end of the block failed.
    """
    try:
        yield
    except BaseException:
        with suppress(CheckpointError):
            leave(schedule, failed=True)
        raise
    leave(schedule, failed=False)


def gather_beside(
    value: Any, schedule: PipelineState, group: dist.ProcessGroup | None, given_up: threading.Event
) -> list[Any]:
    """``value`` of every process of the pipeline, in the order of the stages, without a word on this one's board."""
    if alone(schedule):
        return [value]
    return _beside(value, group, schedule.transfer_timeout_s, "saving", given_up)


def among_beside(replicas: Any, value: Any, given_up: threading.Event) -> list[Any]:
    """``value`` of every replica, in the same way."""
    return _beside(value, replicas.group.group, replicas.group.timeout_s, "saving of replicas", given_up)


def _beside(
    value: Any, group: dist.ProcessGroup | None, timeout_s: float, kind: str, given_up: threading.Event
) -> list[Any]:
    patience = partial(BesidePatience, given_up=given_up)
    return collective.gather(value, group, timeout_s, kind=kind, what=_WHAT, patience=patience)
