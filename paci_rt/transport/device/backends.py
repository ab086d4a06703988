"""Which of several ways to move bytes between two devices is the faster one: measured at start-up, on the channel's own
pair of devices, not looked up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from paci_rt.errors import TransportError
from paci_rt.schedules.lowering import Channel
from paci_rt.transport import wire
from paci_rt.transport.device.sockets import channel_name

if TYPE_CHECKING:
    from paci_rt.transport.device.hardware import Hardware

SMALL_BYTES, LARGE_BYTES = 16 << 10, 4 << 20
WARM_UP, MESSAGES = 3, 20
MULTI_RANK_NCCL = 23000


@dataclass(frozen=True)
class Candidate:
    """A way to move bytes: the native core's name for it, and whether its buffers are registered with NCCL."""

    backend: str
    nccl: bool = False
    register: bool = False

    @property
    def name(self) -> str:
        return self.backend + (" registered" if self.register else "")

    def obstacle(self, sender: dict[str, Any], receiver: dict[str, Any]) -> str:
        """Why it cannot work between two processes, and the remedy; empty where it can. ``sender`` and ``receiver`` are
        what they have told: ``host process device nccl shares_gpus``."""
        if not self.nccl:
            if sender["host"] != receiver["host"]:
                return "CUDA's handles for other processes work within one host: use transport nccl"
            return ""
        if not (sender["nccl"] and receiver["nccl"]):
            return "one of the two processes has no NCCL: pip install nvidia-nccl-cu12 or -cu13"
        if self.register and min(sender["nccl"], receiver["nccl"]) < 22300:
            return "NCCL registers buffers of sends and receives from 2.23 on"
        if sender["device"] == receiver["device"]:
            return self._shared_gpu(sender, receiver)
        return ""

    def _shared_gpu(self, sender: dict[str, Any], receiver: dict[str, Any]) -> str:
        both = f"both processes are on one GPU ({sender['device']}), "
        ways = "give each process a GPU of its own (LOCAL_RANK), use transport ipc, or all stages in one process"
        if min(sender["nccl"], receiver["nccl"]) < MULTI_RANK_NCCL:
            return both + "which NCCL allows from 2.30 on: " + ways
        if not (sender["shares_gpus"] and receiver["shares_gpus"]):
            return (
                both
                + "which NCCL allows with NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment of all of them (and without "
                "NVIDIA's multi-process service their kernels take turns, which is slow): set it, or " + ways
            )
        return ""


class Measured(NamedTuple):
    """Microseconds a message of 16 KiB and of 4 MiB, sent one behind the other; None where it failed, and why."""

    name: str
    small_us: float | None
    large_us: float | None
    error: str = ""


def choose(possible: Sequence[Candidate], measured: Sequence[Measured], channel: Channel) -> Candidate:
    """The candidate that takes least for a small and a large message together; the first where nothing was measured.

    Raises:
        TransportError: none of them worked.
    """
    if not measured:
        return possible[0]
    times = {
        one.name: one.small_us + one.large_us
        for one in measured
        if one.small_us is not None and one.large_us is not None
    }
    if not times:
        tried = "; ".join(f"{one.name}: {one.error}" for one in measured)
        raise TransportError(f"channel {channel_name(channel)}: nothing moves bytes between the two devices ({tried})")
    best = min(times, key=times.__getitem__)
    return next(one for one in possible if one.name == best)


def send_probe(candidate: Candidate, end: Any, hardware: Hardware) -> Measured:
    """Send both sizes and time them; the other side calls :func:`receive_probe`."""
    index, times = 0, []
    for size in (SMALL_BYTES, LARGE_BYTES):
        meta = _meta(size)
        tensor, packed = hardware.empty(meta), wire.pack_metas((meta,))
        for count in (WARM_UP, MESSAGES):
            start = time.perf_counter()
            for _ in range(count):
                end.send_on(index, packed, [tensor.data_ptr()], hardware.index, hardware.stream())
                index += 1
            end.flush()
            took_us = (time.perf_counter() - start) / count * 1e6
        times.append(round(took_us, 1))
    return Measured(candidate.name, times[0], times[1])


def receive_probe(candidate: Candidate, end: Any, hardware: Hardware) -> Measured:
    """The other side of :func:`send_probe`; what it returns says that it worked."""
    index = 0
    for size in (SMALL_BYTES, LARGE_BYTES):
        tensor = hardware.empty(_meta(size))
        for _ in range(WARM_UP + MESSAGES):
            end.take(index, hardware.index, hardware.stream()).unpack([tensor.data_ptr()])
            index += 1
    return Measured(candidate.name, None, None)


def _meta(size_bytes: int) -> wire.TensorMeta:
    return wire.TensorMeta(torch.uint8, (size_bytes,), True, False)
