"""Reports of all processes in one place: what any of them says under ``torchrun`` arrives in the one of rank 0.

They travel as JSON through the store where the processes meet, by a thread on either side, so that no stage waits.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from paci_rt.launch.child import Context

OnReport = Callable[[dict[str, Any]], None]
POLL_S = 0.1
"""How often rank 0 looks for reports."""
LAST_S = 5.0
"""How long rank 0 waits, after its own work is done, for reports that are still under way."""


@contextmanager
def at_rank_0(ctx: Context, store: dist.Store | None = None) -> Iterator[Context]:
    """``ctx``, whose reports go to rank 0: what is given to ``on_report`` there, and nowhere else.

    Every process of a run under ``torchrun`` enters this; reports are JSON-ready.

    Args:
        ctx: of this process. Where one process has all stages it is returned as it is.
        store: where all processes meet; None is that of the default group.
    """
    if ctx.local or ctx.world_size == 1:
        yield ctx
        return
    prefixed = dist.PrefixStore("paci_rt/reports", store or dist.distributed_c10d._get_default_store())
    end = _Reader(prefixed, ctx.world_size, ctx.report) if ctx.rank == 0 else _Sender(prefixed, ctx.rank)
    try:
        yield ctx.with_reports_to(end.report)
        end.finish(LAST_S)
    finally:
        end.finish(0.0)


class _Sender:
    """The side of the other ranks."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True, name="paci-rt reports")
        self._thread.start()

    def report(self, obj: dict[str, Any]) -> None:
        self._waiting.put(json.dumps(obj))

    def finish(self, patience_s: float) -> None:
        self._waiting.put(None)
        self._thread.join(patience_s)

    def _send(self) -> None:
        number = 0
        try:
            while (text := self._waiting.get()) is not None:
                self._store.set(f"{self._rank}/{number}", text)
                number += 1
            self._store.set(f"{self._rank}/end", str(number))
        except RuntimeError:  # the store is gone, and with it the run
            return


class _Reader:
    """The side of rank 0."""

    def __init__(self, store: dist.Store, size: int, on_report: OnReport) -> None:
        self._store, self._on_report = store, on_report
        self._taken = dict.fromkeys(range(1, size), 0)
        self._until: float | None = None
        self._calling = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True, name="paci-rt reports")
        self._thread.start()

    def report(self, obj: dict[str, Any]) -> None:
        with self._calling:
            self._on_report(obj)

    def finish(self, patience_s: float) -> None:
        self._until = time.monotonic() + patience_s
        self._thread.join(patience_s + 1.0)

    def _read(self) -> None:
        open_ends = set(self._taken)
        try:
            while open_ends:
                for rank in sorted(open_ends):
                    self._take(rank)
                    if self._store.check([f"{rank}/end"]):
                        self._take(rank)
                        open_ends.discard(rank)
                if self._until is not None and time.monotonic() > self._until:
                    return
                time.sleep(POLL_S)
        except RuntimeError:  # the store is gone, and with it the run
            return

    def _take(self, rank: int) -> None:
        while self._store.check([key := f"{rank}/{self._taken[rank]}"]):
            report = json.loads(self._store.get(key))
            self._store.delete_key(key)
            self._taken[rank] += 1
            self.report(report)
