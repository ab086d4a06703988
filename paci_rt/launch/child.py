"""The child's side of :mod:`paci_rt.launch`."""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import gc
import multiprocessing
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

from paci_rt.errors import ActionError, PeerLostError

LOOPBACK = "127.0.0.1"
MEETING_TIMEOUT = timedelta(minutes=30)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

LOST_PEER_WORDS = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|aborted)|broken pipe|closed by peer|remote peer", re.IGNORECASE
)


class Context:
    """What a process of a run knows about itself.

    Attributes:
        rank: 0 … world_size−1; in a pipeline, the stage.
        world_size: number of processes.
        local: True where one process holds all stages; no ``torch.distributed`` then.

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
        on_report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local = local
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a child is told; ``payload`` is the pickled ``(fn, args)``, ``parent`` the launcher's process id."""

    rank: int
    world_size: int
    threads: int
    port: int
    parent: int
    payload: bytes


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


def child_main(job: Job, conn: Connection) -> None:
    """Entry point of a child: work, tell the result, wait for leave to go."""
    _die_with(job.parent)
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
        tell("failed", describe(job.rank, error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # tidying up could wait for processes that are about to be ended
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
    store = dist.TCPStore(LOOPBACK, job.port, is_master=False, wait_for_workers=False, timeout=MEETING_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world_size)
    # What torch's import left behind never becomes garbage; looking through it would stall a stage for milliseconds.
    gc.collect()
    gc.freeze()
    context = Context(job.rank, job.world_size, on_report=lambda obj: tell("report", obj))
    tell("done", fn(context, *args))


def _die_with(parent: int) -> None:
    """End this process when the launcher ends, whatever this process is doing then."""

    def watch() -> None:
        launcher = multiprocessing.parent_process()
        assert launcher is not None
        launcher.join()
        os._exit(1)

    if sys.platform == "linux":  # also ends a child that holds the interpreter lock in a long call
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True, name="paci-rt watch").start()


def describe(rank: int, error: BaseException) -> Failure:
    """What the launcher needs to know about ``error``, in plain strings."""
    chain = _chain(error)
    action = next((link.action for link in chain if isinstance(link, ActionError)), "")
    cause = type(error).__name__
    if isinstance(error, ActionError):
        origin = error.__cause__ or error
        cause = type(error if isinstance(error, PeerLostError) else origin).__name__
        text = str(error)
    elif isinstance(error, SystemExit):
        text = f"sys.exit({error.code!r}) was called"
    else:
        text = f"{cause}: {error}" if str(error) else cause
    return Failure(
        rank=rank,
        cause=cause,
        message=f"stage {rank}: {text}",
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
    if isinstance(error, PeerLostError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and LOST_PEER_WORDS.search(str(error)) is not None
