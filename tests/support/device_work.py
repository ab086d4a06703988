"""What ranks do in tests of the transports for GPUs, and what must hold afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from paci_rt.schedules.channel import Channel
from paci_rt.transport import Message
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from support.device_twin import Machine, TwinHardware
from support.messages import check, message

DOWN, UP = Channel("F", 0, 1), Channel("B", 1, 0)
BACKENDS = ["nccl", "registered", "ipc"]
SHORT = DeviceOptions(timeout_s=1.0)
Work = Callable[[DeviceTransport, TwinHardware], Any]


def one(value: float = 1.0, size: int = 8) -> Message:
    return Message((torch.full((size,), value),), (False,))


def rank_of(transport: DeviceTransport) -> int:
    return transport._rank


def edges(transport: DeviceTransport) -> tuple[Any, Any]:
    """What this rank of two sends on and receives on."""
    return (DOWN, UP) if rank_of(transport) == 0 else (UP, DOWN)


def exchange(count: int, ahead: int, seed: int | None = None) -> Work:
    """Rank 0 sends, rank 1 answers, with ``ahead`` messages on their way, as in a pipeline."""

    def work(transport: DeviceTransport, hardware: TwinHardware) -> dict[str, Any]:
        out, back = edges(transport)
        rng = random.Random(f"{seed} {rank_of(transport)}")
        transport.open([back])
        arrived = []
        for at in range(count + ahead):
            if seed is not None:
                time.sleep(rng.choice((0.0, 0.0, 0.001, 0.003)))
            if rank_of(transport) == 0:
                if at < count:
                    transport.send(out, at, message(at))
                if at >= ahead:
                    arrived.append((1000 + at - ahead, transport.recv(back, at - ahead)))
            elif at < count:
                arrived.append((at, transport.recv(back, at)))
                transport.send(out, at, message(1000 + at))
        transport.flush()
        hardware.synchronize()
        for number, got in arrived:
            check(got, message(number))
        assert transport.held_messages == 0
        return transport.stats()

    return work


def fine(results: list[Any], machine: Machine) -> list[Any]:
    """The results of all ranks, none of which has failed; and nothing is left, and no rule of NCCL was broken."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if machine.nccl is not None:
        assert machine.nccl.misuse == ""
        assert (machine.nccl.alive, machine.nccl.aborts, machine.nccl.registered) == (0, 0, 0)
    machine.transports.clear()
    assert machine.twin.allocated == 0
    assert machine.twin.misuse == ""
    return results


def failing(machine: Machine, work: Work, **options: Any) -> tuple[list[Any], float]:
    start = time.monotonic()
    results = machine.run(work, **options)
    return results, time.monotonic() - start
