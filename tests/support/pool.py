"""Worker processes that live as long as the test session, since importing torch costs seconds.

``WorkerPool(n).run(fn, size, *args)`` calls ``fn(rank, group, *args)`` on ranks ``0 ... size-1`` at once and returns
their results; an exception on any rank is raised here. The group is made for the call, so nothing that a test left
behind reaches the next: a message that nobody took, or one pipeline more on one rank than on another.
"""

from __future__ import annotations

import gc
import itertools
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from support.deadlines import deadline
from support.processes import processes


def _work(rank: int, size: int, port: int, inbox: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    for call in itertools.count(1):
        fn, count, args = inbox.recv()
        _end_groups()  # now that no process is in the call before
        # Groups are named by a counter of each process, and a test may have made some on a few ranks only.
        dist.distributed_c10d._world.group_count = 1000 * call
        group = dist.new_group(list(range(count)), backend="gloo")  # all ranks have to call this
        if rank >= count:
            continue
        try:
            result = (True, fn(rank, group, *args))
        except Exception:
            result = (False, traceback.format_exc())
        inbox.send(result)
        if call % 8 == 0:
            gc.collect()  # pipelines are circles, and each has a group with threads
        if call == 1:
            gc.freeze()  # what was imported: looking through it takes most of the time


def _end_groups() -> None:
    """End all groups but the first: each has threads that wake up a hundred times a second."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


class WorkerPool:
    def __init__(self, size: int) -> None:
        self._size = size
        self._start()

    def _start(self) -> None:
        context = processes()
        with socket.create_server(("127.0.0.1", 0)) as free:  # a store in a file would obey limits that tests set
            port = free.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(self._size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self._size, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((fn, size, args))
        results: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + deadline(300)
        while len(results) < size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes[:size]) if rank not in results]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.close()
                    self._start()
                    raise AssertionError(f"the process of rank {rank} ended in the middle of a test") from None
                if not results[rank][0]:  # others may wait for this one in vain
                    end = min(end, time.monotonic() + deadline(5))
        if len(results) < size:  # they cannot be used any more
            self.close()
            self._start()
        for rank, (fine, value) in sorted(results.items()):
            if not fine:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        assert len(results) == size, f"ranks {sorted(set(range(size)) - results.keys())} hang"
        return [results[rank][1] for rank in range(size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # an orderly end of the groups takes seconds and proves nothing
            process.join(timeout=deadline(10))
