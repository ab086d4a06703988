"""What GPUs, NCCL and CUDA IPC a process has for its transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from paci_rt.errors import PaciError
from paci_rt.transport import wire
from paci_rt.transport.rendezvous import raise_first


class Hardware(Protocol):
    """The device that a process's stages are on; see ``paci_rt.transport.device.gpu.CudaHardware``."""

    ops: Any  # None is CUDA
    index: int
    identity: str  # tells devices of all hosts apart
    nccl: Any  # the library, None where there is none

    def stream(self) -> int: ...
    def capturing(self) -> bool: ...
    def empty(self, meta: wire.TensorMeta) -> Tensor: ...
    def check(self, tensor: Tensor) -> None: ...


class Gathering(Protocol):
    """How processes tell each other values at start-up; see :class:`paci_rt.transport.rendezvous.Meeting`."""

    rank: int
    size: int

    def exchange(self, topic: str, value: Any) -> list[Any]: ...


def find_hardware(gathering: Gathering, make: Callable[[], Hardware]) -> Hardware:
    """What ``make`` finds here. What it raises on one rank is raised on all, so that no rank waits for another in vain.

    Raises:
        PaciError: what ``make`` raises here.
        TransportError: what it raises elsewhere.
    """
    found, refusal = None, None
    try:
        found = make()
    except PaciError as error:
        refusal = error
    told = gathering.exchange("usable", "" if refusal is None else str(refusal))
    if refusal is not None:
        raise refusal
    raise_first(told)
    assert found is not None
    return found
