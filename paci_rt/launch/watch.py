"""A small thread in every process of a run: it beats, hears signals at once, and ends what must not go on.

Signals reach it through a pipe that the interpreter's own handler writes to, so that it also hears them while the main
thread waits in native code. ``SIGTERM`` asks for an orderly end (:func:`stop_at`), ``SIGUSR1`` for a report of all
stages (:mod:`paci_rt.launch.stacks`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from paci_rt import status
from paci_rt.errors import PaciError
from paci_rt.launch import stacks
from paci_rt.launch.blame import Seen, guilty, sentence
from paci_rt.transport.patience import BoundedStore

BEAT_S = 0.5
LAST_WORDS_S = 1.0
"""How long the main thread of a process that must end has for an error of its own."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended."""


class Remote:
    """Processes on other hosts: beats and requests in the store of the run.

    Args:
        store: of the default group.
        rank: of this process in it.
    """

    def __init__(self, store: BoundedStore, rank: int) -> None:
        self._store, self._rank = store, rank

    def beat(self, own: status.Board) -> None:
        """Tell what this process does, and hear whether another one asks for an end."""
        standing = asdict(own.read())
        standing.pop("beat_s")
        self._store.set(f"paci_rt/beat/{self._rank}", json.dumps(standing))
        if not own.words[status.STOP] and self._store.check([_STOP]):
            own.words[status.STOP] = signal.SIGTERM

    def ask(self) -> None:
        """Ask the processes of all hosts to end in order."""
        self._store.set(_STOP, "1")

    def decide(self, step: int) -> None:
        """Tell all that the run ends before ``step``; by rank 0."""
        self._store.set(_STOP_AT, str(step))

    def decided(self) -> int | None:
        """The step before which the run ends, if rank 0 has said so."""
        return int(self._store.get(_STOP_AT)) if self._store.check([_STOP_AT]) else None


_STOP, _STOP_AT = "paci_rt/stop", "paci_rt/stop_at"
_remote: Remote | None = None


class Watcher:
    """Hears and beats for this process from :meth:`start` on.

    Args:
        grace_s: seconds from a SIGTERM to the end of the process, whatever it does then; None leaves SIGTERM alone.
        remote: how processes of other hosts are reached; None where there are none.
    """

    def __init__(self, *, grace_s: float | None = None, remote: Remote | None = None) -> None:
        global _remote
        self._grace_s = grace_s
        _remote = remote
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="paci-rt watcher")
        self._asked_at: float | None = None
        self._lonely_at: float | None = None
        self._before: list[tuple[int, Any]] = []
        self._wakeup_before = -1

    def start(self) -> None:
        """Begin; signals are heard only where this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            if self._grace_s is not None:
                self._before.append((signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: None)))
            stacks.listen()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and give the signals back."""
        self._ended.set()
        with suppress(OSError):
            os.write(self._write, b"\0")
        self._thread.join(2 * BEAT_S)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before:
                signal.signal(number, handler)

    def _run(self) -> None:
        own = status.board()
        while not self._ended.is_set():
            readable, _, _ = select.select([self._read], [], [], BEAT_S)
            heard = os.read(self._read, 512) if readable else b""
            if self._ended.is_set():
                return
            own.beat(time.process_time_ns() - time.thread_time_ns() + _written_bytes())
            if _remote is not None:
                with suppress(PaciError):  # the others see that no beat comes any more
                    _remote.beat(own)
            if signal.SIGUSR1 in heard and stacks.wanted(own, heard.count(signal.SIGUSR1)):
                sys.stderr.write(stacks.report({own.read().rank: own, **status.peers()}))
                sys.stderr.flush()
            if signal.SIGTERM in heard and self._grace_s is not None:
                self._terminate(own)
            self._end_in_time(own)

    def _terminate(self, own: status.Board) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        request_stop()
        seen = {rank: Seen.of(board) for rank, board in status.peers().items()}
        if any(one.condition and one.standing.phase != "done" for one in seen.values()):
            self._lonely_at = time.monotonic()  # nobody left to drain with

    def _end_in_time(self, own: status.Board) -> None:
        now = time.monotonic()
        if self._lonely_at is not None and now - self._lonely_at > LAST_WORDS_S:
            seen = {rank: Seen.of(board) for rank, board in status.peers().items()}
            first = guilty(seen)
            why = "" if first is None else f"; {sentence(first, seen[first])}"
            self._end(own, f"ended by SIGTERM{why}")
        if self._asked_at is not None and self._grace_s is not None and now - self._asked_at > self._grace_s:
            self._end(own, f"did not end within the {self._grace_s:g} s of grace that SIGTERM leaves (--grace-s)")

    def _end(self, own: status.Board, why: str) -> None:
        standing = own.read()
        own.fail(why)
        sys.stderr.write(f"paci-rt: error: stage {standing.rank} {why}; it stood at: {standing.words()}\n")
        sys.stderr.flush()
        os._exit(TERMINATED)


def _written_bytes() -> int:
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/io", encoding="ascii") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
        return int(fields["wchar"]) + int(fields["rchar"])
    return 0


def request_stop(number: int = signal.SIGTERM) -> None:
    """Ask all stages of this run to end in order; rank 0 decides after which step."""
    for board in (status.board(), *status.peers().values()):
        board.words[status.STOP] = number
    if _remote is not None:
        with suppress(PaciError):
            _remote.ask()


REPLICAS_AHEAD = 4
"""Steps ahead that the leader decides where pipelines have replicas. Another replica's first stage is at most two steps
ahead of the leader, whose sums it waits for, and what follows in its pipeline three."""


def stop_at(step: int, *, leader: bool) -> bool:
    """Whether the run ends before ``step``, the same on all ranks, which all ask before each of their steps.

    The leader, whose messages start every window, says one step ahead where it ends. So a process that is about to
    begin that step has, by the messages of the step before, a board to read it from.

    Args:
        leader: whether this is rank 0.
    """
    own = status.board()
    if leader and own.words[status.STOP] and not own.words[status.STOP_AT]:
        ahead = REPLICAS_AHEAD if own.words[status.REPLICA] else 1
        own.words[status.STOP_AT] = step + ahead + 1  # after one more step
        if _remote is not None:
            _remote.decide(step + ahead)
    wanted = own.words[status.STOP_AT]
    if not leader and 0 in status.peers():
        wanted = status.peers()[0].words[status.STOP_AT]
    elif not leader and _remote is not None:
        wanted = 1 + (_remote.decided() or -1)
    if wanted and step >= wanted - 1:
        own.words[status.STOP_AT] = wanted
        return True
    return False


def stopped_before() -> int | None:
    """The step before which this process ended in order because of a SIGTERM; None where it did not.

    Example:
        >>> from paci_rt import launch
        >>> launch.stopped_before() is None
        True
    """
    wanted = status.board().words[status.STOP_AT]
    return int(wanted) - 1 if wanted else None


@contextmanager
def alone(grace_s: float | None = None) -> Iterator[None]:
    """Hear SIGTERM and SIGUSR1 in a process that has all stages, as :func:`paci_rt.launch.run` does for several.

    Args:
        grace_s: seconds from a SIGTERM to the end of the process; None leaves SIGTERM alone.

    Example:
        >>> from paci_rt import launch
        >>> with launch.alone(grace_s=10):
        ...     launch.Context(local=True).should_stop(0)
        False
    """
    watcher = Watcher(grace_s=grace_s)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()
