"""Starts one process per stage, supervises them, and ends them all as soon as one fails.

    def work(ctx, steps):              # runs in every process, importable by name
        ctx.report({"step": steps})    # arrives at on_report in the launching process
        return ctx.rank

    launch.run(work, 2, (10,), on_report=print)    # [0, 1]

Whatever happens (an exception, ``sys.exit``, a kill, Ctrl-C, the death of the launching process), the run ends within
seconds and leaves neither a process nor a port behind.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

from paci_rt.errors import StageFailed
from paci_rt.launch.child import LOOPBACK, Context, Failure, Job, child_main
from paci_rt.launch.interface import init_gloo

__all__ = ["Context", "run", "run_under_torchrun", "under_torchrun"]

POLL_S = 0.5
"""How often processes are polled for a death that closed no pipe."""
GRACE_S = 3.0
"""How long a failure that looks like a consequence waits for its cause."""
LAST_WORDS_S = 0.5
"""How long the neighbours of a dead process have to report where they stopped."""
EXIT_S = 20.0
"""How long a process may take to leave once its work is done."""

OnReport = Callable[[dict[str, Any]], None]


def run(
    fn: Callable[..., Any],
    world_size: int,
    args: Sequence[Any] = (),
    *,
    threads: int = 1,
    port: int = 0,
    on_report: OnReport | None = None,
    timeout_s: float | None = None,
) -> list[Any]:
    """Call ``fn(ctx, *args)`` in ``world_size`` new processes and return their results by rank.

    Every process is spawned, computes on ``threads`` threads and has ``torch.distributed`` (gloo, over loopback)
    initialised. Scripts need the usual ``if __name__ == "__main__":`` guard.

    Args:
        fn: importable function; it, ``args`` and the results travel by pickle (tensors are copied).
        world_size: number of processes.
        args: what ``fn`` gets besides its context.
        threads: that each process computes on.
        port: TCP port on 127.0.0.1 where the processes meet; 0 takes a free one.
        on_report: called in this process with every object that a process gives to ``ctx.report``.
        timeout_s: end the run after this many seconds; None lets it run.

    Raises:
        ValueError: an argument that cannot work, or a port in use; no process has been started then.
        StageFailed: a process raised or died; the message is the first cause.
        TimeoutError: ``timeout_s`` has passed.

    Example:
        ``fn`` must be importable, such as Python's own ``getattr``; here it reads an attribute of the context:

        >>> from paci_rt import launch
        >>> launch.run(getattr, 2, ("rank",))
        [0, 1]
        >>> launch.run(lambda ctx: ctx.rank, 2)
        Traceback (most recent call last):
        ValueError: fn and args must travel to other processes by pickle (...): use a function defined ...
    """
    for name, value in (("world_size", world_size), ("threads", threads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: give an integer of at least 1")
    try:
        payload = pickle.dumps((fn, tuple(args)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"fn and args must travel to other processes by pickle ({error}): use a function defined at the top level "
            "of a module and plain arguments"
        ) from error
    group = _Group()
    meeting = _MeetingPoint(port)
    try:
        group.start(payload, world_size, threads=threads, port=meeting.port)
        return group.supervise(on_report, timeout_s)
    finally:
        group.end()
        meeting.close()


def under_torchrun() -> bool:
    """Whether ``torchrun`` (or a launcher that speaks like it) started this process.

    Returns:
        True where ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` are set.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from paci_rt import launch
        >>> names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        >>> with mock.patch.dict(os.environ, names):  # as torchrun sets them
        ...     launch.under_torchrun()
        True
    """
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def run_under_torchrun(
    fn: Callable[..., Any], args: Sequence[Any] = (), *, threads: int = 1, on_report: OnReport | None = None
) -> list[Any] | None:
    """Call ``fn(ctx, *args)`` in this process, which ``torchrun`` started as one of several.

    Reports go to ``on_report`` of the process that makes them.

    Args:
        fn, args: as for :func:`run`; only the results travel, by pickle.
        threads: that this process computes on.
        on_report: called with every object that this process gives to ``ctx.report``.

    Returns:
        The results by rank on rank 0, None on the others.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from paci_rt import launch
        >>> names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        >>> with mock.patch.dict(os.environ, names):  # as torchrun sets them, with a port
        ...     launch.run_under_torchrun(getattr, ("world_size",))
        [1]
    """
    torch.set_num_threads(threads)
    init_gloo()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    result = fn(Context(rank, world_size, on_report=on_report), *args)
    results: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(result, results)
    dist.barrier()
    dist.destroy_process_group()
    return results


class _MeetingPoint:
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
class _Child:
    rank: int
    process: SpawnProcess
    conn: Connection
    ended: bool = False
    result: Any = None


@dataclass
class _Group:
    """The processes of one run."""

    children: list[_Child] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def start(self, payload: bytes, world_size: int, *, threads: int, port: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        # Children inherit the blocked SIGINT, so that a Ctrl-C which the terminal sends to all of us cannot hit one
        # while it starts. The tracker comes first because starting it unblocks SIGINT.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for rank in range(world_size):
                ours, theirs = spawn.Pipe()
                job = Job(
                    rank=rank, world_size=world_size, threads=threads, port=port, parent=os.getpid(), payload=payload
                )
                process = spawn.Process(target=child_main, args=(job, theirs), name=f"paci-rt stage {rank}")
                self.children.append(_Child(rank, process, ours))
                process.start()
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def supervise(self, on_report: OnReport | None, timeout_s: float | None) -> list[Any]:
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
            self._raise_first_cause()
        self._dismiss()
        return [child.result for child in self.children]

    def _patience_s(self, deadline: float | None) -> float:
        patience_s = POLL_S if not self.failures else 0.05
        return patience_s if deadline is None else max(0.0, min(patience_s, deadline - time.monotonic()))

    def _read(self, child: _Child, on_report: OnReport | None) -> None:
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

    def _died(self, child: _Child) -> None:
        child.ended = True
        child.process.join(GRACE_S)
        code = child.process.exitcode
        if code is not None and code < 0:
            cause = signal.Signals(-code).name
            message = f"stage {child.rank} was killed by {cause}"
            if cause == "SIGKILL":
                message += " (from outside, or by the system when memory ran out)"
        else:
            cause = f"exit code {code}"
            message = f"stage {child.rank} ended with {cause} before its work was done"
        self.failures.append(Failure(rank=child.rank, cause=cause, message=message, time_s=time.monotonic(), died=True))

    def _raise_first_cause(self) -> None:
        """Raise once the first cause is known, or no better one will come."""
        if not self.failures:
            return
        now, all_ended = time.monotonic(), all(child.ended for child in self.children)
        causes = [failure for failure in self.failures if not failure.secondary]
        first = min(causes or self.failures, key=lambda failure: failure.time_s)
        patience_s = GRACE_S if first.secondary else LAST_WORDS_S if first.died else 0.0
        if not all_ended and now - first.time_s < patience_s:
            return
        message = first.message
        if first.died:
            places = [f"stage {f.rank} stopped at {f.action}" for f in self.failures if f.secondary and f.action]
            message += "".join(f"; {place}" for place in places)
        raise StageFailed(first.rank, first.cause, message, first.remote_traceback)

    def _dismiss(self) -> None:
        """Let all processes exit. None may go before, since a neighbour could still be reading."""
        for child in self.children:
            with suppress(OSError):  # it has left already, which its exit code tells
                child.conn.send_bytes(b"leave")
        until = time.monotonic() + EXIT_S
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
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
