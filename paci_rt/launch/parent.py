"""Starts one process per stage, supervises them, and ends them all as soon as one fails.

    def work(ctx, steps):              # runs in every process, importable by name
        ctx.report({"step": steps})    # arrives at on_report in the launching process
        return ctx.rank

    launch.run(work, 2, (10,), on_report=print)    # [0, 1]

Whatever happens (an exception, ``sys.exit``, a kill, Ctrl-C, the death of the launching process), the run ends within
seconds and leaves neither a process nor a port behind.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from paci_rt.errors import RunStopped, StageFailed
from paci_rt.launch.blame import Seen
from paci_rt.launch.child import Job
from paci_rt.launch.dumps import write_dump
from paci_rt.launch.group import GraceOver, Group, MeetingPoint, OnReport
from paci_rt.transport import DEFAULT_TIMEOUT_S
from paci_rt.transport.base import check_timeout


def run(
    fn: Callable[..., Any],
    world_size: int,
    args: Sequence[Any] = (),
    *,
    threads: int = 1,
    port: int = 0,
    on_report: OnReport | None = None,
    timeout_s: float | None = None,
    transfer_timeout_s: float = DEFAULT_TIMEOUT_S,
    grace_s: float | None = None,
    max_restarts: int = 0,
    dumps: str | os.PathLike[str] | None = None,
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
        transfer_timeout_s: deadline of every wait of a process for others, from the start on; a process that is stopped
            for so long has failed.
        grace_s: seconds that SIGTERM leaves: ``ctx.should_stop`` says so in all processes, which return after that.
            None lets SIGTERM end this process at once, and the others with it.
        max_restarts: how often the run is started again after a failure; ``ctx.restarts`` counts, and ``ctx.run_id``
            tells this run's checkpoints from others.
        dumps: folder for what all processes did last, written when one fails; for ``paci-rt doctor --run``.

    ``SIGUSR1`` to this process, or to any that it started, writes what all of them do, with their stacks, to standard
    error.

    Raises:
        ValueError: an argument that cannot work, or a port in use; no process has been started then.
        StageFailed: a process raised, died or was stopped; the message is the first cause.
        RunStopped: SIGTERM came, and the processes did not return within ``grace_s``.
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
    check_timeout(transfer_timeout_s, "transfer_timeout_s")
    if not isinstance(max_restarts, int) or max_restarts < 0:
        raise ValueError(f"max_restarts is {max_restarts!r}: give an integer of at least 0")
    job = Job(
        rank=-1,
        world_size=world_size,
        threads=threads,
        port=port,
        parent=os.getpid(),
        payload=payload,
        timeout_s=transfer_timeout_s,
        grace_s=grace_s,
        run_id=secrets.token_hex(8),
    )
    for restarts in range(max_restarts + 1):
        try:
            return _run_once(replace(job, restarts=restarts), on_report, timeout_s, dumps)
        except StageFailed as error:
            if restarts == max_restarts:
                raise
            _say_again(error, restarts + 1, max_restarts)
            if on_report is not None:
                on_report({"kind": "restart", "restarts": restarts + 1, "cause": error.cause, "rank": error.rank})
    raise AssertionError("the loop above returns or raises")


def _run_once(
    job: Job, on_report: OnReport | None, timeout_s: float | None, dumps: str | os.PathLike[str] | None
) -> list[Any]:
    group = Group()
    meeting = MeetingPoint(job.port)

    def dump(seen: dict[int, Seen], message: str) -> str:
        return "" if dumps is None else write_dump(Path(dumps), seen, message)

    group.on_failure = dump
    try:
        with _heard(group, job.grace_s):
            group.start(replace(job, port=meeting.port))
            return group.supervise(on_report, timeout_s, job.timeout_s)
    except GraceOver:
        raise RunStopped(
            f"the run did not end within the {job.grace_s:g} s of grace that SIGTERM leaves (--grace-s), and was "
            "ended; what it has not saved is lost"
        ) from None
    finally:
        group.end()
        meeting.close()


def _say_again(error: StageFailed, restarts: int, most: int) -> None:
    first = str(error).splitlines()[0]
    print(f"paci-rt: {first}; starting again ({restarts} of {most} restarts)", file=sys.stderr, flush=True)


@contextmanager
def _heard(group: Group, grace_s: float | None) -> Iterator[None]:
    """Hear SIGUSR1, and SIGTERM where it leaves a grace; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        assert grace_s is not None
        if group.grace_until is None:
            group.grace_until = time.monotonic() + grace_s
            print(
                f"paci-rt: SIGTERM: the stages drain, save and end, within {grace_s:g} s", file=sys.stderr, flush=True
            )
        group.ask_for_stop(number)

    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda *_: group.report_stacks())}
    if grace_s is not None:
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
