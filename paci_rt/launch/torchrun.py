"""This process as one of several that ``torchrun``, or a launcher that speaks like it, has started."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paci_rt import status
from paci_rt.errors import PaciError, TransportError
from paci_rt.launch.attempt import attempt_store
from paci_rt.launch.blame import Seen
from paci_rt.launch.child import Context, describe, join_run
from paci_rt.launch.child_death import die_with
from paci_rt.launch.dumps import write_dump
from paci_rt.launch.interface import take_interface
from paci_rt.launch.watch import Remote, Watcher
from paci_rt.transport import DEFAULT_TIMEOUT_S
from paci_rt.transport.base import check_timeout
from paci_rt.transport.collective import barrier, gather
from paci_rt.transport.patience import BoundedStore, siblings

OnReport = Callable[[dict[str, Any]], None]
SAY_S = 2.0


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
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    threads: int = 1,
    on_report: OnReport | None = None,
    transfer_timeout_s: float = DEFAULT_TIMEOUT_S,
    grace_s: float | None = None,
    dumps: str | os.PathLike[str] | None = None,
) -> list[Any] | None:
    """Call ``fn(ctx, *args)`` in this process, which ``torchrun`` started as one of several.

    Reports go to ``on_report`` of the process that makes them. The process ends when the one that started it does.

    Args:
        fn, args: as for :func:`run`; only the results travel, by pickle.
        threads: that this process computes on.
        on_report: called with every object that this process gives to ``ctx.report``.
        transfer_timeout_s, grace_s, dumps: as for :func:`run`.

    Returns:
        The results by rank on rank 0, None on the others.

    Raises:
        MeetingError: another process did not come in time.
        PaciError, Exception: what ``fn`` raises.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from paci_rt import launch
        >>> names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        >>> with mock.patch.dict(os.environ, names):  # as torchrun sets them, with a port
        ...     launch.run_under_torchrun(getattr, ("world_size",))
        [1]
    """
    check_timeout(transfer_timeout_s, "transfer_timeout_s")
    torch.set_num_threads(threads)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
    own, rank = status.board(), int(os.environ["RANK"])
    own.enter("start", rank=rank)
    watcher: Watcher | None = None
    try:
        store, rank, size = _store(transfer_timeout_s)
        run_id = _run_id(store)
        if run_id:
            store = attempt_store(store, rank, size, transfer_timeout_s)
        # Beats go through a connection of their own: the other one may wait for an answer.
        remote = Remote(BoundedStore(store.clone(), transfer_timeout_s), rank) if _several_hosts(size) else None
        watcher = Watcher(grace_s=grace_s, remote=remote)
        watcher.start()
        take_interface(store, rank, size, transfer_timeout_s)
        join_run(store, rank, size, transfer_timeout_s)
        own.enter("")
        context = Context(rank, size, restarts=_restarts(), run_id=run_id, on_report=on_report)
        result = fn(context, *args)
        what = "have not come to the end of the run"
        results = gather(result, None, transfer_timeout_s, kind="results", what=what)
        own.enter("done")
        barrier(None, transfer_timeout_s, kind="end", what=what)
        dist.destroy_process_group()
        return results if rank == 0 else None
    except BaseException as error:
        own.fail(describe(rank, error).message)
        _last_words(rank, error, dumps)
        raise
    finally:
        if watcher is not None:
            watcher.stop()


def _store(timeout_s: float) -> tuple[Any, int, int]:
    """The store where the processes of this run meet, and this one's rank among how many."""
    least = timedelta(seconds=max(timeout_s, 1.0))
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=least)))
        return store, rank, size
    except (RuntimeError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TransportError(
            f"rank {os.environ['RANK']} did not reach {address}, where the processes of this run meet "
            f"({str(error).splitlines()[0]}): look at MASTER_ADDR, MASTER_PORT and the link"
        ) from error


def _several_hosts(size: int) -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", size)) < size


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _run_id(store: Any) -> str:
    """The same for all processes and after a restart: torchrun's store lives as long as torchrun does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    root = store
    while isinstance(root, dist.PrefixStore):
        root = root.underlying_store
    return BoundedStore(root, DEFAULT_TIMEOUT_S).first("paci_rt/run_id", secrets.token_hex(8))


def _last_words(rank: int, error: BaseException, dumps: str | os.PathLike[str] | None) -> None:
    """Write what the processes did last, tell torchrun the error, and end whoever is stopped and cannot end itself."""
    seen = {rank: Seen.of(status.board())} | {other: Seen.of(board) for other, board in status.peers().items()}
    if dumps is not None and isinstance(error, Exception) and not isinstance(error, ValueError):
        write_dump(Path(dumps), seen, describe(rank, error).message, name=f"failure-rank{rank}.json")
    if "TORCHELASTIC_ERROR_FILE" in os.environ and isinstance(error, Exception):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        with suppress(OSError):
            get_error_handler().record_exception(error)
    if "TORCHELASTIC_RUN_ID" not in os.environ or not isinstance(error, PaciError):
        return
    for other, pid in siblings().items():
        # torchrun would wait half a minute for a process that hears nothing.
        if other != rank and status.process_state(pid) in status.STOPPED:
            print(f"paci-rt: ending stage {other} (process {pid}), which is stopped", file=sys.stderr, flush=True)
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def first_to_say(line: str) -> bool:
    """Whether no other process that torchrun has started has said ``line``; True where that cannot be known."""
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SAY_S),
        )
        key = f"paci_rt/said/{_restarts()}/{hashlib.sha256(line.encode()).hexdigest()}"
        return BoundedStore(store, SAY_S).first(key, os.environ["RANK"]) == os.environ["RANK"]
    except (KeyError, ValueError, RuntimeError):
        return True
