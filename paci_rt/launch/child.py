"""The child's side of :mod:`paci_rt.launch`."""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from paci_rt import status
from paci_rt.errors import ActionError, MeetingError, PeerLostError, TransferTimeoutError
from paci_rt.launch.child_death import die_with
from paci_rt.launch.watch import Watcher, stop_at
from paci_rt.transport import DEFAULT_TIMEOUT_S
from paci_rt.transport.collective import lost
from paci_rt.transport.patience import Boards, BoundedStore, Patience

LOOPBACK = "127.0.0.1"
START_POLL_S = 0.02

LOST_PEER_WORDS = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|aborted)|broken pipe|closed by peer|remote peer", re.IGNORECASE
)


class Context:
    """What a process of a run knows about itself.

    Attributes:
        rank: 0 … world_size−1; in a pipeline, the stage.
        world_size: number of processes.
        local: True where one process holds all stages; no ``torch.distributed`` then.
        restarts: how often the run has been started again before this time.
        run_id: of the run, the same before and after a restart; empty where nothing can start it again.

    Example:
        >>> from paci_rt.launch import Context
        >>> ctx = Context(rank=0, world_size=2, on_report=print)
        >>> ctx.report({"step": 10, "loss": 2.5})
        {'step': 10, 'loss': 2.5}
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        local: bool = False,
        restarts: int = 0,
        run_id: str = "",
        on_report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local = local
        self.restarts = restarts
        self.run_id = run_id
        self._on_report = on_report

    def report(self, obj: dict[str, Any]) -> None:
        """Hand ``obj`` (picklable) to the ``on_report`` of the launching process, where it has one."""
        if self._on_report is not None:
            self._on_report(obj)

    def with_reports_to(self, on_report: Callable[[dict[str, Any]], None]) -> Context:
        """The same context, with another receiver of its reports."""
        other = copy.copy(self)
        other._on_report = on_report
        return other

    def should_stop(self, step: int) -> bool:
        """Whether the run is to end in order before ``step``, because of a SIGTERM: drain, save and return then.

        Every process asks before each of its steps, and all get the same answer.
        """
        return stop_at(step, leader=self.local or self.rank == 0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a child is told.

    Attributes:
        payload: the pickled ``(fn, args)``.
        parent: the launcher's process id.
        boards: descriptors, there, of the boards of all processes; empty where the system has none.
        timeout_s: deadline of the waits at the start.
        grace_s: how long SIGTERM leaves; None where it ends the process at once.
    """

    rank: int
    world_size: int
    threads: int
    port: int
    parent: int
    payload: bytes
    boards: tuple[int, ...] = ()
    timeout_s: float = DEFAULT_TIMEOUT_S
    grace_s: float | None = None
    restarts: int = 0
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a child ended.

    Attributes:
        cause: type name of the exception, or the signal.
        time_s: on the monotonic clock, which all processes of a host share.
        secondary: a consequence of some other process's failure.
        died: it ended without a word.
        action: action that failed, where one did.
    """

    rank: int
    cause: str
    message: str
    time_s: float
    remote_traceback: str = ""
    secondary: bool = False
    died: bool = False
    action: str = ""
    stopped: bool = False
    """It did not fail by itself: the launcher found it stopped."""


def child_main(job: Job, conn: Connection) -> None:
    """Entry point of a child: work, tell the result, wait for leave to go."""
    die_with(job.parent)
    _share_boards(job)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what a Ctrl-C means
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    faulthandler.enable()
    sending = threading.Lock()

    def tell(kind: str, content: Any) -> None:
        message = pickle.dumps((kind, content))
        with sending:
            conn.send_bytes(message)

    try:
        _work(job, tell)
    except BaseException as error:
        failure = describe(job.rank, error)
        status.board().fail(failure.message)
        tell("failed", failure)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # tidying up could wait for processes that are about to be ended
    status.board().enter("done")
    try:
        conn.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
    dist.destroy_process_group()


def _work(job: Job, tell: Callable[[str, Any], None]) -> None:
    fn, args = pickle.loads(job.payload)
    torch.set_num_threads(job.threads)
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):  # gloo would listen on the interface of the host's name
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    Watcher(grace_s=job.grace_s).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    timeout = timedelta(seconds=job.timeout_s)
    store = dist.TCPStore(LOOPBACK, job.port, is_master=False, wait_for_workers=False, timeout=timeout)
    join_run(store, job.rank, job.world_size, job.timeout_s)
    status.board().enter("")
    # What torch's import left behind never becomes garbage; looking through it would stall a stage for milliseconds.
    gc.collect()
    gc.freeze()
    context = Context(
        job.rank,
        job.world_size,
        restarts=job.restarts,
        run_id=job.run_id,
        on_report=lambda obj: tell("report", obj),
    )
    tell("done", fn(context, *args))


def _share_boards(job: Job) -> None:
    """Take the board that the launcher made for this process, and open those of the others."""
    for rank, file in enumerate(job.boards):
        found = status.open_board(job.parent, file)
        if found is None:
            continue
        if rank == job.rank:
            found.claim(rank)
            status.use(found)
        else:
            status.peers()[rank] = found
    status.board().enter("start", rank=job.rank)


def join_run(store: Any, rank: int, size: int, timeout_s: float) -> None:
    """Wait until all processes of a run are there, and make the default group, whose waits have ``timeout_s`` seconds.

    Raises:
        MeetingError: some did not come in time.
    """
    bounded = BoundedStore(dist.PrefixStore("paci_rt/start", store), timeout_s)
    boards = Boards(bounded, rank)
    bounded.set(f"here/{rank}", "1")
    keys = {other: f"here/{other}" for other in range(size)}
    patience, own = Patience(timeout_s, boards, "have not started"), status.board()
    own.enter("meeting the other stages", rank=rank)
    while not bounded.check(list(keys.values())):
        patience.check([other for other, key in keys.items() if not bounded.check([key])])
        time.sleep(START_POLL_S)
    patience.over()
    boards.learn(range(size))
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise lost(error, "making the process group", [other for other in range(size) if other != rank]) from error


def describe(rank: int, error: BaseException) -> Failure:
    """What the launcher needs to know about ``error``, in plain strings."""
    chain = _chain(error)
    action = next((link.action for link in chain if isinstance(link, ActionError)), "")
    cause = type(error).__name__
    if isinstance(error, ActionError):
        origin = error.__cause__ or error
        cause = type(error if isinstance(error, PeerLostError | TransferTimeoutError) else origin).__name__
        text = str(error)
    elif isinstance(error, SystemExit):
        text = f"sys.exit({error.code!r}) was called"
    else:
        text = f"{cause}: {error}" if str(error) else cause
    own = status.board().read().name(rank)
    return Failure(
        rank=rank,
        cause=cause,
        message=text if text.startswith((f"{own}:", f"{own},")) else f"{own}: {text}",
        time_s=time.monotonic(),
        remote_traceback="".join(traceback.format_exception(error)),
        secondary=any(_is_consequence(link) for link in chain),
        action=action,
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def _is_consequence(error: BaseException) -> bool:
    if isinstance(error, PeerLostError | TransferTimeoutError | MeetingError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and LOST_PEER_WORDS.search(str(error)) is not None
