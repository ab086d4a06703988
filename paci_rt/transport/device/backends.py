"""Ways to move bytes between two devices: which can work, and which was measured to be the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from paci_rt.errors import TransportError
from paci_rt.schedules.channel import Channel

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
        """Why it cannot work between two processes, and the remedy; empty where it can.

        Args:
            sender, receiver: what the two have told: ``host process device nccl shares_gpus``.
        """
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


NCCL = Candidate("nccl", nccl=True)
REGISTERED = Candidate("nccl", nccl=True, register=True)
IPC = Candidate("ipc")


class Measured(NamedTuple):
    """Microseconds per message of 16 KiB and of 4 MiB in a row; None where it failed, and why."""

    name: str
    small_us: float | None
    large_us: float | None
    error: str = ""


def choose(possible: Sequence[Candidate], measured: Sequence[Measured], channel: Channel) -> Candidate:
    """The candidate that takes the least for a small plus a large message; the first where nothing was measured.

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
        raise TransportError(f"channel {channel.name}: nothing moves bytes between the two devices ({tried})")
    best = min(times, key=times.__getitem__)
    return next(one for one in possible if one.name == best)
