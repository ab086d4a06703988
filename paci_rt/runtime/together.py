"""What the processes of a pipeline tell each other beside its messages, and errors that all of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from paci_rt.errors import CheckpointError, CheckpointWriteError
from paci_rt.runtime.pipeline_state import PipelineState
from paci_rt.transport import collective


def alone(schedule: PipelineState) -> bool:
    """Whether this process has all stages."""
    return len(schedule.stages) == schedule.stages[0].num_stages


def gather(value: Any, schedule: PipelineState, group: dist.ProcessGroup | None) -> list[Any]:
    """``value`` of every process of the pipeline, in the order of the stages."""
    if alone(schedule):
        return [value]
    what = "have not come to this point of saving or loading a checkpoint"
    return collective.gather(value, group, schedule.transfer_timeout_s, kind="checkpoint", what=what)


@contextmanager
def together(schedule: PipelineState, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What fails in here on one process ends in an error on all of them.

    Raises:
        CheckpointError: it failed with that on another one. ValueError: with something else.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failures = gather(failure_of(own), schedule, group)
    if own is not None:
        raise own
    raise_any(failures)


Failure = tuple[str, str]
"""Name of an error's type, and its text; empty where all went well."""
FINE: Failure = ("", "")


def failure_of(error: Exception | None) -> Failure:
    """What the other processes need to know of an error."""
    if error is None:
        return FINE
    return type(error).__name__, str(error) or type(error).__name__


def raise_any(failures: Sequence[Failure]) -> None:
    """Raise what any process told: as the type that it was, or as ValueError."""
    failed = list(dict.fromkeys(failure for failure in failures if failure != FINE))
    if not failed:
        return
    kinds: dict[str, type[Exception]] = {
        "CheckpointError": CheckpointError,
        "CheckpointWriteError": CheckpointWriteError,
        "OSError": OSError,
    }
    raise kinds.get(failed[0][0], ValueError)("; ".join(dict.fromkeys(text for _, text in failed)))
