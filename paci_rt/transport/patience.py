"""How long a process waits for others that have not come, and what it says of them when that is over.

A wait for a message is short and has a plain deadline. A wait for a process that loads a model, validates or writes a
file is not: it ends when that process has shown no sign of life for as long as the deadline says. Signs of life are
what its board says (:mod:`paci_rt.status`), and CPU time or what it reads and writes while it starts or computes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from paci_rt import status
from paci_rt.errors import MeetingError, TransportError

LEAST_TIMEOUT_S = 300.0
"""A process that is there and not stopped may do something of its own, such as fetching data, at least so long."""
UNSEEN_S = 60.0
"""A process of which nothing was ever heard has at least so long to start."""
MOST_S = 1800.0
"""No wait is longer (unless the deadline is), whatever signs of life there are."""
ANSWER_S = 3.0
"""A store has at least so long to answer, on a machine that is busy."""
WORKING = 0.1
"""CPU time is a sign of life from this share of a core on: threads that only wait use some too."""
GONE_S = 2.0
"""A process that is gone is waited for so long, for better words on why."""

T = TypeVar("T")


class BoundedStore:
    """A store of ``torch.distributed`` whose calls end: a host that cannot be reached closes no connection.

    Raises:
        TransportError: of each call, where the store is gone or did not answer in time.
    """

    def __init__(self, store: Any, timeout_s: float) -> None:
        self._store, self._timeout_s = store, max(timeout_s, ANSWER_S)

    def set(self, key: str, value: str | bytes) -> None:
        self._bounded(lambda: self._store.set(key, value))

    def check(self, keys: Sequence[str]) -> bool:
        return self._bounded(lambda: bool(self._store.check(list(keys))))

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return self._bounded(lambda: bytes(self._store.get(key)))

    def forget(self, key: str) -> None:
        """Remove a key, where the store can."""
        with suppress(NotImplementedError):
            self._bounded(lambda: self._store.delete_key(key))

    def first(self, key: str, value: str) -> str:
        """The value of ``key``, which is ``value`` if nobody has set it before."""
        return self._bounded(lambda: bytes(self._store.compare_set(key, "", value)).decode())

    def _bounded(self, call: Callable[[], T]) -> T:
        answer: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                answer.append(call())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True, name="paci-rt store")
        thread.start()
        thread.join(self._timeout_s)
        if answer:
            return answer[0]
        if failure and not isinstance(failure[0], RuntimeError):
            raise failure[0]
        reason = str(failure[0]).splitlines()[0] if failure else f"it did not answer within {self._timeout_s:g} s"
        raise TransportError(
            f"the store where the processes of this run meet cannot be used ({reason}): look at the process that holds "
            "it, which is the launcher, torchrun, or rank 0, and at the link to it"
        ) from (failure[0] if failure else None)


class Boards:
    """The boards of the processes of a run, which tell each other in the store where theirs are.

    Args:
        store: of the default group.
        rank: of this process in it.
    """

    def __init__(self, store: BoundedStore, rank: int) -> None:
        self._store, self._rank = store, rank
        own = status.board()
        if own.words[status.RANK] < 0:
            own.words[status.RANK] = rank
        store.set(_key(rank), json.dumps([os.getpid(), -1 if own.fd is None else own.fd, _host()]))

    def learn(self, ranks: Iterable[int]) -> None:
        """Open the boards of ``ranks`` while their processes are there; those on other hosts cannot be."""
        for rank in ranks:
            if rank == self._rank or rank in status.peers() or not self._store.check([_key(rank)]):
                continue
            pid, fd, host = json.loads(self._store.get(_key(rank)))
            if host == _host() and (found := status.open_board(pid, fd)) is not None:
                status.peers()[rank] = found

    def remote(self, rank: int) -> str:
        """The last beat of a process on another host, as text; empty without one."""
        key = f"paci_rt/beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def seen(self, rank: int) -> bool:
        """Whether the process was ever heard of."""
        return rank in status.peers() or self._store.check([_key(rank)])


def _key(rank: int) -> str:
    return f"paci_rt/board/{rank}"


def _host() -> list[str]:
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [str(os.getpid()), ""]  # nobody else's


class _Sign(NamedTuple):
    """The last sign of life of a process: what had changed, its CPU time, and when."""

    life: Any
    cpu_s: float
    at_s: float


def _work_of(pid: int) -> tuple[float, int]:
    """Seconds of CPU time of a process, and bytes that it has read from disks and written to them."""
    return status.cpu_ticks(pid) / os.sysconf("SC_CLK_TCK"), status.storage_bytes(pid)


class Patience:
    """Ends one wait for other processes; ``check`` is called while some are missing.

    Args:
        timeout_s: deadline, from the last sign of life of the process that is missing.
        what: what they have not done, in the words of the error.
    """

    def __init__(self, timeout_s: float, boards: Boards, what: str) -> None:
        self._timeout_s, self._boards, self._what = timeout_s, boards, what
        self._begin = time.monotonic()
        self._lives: dict[int, _Sign] = {}
        self._siblings: dict[int, int] | None = None
        self._next_look = 0.0
        self._waiting = False

    def check(self, missing: Sequence[int]) -> None:
        """Note the signs of life of ``missing``.

        Raises:
            MeetingError: one of them has shown none for too long.
        """
        now = time.monotonic()
        if now < self._next_look or not missing:
            return
        self._next_look = now + min(0.25, self._timeout_s / 8)
        self._say(missing)
        self._boards.learn(missing)
        for rank in missing:
            life, cpu_s, least_s = self._life(rank)
            last = self._lives.get(rank)
            if last is None or last.life != life or cpu_s - last.cpu_s > WORKING * (now - last.at_s):
                last = self._lives[rank] = _Sign(life, cpu_s, self._begin if last is None else now)
            limit_s = min(self._timeout_s, GONE_S) if life == "gone" else max(self._timeout_s, least_s)
            if now - last.at_s > limit_s or now - self._begin > max(self._timeout_s, MOST_S):
                self._raise(missing, rank, limit_s)

    def _say(self, missing: Sequence[int]) -> None:
        """Put on this process's board, once, whom it waits for."""
        if not self._waiting:
            self._waiting = True
            status.board().say(f"waits for rank {', '.join(map(str, missing))}, which {self._what}")

    def over(self) -> None:
        """The wait has ended well."""
        if self._waiting:
            status.board().say("")

    def _life(self, rank: int) -> tuple[Any, float, float]:
        """What changes while a process lives, seconds of CPU time, and the least deadline where both stand still."""
        board = status.peers().get(rank)
        if board is not None:
            standing = board.read()
            state = status.process_state(standing.pid)
            if state in ("", "Z", "X"):
                return "gone", 0.0, 0.0
            if state in status.STOPPED:
                return "stopped", 0.0, 0.0
            waits = status.waits_by_action(standing) or bool(standing.detail)
            cpu_s, moved = (0.0, 0) if waits else _work_of(standing.pid)
            # Before its first phase a process runs a script of the user, who may let it wait for other things.
            return (standing.life(), moved), cpu_s, 0.0 if standing.phase else LEAST_TIMEOUT_S
        with suppress(TransportError):
            beat = self._boards.remote(rank)
            if beat:
                return beat, 0.0, 0.0
            if self._boards.seen(rank):
                return "elsewhere", 0.0, 0.0
        pid = self._sibling(rank)
        if pid is None:
            return "unseen", 0.0, UNSEEN_S
        cpu_s, moved = _work_of(pid)
        return moved, cpu_s, 0.0

    def _sibling(self, rank: int) -> int | None:
        """The process that torchrun has started beside this one as ``rank``, before it says anything itself."""
        if self._siblings is None or rank not in self._siblings:
            self._siblings = siblings()
        return self._siblings.get(rank)

    def _raise(self, missing: Sequence[int], silent: int, limit_s: float) -> None:
        said = describe(silent)
        raise MeetingError(
            f"the processes of rank {', '.join(map(str, missing))} {self._what} within {limit_s:g} s: {said}. Look "
            "for what holds them up, or, if they may take that long, raise transfer_timeout_s (--transfer-timeout), "
            f"which is {self._timeout_s:g}",
            ranks=tuple(missing),
        )


class GivenUp(Exception):  # no error: what was waited for is not wanted any more
    """Ends a wait of :class:`BesidePatience`."""


class BesidePatience(Patience):
    """Of a thread beside the training: this process's board goes on saying what the training does.

    Args:
        given_up: ends the wait.
    """

    def __init__(self, timeout_s: float, boards: Boards, what: str, *, given_up: threading.Event) -> None:
        super().__init__(timeout_s, boards, what)
        self._given_up = given_up

    def check(self, missing: Sequence[int]) -> None:
        """As :class:`Patience`.

        Raises:
            GivenUp: the wait has no purpose any more.
        """
        if self._given_up.is_set():
            raise GivenUp("it was given up")
        super().check(missing)

    def _say(self, missing: Sequence[int]) -> None:
        pass


def describe(rank: int) -> str:
    """What is known of a process of the run: its state, and its board's words."""
    board = status.peers().get(rank)
    if board is None:
        pid = siblings().get(rank)
        if pid is not None and status.process_state(pid) in status.STOPPED:
            return f"stage {rank} (process {pid}) is stopped (SIGSTOP) before it met the others"
        return f"of stage {rank} nothing was heard"
    standing = board.read()
    condition = status.condition(standing)
    state = {"stopped": "is stopped (SIGSTOP)", "gone": "is gone", "failed": "has failed"}.get(condition, "is there")
    return f"{standing.name(rank)} (process {standing.pid}) {state}: {standing.words()}"


def siblings() -> dict[int, int]:
    """Processes beside this one, of the same parent, that have a ``RANK`` in their environment: their ids by rank."""
    found: dict[int, int] = {}
    parent = os.getppid()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            if int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) != parent:
                continue
            for item in (entry / "environ").read_bytes().split(b"\0"):
                if item.startswith(b"RANK="):
                    found[int(item[5:])] = int(entry.name)
    return found
