"""Sums and copies between the replicas of a stage: processes that hold the same stage and train on other micro-batches.

A thread of its own does them one after another, in a process group of its own, while the stage goes on computing. Sums
are added in the order of the replicas, bucket by bucket: each replica adds up its share and sends the result to the
others. So all have the same bits, and they depend neither on the backend nor on the size of a bucket.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt import status
from paci_rt.errors import PaciError, PeerLostError, TransferTimeoutError
from paci_rt.transport.patience import describe

BUCKET_BYTES = 1 << 20
AHEAD = 2
"""Buckets under way at a time."""
_SMALL, _SUMS, _WHOLE, _SWAPPED = 1, 2, 3, 4
LOOK_AFTER_S = 0.1
JOIN_S = 2.0

Range = tuple[int, int]
T = TypeVar("T")


def shares(numel: int, size: int, align: int = 16) -> list[Range]:
    """Which part of a flat buffer each of ``size`` replicas adds up, as starts and ends in elements.

    Example:
        >>> from paci_rt.transport.replicas import shares
        >>> shares(100, 3)
        [(0, 48), (48, 96), (96, 100)]
    """
    each = -(-numel // (size * align)) * align
    return [(min(numel, at * each), min(numel, (at + 1) * each)) for at in range(size)]


class Pending(Generic[T]):
    """The outcome of work that the thread does; ``seconds`` is what it took."""

    def __init__(self, group: ReplicaGroup, action: str) -> None:
        self._group, self._action = group, action
        self._done = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None
        self.seconds = 0.0

    def run(self, work: Callable[[], T]) -> None:
        begin = time.perf_counter()
        try:
            self._value.append(work())
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - begin
        self._done.set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> T:
        """The value.

        Raises:
            TransferTimeoutError, PeerLostError: a replica did not come in time, or is gone.
            DisagreementError: what ``work`` raises.
        """
        if not self._done.wait(LOOK_AFTER_S):
            said = ""
            while not self._done.wait(LOOK_AFTER_S):
                at = self._group.waits_for
                now = "" if at is None else f"waits for rank {at}, which has not reached {self._action}"
                if now != said:
                    status.board().say(now)
                    said = now
            status.board().say("")
        if self._error is not None:
            raise self._group.explained(self._error, self._action)
        return self._value[0]


class ReplicaGroup:
    """The replicas of this process's stages.

    Args:
        group: process group of those that hold the same stages, in the order of the replicas.
        timeout_s: deadline of every single message, in seconds.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.group, self.timeout_s = group, float(timeout_s)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = [at if group is None else dist.get_global_rank(group, at) for at in range(self.size)]
        self.waits_for: int | None = None
        """Rank of the default group that the thread waits for now."""
        self._own: Any = None
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[tuple[Pending[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._broken: BaseException | None = None

    def connect(self, key: str) -> None:
        """Make the connections; all replicas call this, once they know that all are there.

        Args:
            key: the same on all of them, and used once.

        Raises:
            PeerLostError, TransferTimeoutError: one did not come.
        """
        if self.size == 1:
            return
        # Not new_group: its names count the groups that a process knows, which replicas need not have in common.
        store = dist.PrefixStore(f"paci_rt/replicas/{key}", dist.distributed_c10d._get_default_store())
        timeout = timedelta(seconds=self.timeout_s)
        try:
            self._own = dist.ProcessGroupGloo(store, self.rank, self.size, timeout)
        except RuntimeError as error:
            raise self.explained(error, "the meeting of the replicas") from error
        self._thread = threading.Thread(target=self._work, daemon=True, name="paci-rt replicas")
        self._thread.start()

    @property
    def peers(self) -> list[int]:
        """The other replicas."""
        return [at for at in range(self.size) if at != self.rank]

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """In which order replicas turn to each other, two at a time: whom this one gives to, and whom it takes from."""
        return [((self.rank + by) % self.size, (self.rank - by) % self.size) for by in range(1, self.size)]

    def submit(self, action: str, work: Callable[[], T]) -> Pending[T]:
        """Let the thread do ``work`` after all that was submitted before; ``action`` names it in errors."""
        pending: Pending[T] = Pending(self, action)
        if self.size == 1:
            pending.run(work)
            return pending
        if self._own is None:
            raise PaciError("the replicas have not met: this schedule is not made to its end, or closed")
        self._jobs.put((pending, work))
        return pending

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            pending, work = job
            if self._broken is not None:
                pending.fail(self._broken)
                continue
            pending.run(work)
            if pending.failed:
                self._broken = pending._error

    def close(self) -> None:
        """End the thread and the connections. Idempotent."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(JOIN_S)
        # If it still waits for a replica that is gone, it keeps the connections, and ends with the process.
        self._thread = self._own = None

    def explained(self, error: BaseException, action: str) -> BaseException:
        """The typed error for what a message between replicas ended in."""
        if isinstance(error, PaciError) or not isinstance(error, RuntimeError):
            return error
        at = self.waits_for
        other = "another replica" if at is None else describe(at)
        said = str(error).splitlines()[0]
        if "timed out" in said.lower():
            text = (
                f"{action} timed out after {self.timeout_s:g} s: this replica waits for the sums of another; {other}. "
                "Look for what holds it up, or, if it may take that long, raise transfer_timeout_s "
                f"(--transfer-timeout), which is {self.timeout_s:g}"
            )
            typed: PaciError = TransferTimeoutError(action, text)
        else:
            typed = PeerLostError(action, f"{action}: the connection to another replica broke ({said}); {other}", other)
        typed.__cause__ = error
        return typed

    # --- what the thread does ---

    def exchange(self, mine: Tensor) -> list[Tensor]:
        """A small tensor of every replica, all of one shape and dtype, by replica."""
        found = [mine if at == self.rank else torch.empty_like(mine) for at in range(self.size)]
        works = [(at, self._send(mine, at, _SMALL)) for at in self.peers]
        works += [(at, self._receive(found[at], at, _SMALL)) for at in self.peers]
        self._await(works)
        return found

    def sum_up(self, flat: Tensor, parts: Sequence[Range], *, whole: bool) -> None:
        """Put the sums over all replicas into ``flat``: everywhere, or without ``whole`` into the own part alone.

        Args:
            flat: contiguous, of the same length and dtype on all replicas.
            parts: as :func:`shares` gives them.
        """
        if self.size == 1:
            return
        step = max(1, BUCKET_BYTES // flat.element_size())
        buckets = max(-(-(end - start) // step) for start, end in parts)
        room = [
            {at: torch.empty(step, dtype=flat.dtype, device=flat.device) for at in self.peers}
            for _ in range(min(AHEAD, buckets))
        ]
        under_way: list[tuple[int, list[tuple[int, Any]]]] = []
        leaving: list[tuple[int, Any]] = []
        for bucket in range(buckets + AHEAD - 1):
            if bucket < buckets:
                under_way.append((bucket, self._start_sums(flat, parts, bucket, step, room[bucket % AHEAD])))
            if bucket < AHEAD - 1 or not under_way:
                continue
            at, works = under_way.pop(0)
            self._await(works)
            own = flat[slice(*_cut(parts[self.rank], at, step))]
            if own.numel():
                self._add_in_order(own, room[at % AHEAD])
            if whole:
                leaving += self._start_copies(flat, [_cut(part, at, step) for part in parts])
        for at, works in under_way:  # pragma: no cover  fewer buckets than are under way at a time
            raise AssertionError(f"bucket {at} with {len(works)} messages was left")
        self._await(leaving)

    def share(self, flat: Tensor, ranges: Sequence[Sequence[Range]]) -> None:
        """Copy parts of ``flat`` to all replicas: for each of them those that it has, ``ranges[replica]``."""
        if self.size == 1:
            return
        step = max(1, BUCKET_BYTES // flat.element_size())
        works: list[tuple[int, Any]] = []
        for at in range(self.size):
            for start, end in ranges[at]:
                for bucket in range(-(-(end - start) // step)):
                    one = [(0, 0)] * self.size
                    one[at] = _cut((start, end), bucket, step)
                    works += self._start_copies(flat, one)
        self._await(works)

    def swap(self, out: Iterable[Tensor], to: int, into: Iterable[Tensor], source: int) -> None:
        """Send flat tensors to one replica, and receive as many elements as ``into`` has from another, which sends
        them to this one in the same call."""
        works = [(to, self._send(piece, to, _SWAPPED)) for piece in _in_buckets(out)]
        works += [(source, self._receive(piece, source, _SWAPPED)) for piece in _in_buckets(into)]
        self._await(works)

    def _start_sums(
        self, flat: Tensor, parts: Sequence[Range], bucket: int, step: int, room: dict[int, Tensor]
    ) -> list[tuple[int, Any]]:
        start, end = _cut(parts[self.rank], bucket, step)
        works = []
        for at in self.peers:
            theirs = flat[slice(*_cut(parts[at], bucket, step))]
            if theirs.numel():
                works.append((at, self._send(theirs, at, _SUMS)))
            if start < end:
                works.append((at, self._receive(room[at][: end - start], at, _SUMS)))
        return works

    def _add_in_order(self, own: Tensor, room: dict[int, Tensor]) -> None:
        terms = [own if at == self.rank else room[at][: own.numel()] for at in range(self.size)]
        total = terms[0]
        for at, term in enumerate(terms[1:], 1):
            # Into the first term, and at the end where the sum belongs.
            total = torch.add(total, term, out=own if at == self.size - 1 else terms[0])

    def _start_copies(self, flat: Tensor, ranges: Sequence[Range]) -> list[tuple[int, Any]]:
        works, own = [], flat[slice(*ranges[self.rank])]
        for at in self.peers:
            if own.numel():
                works.append((at, self._send(own, at, _WHOLE)))
            theirs = flat[slice(*ranges[at])]
            if theirs.numel():
                works.append((at, self._receive(theirs, at, _WHOLE)))
        return works

    def _send(self, tensor: Tensor, at: int, tag: int) -> Any:
        return self._own.send([tensor.view(torch.uint8)], at, tag)

    def _receive(self, tensor: Tensor, at: int, tag: int) -> Any:
        return self._own.recv([tensor.view(torch.uint8)], at, tag)

    def _await(self, works: Sequence[tuple[int, Any]]) -> None:
        for at, work in works:
            self.waits_for = self.ranks[at]
            work.wait()
        self.waits_for = None


def _cut(part: Range, bucket: int, step: int) -> Range:
    """Bucket number ``bucket`` of a part."""
    start = min(part[1], part[0] + bucket * step)
    return start, min(part[1], start + step)


def _in_buckets(flats: Iterable[Tensor]) -> Iterator[Tensor]:
    for flat in flats:
        if flat.numel():
            yield from flat.split(max(1, BUCKET_BYTES // flat.element_size()))
