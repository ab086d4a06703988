"""How the processes of a pipeline learn of each other: small values in ``torch.distributed``'s store."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from paci_rt.errors import TransportError
from paci_rt.transport.patience import Boards, BoundedStore, Patience

POLL_S = 0.002
"""How often a process looks for what is missing, at first; the pause grows with the wait, up to ``MAX_POLL_S``."""
MAX_POLL_S = 0.05
LOOK_AFTER_S = 0.1
"""A wait so long makes a process look at those that are missing."""


def check_group(group: dist.ProcessGroup | None, num_stages: int, chunks: int, transport: str) -> None:
    """Make sure that ``group`` has one process for every ``chunks`` of ``num_stages`` stages.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or the group has another size.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"the {transport} transport needs torch.distributed: call "
            "torch.distributed.init_process_group('gloo') first, or use paci_rt.LocalPipeline in one process"
        )
    size = dist.get_world_size(group)
    if size * chunks != num_stages:
        each = "one process a stage" if chunks == 1 else f"one process for {chunks} stages"
        raise ValueError(
            f"{num_stages} stages on a process group of {size}: start {each}, or pass PipelineStage(group=...) with a "
            "group of that size"
        )


def host_identity() -> dict[str, str]:
    """What tells hosts apart: ``name`` for people, ``boot`` and ``pids`` for the comparison.

    ``pids`` is the namespace of process ids, which differs between containers.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return {
            "name": socket.gethostname(),
            "boot": boot.read_text().strip(),
            "pids": os.readlink("/proc/self/ns/pid"),
        }
    except OSError:  # not Linux, or no /proc
        return {"name": socket.gethostname(), "boot": socket.gethostname(), "pids": ""}


class Meeting:
    """All processes of a group come together here, in the same order everywhere, and tell each other values.

    Processes make their pipelines in the same order, so they agree on the number of a meeting without talking. A wait
    ends at the deadline of :class:`~paci_rt.transport.patience.Patience`: counted from the last sign of life of whoever
    is missing.

    Args:
        group: None is the default group.
        timeout_s: how long to wait for a process without a sign of life.
        kind: meetings of different kinds are counted apart.
        what: what the processes meet for, in the words of an error.
        patience: what ends a wait.
    """

    _held: ClassVar[dict[str, int]] = {}  # meetings by the name of the group

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout_s: float,
        kind: str = "",
        what: str = "have not made their pipeline",
        patience: Callable[[float, Boards, str], Patience] = Patience,
    ) -> None:
        members = dist.group.WORLD if group is None else group
        assert members is not None
        name = f"{members.group_name}/{kind}" if kind else members.group_name
        self.name = name
        self.number = self._held.get(name, 0)
        self._held[name] = self.number + 1
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._timeout_s, self._what, self._patience = timeout_s, what, patience
        ranks = range(self.size)
        self._global = [rank if group is None else dist.get_global_rank(group, rank) for rank in ranks]
        root = dist.distributed_c10d._get_default_store()
        self._store = BoundedStore(dist.PrefixStore(f"paci_rt/{name}/{self.number}", root), timeout_s)
        self._boards = Boards(BoundedStore(root, timeout_s), self._global[self.rank])

    def tell(self, topic: str, value: Any) -> None:
        """Tell everybody ``value`` (JSON-ready), without waiting for anybody."""
        self.put(topic, json.dumps(value))

    def put(self, topic: str, value: str | bytes) -> None:
        """As :meth:`tell`, for text or bytes."""
        self._store.set(f"{topic}/{self.rank}", value)

    def forget(self, topic: str) -> None:
        """Take back what this process told, which all others must have read."""
        self._store.forget(f"{topic}/{self.rank}")

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Tell everybody ``value`` (JSON-ready), and return the values of all, by rank.

        Raises:
            MeetingError: some processes did not come in time.
        """
        self.tell(topic, value)
        return [json.loads(one) for one in self.collect(topic)]

    def collect(self, topic: str) -> list[bytes]:
        """What all told on ``topic``, by rank, as bytes.

        Raises:
            MeetingError: some processes did not come in time.
        """
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        patience, begin = None, time.monotonic()
        while not self._store.check(keys):
            waited_s = time.monotonic() - begin
            if patience is None:
                patience = self._patience(self._timeout_s, self._boards, self._what)
            elif waited_s > LOOK_AFTER_S:
                patience.check([self._global[at] for at, key in enumerate(keys) if not self._store.check([key])])
            time.sleep(min(MAX_POLL_S, max(POLL_S, waited_s / 100)))
        if patience is not None:
            patience.over()
        self._boards.learn(self._global)
        return [self._store.get(key) for key in keys]


def hosts_by_name(identities: list[dict[str, str]]) -> dict[str, list[int]]:
    """Ranks by host, in words; hosts of one name are told apart."""
    keys: dict[tuple[str, str], list[int]] = {}
    for rank, identity in enumerate(identities):
        keys.setdefault((identity["boot"], identity["pids"]), []).append(rank)
    found: dict[str, list[int]] = {}
    for ranks in keys.values():
        name = identities[ranks[0]]["name"]
        found[name if name not in found else f"{name} (another boot or container, {len(found) + 1})"] = ranks
    return found


def raise_first(errors: Sequence[str]) -> None:
    """Raise TransportError for the first rank that has told an error."""
    for rank, error in enumerate(errors):
        if error:
            raise TransportError(f"rank {rank}: {error}")
