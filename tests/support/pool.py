"""Worker processes that live as long as the test session, since importing torch costs seconds.

``WorkerPool(n).run(fn, size, *args)`` calls ``fn(rank, group, *args)`` on ranks ``0 ... size-1`` at once and returns
their results; an exception on any rank is raised here.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.deadlines import deadline
from support.processes import processes


def _work(rank: int, size: int, store: str, inbox: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {count: dist.new_group(list(range(count)), backend="gloo") for count in range(2, size + 1)}
    while True:
        fn, count, args = inbox.recv()
        try:
            result = (True, fn(rank, groups[count], *args))
        except Exception:
            result = (False, traceback.format_exc())
        inbox.send(result)


class WorkerPool:
    def __init__(self, size: int) -> None:
        context = processes()
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        for pipe in self._pipes[:size]:
            pipe.send((fn, size, args))
        end = time.monotonic() + deadline(300)
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(max(0.0, end - time.monotonic())), f"rank {rank} hangs"
        results = [pipe.recv() for pipe in self._pipes[:size]]
        for rank, (fine, value) in enumerate(results):
            if not fine:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        return [value for _, value in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # an orderly end of the groups takes seconds and proves nothing
            process.join(timeout=deadline(10))
        self._folder.cleanup()
