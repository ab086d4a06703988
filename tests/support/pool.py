"""Worker processes that live as long as the test session, since importing torch costs seconds.

``WorkerPool(n).run(fn, size, *args)`` calls ``fn(rank, group, *args)`` on ranks ``0 ... size-1`` at once and returns
their results; an exception on any rank is raised here.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.deadlines import deadline


def _work(rank: int, size: int, store: str, inbox: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {count: dist.new_group(list(range(count)), backend="gloo") for count in range(2, size + 1)}
    while (job := inbox.recv()) is not None:
        fn, count, args = job
        try:
            result = (True, fn(rank, groups[count], *args))
        except Exception:
            result = (False, traceback.format_exc())
        inbox.send(result)
    dist.destroy_process_group()


class WorkerPool:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
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
        results = [pipe.recv() for pipe in self._pipes[:size]]
        for rank, (fine, value) in enumerate(results):
            if not fine:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        return [value for _, value in results]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=deadline(10))
            process.kill()
        self._folder.cleanup()
