"""The processes of one launched run: started, watched, and ended all together."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch.distributed as dist

from paci_rt import status
from paci_rt.errors import CheckpointError, DisagreementError, StageFailed
from paci_rt.launch import stacks
from paci_rt.launch.blame import Seen, end_of_waits, tell
from paci_rt.launch.child import LOOPBACK, Failure, Job, child_main

POLL_S = 0.5
"""How often processes are polled for a death that closed no pipe, and for being stopped."""
GRACE_S = 3.0
"""How long a failure that looks like a consequence waits for its cause."""
LAST_WORDS_S = 0.5
"""How long the neighbours of a dead process have to report where they stopped."""
EXIT_S = 20.0
"""How long a process may take to leave once its work is done."""
STOPPED_S = 1.0
"""A stopped process is ended so long after the deadline: the others name what they waited for until then."""

OnReport = Callable[[dict[str, Any]], None]


class MeetingPoint:
    """The store where processes find each other, listening on loopback only."""

    def __init__(self, port: int) -> None:
        if not isinstance(port, int) or not 0 <= port <= 65535:
            raise ValueError(f"port is {port!r}: give 0 (a free one) or a number up to 65535")
        listener = socket.create_server((LOOPBACK, 0)) if port == 0 else _listen(port)
        self.port: int = listener.getsockname()[1]
        self._store: dist.TCPStore | None = dist.TCPStore(
            LOOPBACK,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach(),  # the store owns it from here on
        )

    def close(self) -> None:
        self._store = None


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}): choose another one, or 0 for a free one"
        ) from error


@dataclass(eq=False)
class Child:
    rank: int
    process: SpawnProcess
    conn: Connection
    board: status.Board
    ended: bool = False
    result: Any = None
    stopped_since: float | None = None
    ticks: int = 0


REFUSALS = (CheckpointError.__name__, DisagreementError.__name__)
"""Causes that are about what was asked for: they say it all themselves."""


@dataclass
class Group:
    """The processes of one run."""

    children: list[Child] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    grace_until: float | None = None
    polled_at: float = 0.0
    on_failure: Callable[[dict[int, Seen], str], str] | None = None

    def start(self, job: Job) -> None:
        """Start ``job.world_size`` processes, each with ``job`` and a rank and a board of its own."""
        boards = [status.new_board(rank) for rank in range(job.world_size)]
        files = tuple(board.fd for board in boards if board.fd is not None)
        job = replace(job, boards=files if len(files) == len(boards) else ())
        spawn = multiprocessing.get_context("spawn")
        # Children inherit the blocked SIGINT, so that a Ctrl-C which the terminal sends to all of us cannot hit one
        # while it starts. The tracker comes first because starting it unblocks SIGINT.
        resource_tracker.ensure_running()
        # SIGUSR1 too, which would end one that does not hear it yet.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
        try:
            for rank, board in enumerate(boards):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(
                    target=child_main, args=(replace(job, rank=rank), theirs), name=f"paci-rt stage {rank}"
                )
                self.children.append(Child(rank, process, ours, board))
                board.enter("start")
                process.start()
                board.words[status.PID] = process.pid or 0
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def supervise(self, on_report: OnReport | None, timeout_s: float | None, wait_s: float) -> list[Any]:
        """Results by rank; ``wait_s`` is the deadline of a stopped process, ``timeout_s`` that of the run."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while running := [child for child in self.children if not child.ended]:
            if deadline is not None and time.monotonic() > deadline:
                names = ", ".join(str(child.rank) for child in running)
                raise TimeoutError(f"the run did not end within {timeout_s:g} s; stages still running: {names}")
            readable = connection.wait([child.conn for child in running], timeout=self._patience_s(deadline))
            for child in running:
                if child.conn in readable:
                    self._read(child, on_report)
                elif child.process.exitcode is not None and not child.conn.poll():
                    self._died(child)
            self._look_at_stopped(wait_s)
            self._end_of_grace()
            self._raise_first_cause()
        self._dismiss(min(EXIT_S, max(wait_s, STOPPED_S)))
        return [child.result for child in self.children]

    def _patience_s(self, deadline: float | None) -> float:
        patience_s = POLL_S if not self.failures else 0.05
        return patience_s if deadline is None else max(0.0, min(patience_s, deadline - time.monotonic()))

    def _read(self, child: Child, on_report: OnReport | None) -> None:
        try:
            kind, content = pickle.loads(child.conn.recv_bytes())
        except (EOFError, OSError):
            self._died(child)
            return
        if kind == "report":
            if on_report is not None:
                on_report(content)
            return
        child.ended = True
        if kind == "done":
            child.result = content
        else:
            self.failures.append(content)

    def _died(self, child: Child) -> None:
        child.ended = True
        child.process.join(GRACE_S)
        code, name = child.process.exitcode, child.board.read().name(child.rank)
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
            message = f"{name} was killed by {cause}"
            if cause == "SIGKILL":
                message += " (from outside, or by the system when memory ran out)"
        else:
            cause = f"exit code {code}"
            message = f"{name} ended with {cause} before its work was done"
        message += f"; it stood at: {child.board.read().words()}"
        self.failures.append(Failure(rank=child.rank, cause=cause, message=message, time_s=time.monotonic(), died=True))

    def _look_at_stopped(self, wait_s: float) -> None:
        """Note who is stopped, and take whoever is for longer than ``wait_s`` as failed."""
        now = time.monotonic()
        if now - self.polled_at < POLL_S and not self.failures:
            return
        if now - self.polled_at > 4 * POLL_S:  # this process was stopped itself
            for child in self.children:
                child.stopped_since = None
        self.polled_at = now
        for child in self.children:
            pid, before = child.process.pid or 0, child.ticks
            child.ticks = status.cpu_ticks(pid)
            # Who has run since the last look was not stopped all the time.
            if child.ended or child.ticks != before or status.process_state(pid) not in status.STOPPED:
                child.stopped_since = None
                continue
            child.stopped_since = child.stopped_since or now
            if now - child.stopped_since > wait_s + STOPPED_S:
                child.ended = True
                self.failures.append(_stopped(child, now - child.stopped_since))

    def _end_of_grace(self) -> None:
        if self.grace_until is not None and time.monotonic() > self.grace_until:
            raise GraceOver

    def ask_for_stop(self, number: int) -> None:
        """Ask all stages to end in order."""
        for child in self.children:
            child.board.words[status.STOP] = number

    def report_stacks(self) -> None:
        """Write what all stages do now to standard error."""
        sys.stderr.write(stacks.report({child.rank: child.board for child in self.children if child.process.pid}))
        sys.stderr.flush()

    def _raise_first_cause(self) -> None:
        """Raise once the first cause is known, or no better one will come."""
        if not self.failures:
            return
        now, all_ended = time.monotonic(), all(child.ended for child in self.children)
        seen = self.seen()
        first = self._first(seen)
        patience_s = GRACE_S if first.secondary else LAST_WORDS_S if first.died or first.stopped else 0.0
        if not all_ended and now - first.time_s < patience_s:
            return
        message = first.message
        others = [failure for failure in self.failures if failure is not first]
        if first.died or first.stopped:
            message += "".join(
                f"; {seen[f.rank].standing.name(f.rank)} stopped at {f.action}"
                for f in others
                if f.secondary and f.action
            )
        elif first.secondary and all(f.secondary for f in others):
            message += self._link(first, seen)
        where = ""
        if first.died or first.stopped or first.secondary:
            where = "\nwhat the stages did last:\n" + tell(seen)
        if self.on_failure is not None and first.cause not in REFUSALS:
            where += self.on_failure(seen, message)
        raise StageFailed(first.rank, first.cause, message + where, first.remote_traceback)

    def seen(self) -> dict[int, Seen]:
        """All processes, from their boards and states."""
        return {child.rank: Seen.of(child.board) for child in self.children}

    def _first(self, seen: dict[int, Seen]) -> Failure:
        """The failure that the others follow from; a stopped process is one, though it says nothing."""
        causes = [failure for failure in self.failures if not failure.secondary]
        if causes:
            return min(causes, key=lambda failure: failure.time_s)
        first = min(self.failures, key=lambda failure: failure.time_s)
        told = {failure.rank for failure in self.failures}
        stopped = [rank for rank, one in seen.items() if one.condition == "stopped" and rank not in told]
        if stopped:
            child = self.children[stopped[0]]
            return replace(
                _stopped(child, time.monotonic() - (child.stopped_since or first.time_s)), time_s=first.time_s
            )
        rank = end_of_waits(seen)
        if rank is None or rank in told:
            return first
        message = (
            f"{seen[rank].standing.name(rank)} holds the others up: {seen[rank].standing.words()}; {first.message}"
        )
        return replace(first, rank=rank, message=message)

    def _link(self, first: Failure, seen: dict[int, Seen]) -> str:
        """What to say where every failure is the loss of another stage, and no process is dead or stopped."""
        silent = [one for one in seen.values() if one.condition in ("stopped", "gone") and not one.standing.failed_s]
        if silent or first.cause not in ("PeerLostError", "TransferTimeoutError"):
            return ""
        return "; no process had died, failed or was stopped before that: the link between these two stages is cut"

    def _dismiss(self, exit_s: float) -> None:
        """Let all processes exit. None may go before, since a neighbour could still be reading."""
        for child in self.children:
            with suppress(OSError):  # it has left already, which its exit code tells
                child.conn.send_bytes(b"leave")
        until = time.monotonic() + exit_s
        for child in self.children:
            child.process.join(max(0.0, until - time.monotonic()))
            if child.process.exitcode != 0:
                how = "did not exit" if child.process.exitcode is None else f"exited with {child.process.exitcode}"
                warnings.warn(f"stage {child.rank} {how} after its work was done", RuntimeWarning, stacklevel=4)

    def end(self) -> None:
        """Kill whoever is left. A Ctrl-C in here waits until it is done."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            started = [child for child in self.children if child.process.pid is not None]
            for child in started:
                if child.process.exitcode is None:
                    child.process.kill()
            for child in started:
                child.process.join()
                child.process.close()
            for child in self.children:
                child.conn.close()
                child.board.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class GraceOver(Exception):
    """The stages did not end in order within the grace that SIGTERM leaves."""


def _stopped(child: Child, seconds: float) -> Failure:
    standing = child.board.read()
    words, name = standing.words(), standing.name(child.rank)
    return Failure(
        rank=child.rank,
        cause="stopped",
        message=(
            f"{name} (process {child.process.pid}) is stopped (SIGSTOP or a debugger) for {seconds:.1f} s; "
            f"it stood at: {words}"
        ),
        time_s=time.monotonic(),
        stopped=True,
    )
