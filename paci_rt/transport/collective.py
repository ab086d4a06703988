"""Exchanges among all processes of a group that are not messages of the pipeline: barriers, and small values.

They go through the store, not through collectives of the group: those have one deadline for everything, blame whoever
waits, and cannot tell a slow disk from a stopped process.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from paci_rt.errors import MeetingError
from paci_rt.transport.patience import Patience, describe
from paci_rt.transport.rendezvous import Meeting

_TOPIC = "value"
_before: dict[tuple[str, str], Meeting] = {}


def gather(
    value: Any,
    group: dist.ProcessGroup | None,
    timeout_s: float,
    *,
    kind: str,
    what: str,
    patience: Callable[..., Patience] = Patience,
) -> list[Any]:
    """``value`` of every process of ``group``, by rank; all of them call this, in the same order for one ``kind``.

    Args:
        value: anything that can be pickled and is not large; it travels through the store.
        group: None is the default group.
        timeout_s: deadline, counted from the last sign of life of whoever is missing.
        kind: exchanges of different kinds are counted apart.
        what: what a process that is missing has not done, for the error: ``have not saved their part``.
        patience: what ends a wait.

    Raises:
        MeetingError: some processes did not come in time.
        TransportError: the store is gone.
    """
    meeting = Meeting(group, timeout_s, kind, what, patience)
    meeting.put(_TOPIC, pickle.dumps(value))
    told = meeting.collect(_TOPIC)
    # Who has come to this meeting has read all of the one before.
    at = (meeting.name, kind)
    if at in _before:
        _before[at].forget(_TOPIC)
    _before[at] = meeting
    return [pickle.loads(one) for one in told]


def new_group(timeout_s: float) -> dist.ProcessGroup:
    """A gloo group of all processes, whose waits have ``timeout_s`` seconds; all of them call this.

    Raises:
        MeetingError: some processes did not come in time.
    """
    barrier(None, timeout_s, kind="group", what="have not come to make a group")
    try:
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return group
    except RuntimeError as error:
        others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        raise lost(error, "making a group", others) from error


def lost(error: BaseException, doing: str, ranks: Sequence[int]) -> MeetingError:
    """The typed error for what torch.distributed says about ``ranks`` of the default group."""
    about = "; ".join(describe(rank) for rank in ranks)
    return MeetingError(f"{doing} failed: {str(error).splitlines()[0]}; {about}", ranks=tuple(ranks))


def barrier(group: dist.ProcessGroup | None, timeout_s: float, *, kind: str, what: str) -> None:
    """Wait until all processes of ``group`` are here; arguments and errors as for :func:`gather`."""
    gather(None, group, timeout_s, kind=kind, what=what)
