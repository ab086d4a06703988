"""Ways to move bytes between neighbouring processes: this runtime's transports, and ``torch.distributed`` as rivals."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt.schedules.channel import Channel
from paci_rt.transport import make_transport
from paci_rt.transport.base import Message

AHEAD = 2
"""Messages under way in each direction of a link, one that arrives and one that leaves, where channels hold as many."""


@dataclass(frozen=True, kw_only=True)
class WireKind:
    """A way to move bytes.

    Attributes:
        name: stands in tables.
        device: "cpu" or "cuda", where the bytes lie.
        rival: True for what does not belong to this project.
        backend: of the process group, for rivals.
        batched: rivals only: ``batch_isend_irecv`` instead of ``isend`` and ``irecv``.
    """

    name: str
    device: str
    rival: bool = False
    backend: str = ""
    batched: bool = False


_OURS = (("shm", "cpu"), ("gloo", "cpu"), ("nccl", "cuda"), ("ipc", "cuda"))
_RIVALS = (("gloo", "cpu", False), ("gloo", "cpu", True), ("nccl", "cuda", False), ("nccl", "cuda", True))
TRANSPORTS = tuple(name for name, _ in _OURS)
WIRES = {name: WireKind(name=name, device=device) for name, device in _OURS}
WIRES |= {
    wire.name: wire
    for wire in (
        WireKind(
            name=f"torch-{backend}-{'batch' if batched else 'isend'}",
            device=device,
            rival=True,
            backend=backend,
            batched=batched,
        )
        for backend, device, batched in _RIVALS
    )
}


class Wire(Protocol):
    """One process's end of its links.

    ``ahead`` exchanges may be begun before one of them has to be finished.
    """

    ahead: int

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> None:
        """Start an exchange: a uint8 tensor to each of some ranks, and from each of some ranks so many bytes.

        The tensors must not change until the exchange is finished.
        """

    def finish(self) -> dict[int, Tensor]:
        """Complete the oldest exchange: what came, by rank; to be read before the next ``begin``."""

    def flush(self) -> None:
        """Wait until everything sent has left this process."""

    def close(self) -> None: ...


def neighbours(rank: int, processes: int) -> list[int]:
    """Ranks beside ``rank`` in a chain, as in a pipeline."""
    return [other for other in (rank - 1, rank + 1) if 0 <= other < processes]


class TransportWire:
    """A transport of this runtime: activations go up the ranks, gradients down."""

    def __init__(self, kind: WireKind, rank: int, processes: int) -> None:
        self._rank = rank
        where = {"device": torch.device("cuda", torch.cuda.current_device())} if kind.device == "cuda" else {}
        self._transport = make_transport(kind.name, num_stages=processes, **where)
        try:
            self._transport.open([_channel(peer, rank) for peer in neighbours(rank, processes)])
        except BaseException:
            self._transport.close()
            raise
        capacity = self._transport.capacity
        self.ahead = AHEAD if capacity is None else min(AHEAD, capacity)
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._begun: deque[tuple[int, ...]] = deque()

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> None:
        for peer, tensor in outgoing.items():
            self._transport.send(_channel(self._rank, peer), self._sent[peer], Message((tensor,), (False,)))
            self._sent[peer] += 1
        self._begun.append(tuple(incoming))

    def finish(self) -> dict[int, Tensor]:
        found = {}
        for peer in self._begun.popleft():
            (tensor,) = self._transport.recv(_channel(peer, self._rank), self._received[peer]).tensors
            assert tensor is not None
            found[peer] = tensor
            self._received[peer] += 1
        return found

    def flush(self) -> None:
        self._transport.flush()

    def close(self) -> None:
        self._transport.close()


def _channel(sender: int, receiver: int) -> Channel:
    return Channel("F" if sender < receiver else "B", sender, receiver)


class TorchWire:
    """``torch.distributed`` as its users write it, with every receive posted when its exchange begins.

    Args:
        group: of all processes.
        batched: with ``batch_isend_irecv``, one call an exchange.
        device: where received bytes go.

    NCCL runs what is not batched in the order in which a pair of ranks issued it, so both ends of a link must issue
    it in the same order; gloo takes any, and does best when receives come first.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, batched: bool, device: torch.device) -> None:
        self._group, self._batched, self._device = group, batched, device
        self._rank = dist.get_rank()
        self.ahead = AHEAD
        self._free: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self._begun: deque[tuple[list[Any], dict[int, Tensor]]] = deque()

    def begin(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, int]) -> None:
        buffers = {peer: self._buffer(peer, nbytes) for peer, nbytes in incoming.items()}
        calls = list(self._calls(outgoing, buffers))
        if self._batched:
            operations = [dist.P2POp(call, tensor, peer, group=self._group) for call, tensor, peer in calls]
            works = dist.batch_isend_irecv(operations) if operations else []
        else:
            works = [call(tensor, peer, group=self._group) for call, tensor, peer in calls]
        self._begun.append((works, buffers))

    def _calls(
        self, outgoing: Mapping[int, Tensor], buffers: Mapping[int, Tensor]
    ) -> Iterable[tuple[Any, Tensor, int]]:
        ordered = self._device.type == "cuda"
        for peer in sorted(outgoing.keys() | buffers.keys()):
            both = [(dist.irecv, buffers), (dist.isend, outgoing)]
            if ordered and self._rank < peer:
                both.reverse()
            yield from ((call, tensors[peer], peer) for call, tensors in both if peer in tensors)

    def finish(self) -> dict[int, Tensor]:
        works, buffers = self._begun.popleft()
        for work in works:
            work.wait()
        for peer, buffer in buffers.items():
            self._free[peer, buffer.numel()].append(buffer)
        return buffers

    def _buffer(self, peer: int, nbytes: int) -> Tensor:
        free = self._free[peer, nbytes]
        return free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def flush(self) -> None:
        """An exchange that is finished has also sent."""

    def close(self) -> None:
        self._free.clear()


def make_wire(kind: WireKind, rank: int, processes: int, nccl_group: dist.ProcessGroup | None) -> Wire:
    """This process's end of ``kind``; all processes call it in the same order.

    Raises:
        ValueError, PaciError: it does not work here; the message says why, and what to do.
    """
    if not kind.rival:
        return TransportWire(kind, rank, processes)
    device = torch.device(kind.device, torch.cuda.current_device() if kind.device == "cuda" else None)
    group = nccl_group if kind.backend == "nccl" else None
    return TorchWire(group, batched=kind.batched, device=device)
