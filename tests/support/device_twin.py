"""Transports for devices on the host twin: ranks are threads of this process, tensors lie in its memory, and a stream
is a worker thread of the twin."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paci_rt import native
from paci_rt.transport import wire
from paci_rt.transport.device.backends import Candidate
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.nccl import NCCL, REGISTERED
from support.deadlines import deadline

IPC = Candidate("ipc")
CANDIDATES = {"nccl": (NCCL,), "registered": (REGISTERED,), "ipc": (IPC,), "measured": (NCCL, REGISTERED, IPC)}


class Gathering:
    """One rank's side of a meeting of threads."""

    def __init__(self, rank: int, size: int, board: dict[str, Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def exchange(self, topic: str, value: Any) -> list[Any]:
        self._board[f"{topic}/{self.rank}"] = json.dumps(value)
        self._barrier.wait(deadline(60))
        return [json.loads(self._board[f"{topic}/{rank}"]) for rank in range(self.size)]


class TwinHardware:
    """A device of a twin, with a stream that computes."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine = machine
        self.ops, self.nccl = machine.twin, machine.nccl
        self.index, self.identity = rank, f"twin device {machine.device_of(rank)}"
        self.compute = native.core().Stream(rank, ops=self.ops)
        self.recording = False
        self._kept: list[Tensor] = []

    def stream(self) -> int:
        return int(self.compute.handle)

    def capturing(self) -> bool:
        return self.recording

    def record(self, on: bool) -> None:
        self.recording = on
        self.ops.capture(self.index, self.compute, on)

    def empty(self, meta: wire.TensorMeta) -> Tensor:
        # A caching allocator may take memory back while work on it is queued; this process's must not.
        self._kept.append(torch.empty(meta.shape, dtype=meta.dtype))
        return self._kept[-1]

    def check(self, tensor: Tensor) -> None:
        pass

    def launch(self, work: Callable[[], object]) -> None:
        self.ops.launch(self.index, self.compute, work)

    def synchronize(self) -> None:
        self.compute.synchronize()


class Machine:
    """A twin with a fake NCCL, for ``ranks`` threads.

    Args:
        shared: all ranks are on one device.
    """

    def __init__(
        self, ranks: int, *, max_delay_us: int = 0, seed: int = 0, shared: bool = False, nccl: Any = True
    ) -> None:
        self.ranks, self._shared = ranks, shared
        self.twin = native.testing().HostTwin(max_delay_us, seed)
        version = 23203 if nccl is True else nccl
        self.nccl = native.testing().FakeNccl(self.twin, version) if nccl else None
        self.transports: list[DeviceTransport | None] = [None] * ranks

    def device_of(self, rank: int) -> int:
        return 0 if self._shared else rank

    def run(
        self,
        work: Callable[[DeviceTransport, TwinHardware], Any],
        *,
        backend: str = "nccl",
        chunks: int = 1,
        options: DeviceOptions | None = None,
        slow_ranks: Sequence[int] = (),
    ) -> list[Any]:
        """Call ``work(transport, hardware)`` for every rank in a thread of its own; the results, or what was raised."""
        board: dict[str, Any] = {}
        barrier = threading.Barrier(self.ranks)
        results: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            hardware = TwinHardware(self, rank)
            try:
                transport = DeviceTransport(
                    backend,
                    Gathering(rank, self.ranks, board, barrier),
                    hardware,
                    candidates=CANDIDATES[backend],
                    options=options or DeviceOptions(timeout_s=deadline(20.0)),
                )
                self.transports[rank] = transport
                try:
                    results[rank] = work(transport, hardware)
                except BaseException as error:
                    transport.fail(error)
                    raise
                finally:
                    transport.close()
                    hardware.synchronize()
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(deadline(120))
        assert not any(thread.is_alive() for thread in threads), "a rank hangs"
        return results
