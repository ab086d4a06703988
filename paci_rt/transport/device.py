"""What the transports for GPUs share (``nccl``, ``ipc``): channels of the native core's engine for devices
(``csrc/p2p/device_engine.hpp``).

``send`` and ``recv`` are called with torch's current stream being the one that computes. Nothing on the device waits
for the host, and the host waits in ``recv`` only for a message that its sender has not yet issued.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from paci_rt.errors import PeerLostError, ScheduleError, StageError, TransferTimeoutError
from paci_rt.lowering import Channel
from paci_rt.transport import wire
from paci_rt.transport.base import Message
from paci_rt.transport.diagnosis import dump_events, origin_of
from paci_rt.transport.links import channel_name
from paci_rt.transport.pairing import DeviceOptions, Gathering, Hardware, Pairing
from paci_rt.transport.probe import Candidate, Measured

if TYPE_CHECKING:
    from paci_rt.native import DeviceIncoming, DeviceOutgoing


@dataclass(slots=True)
class _Outgoing:
    """Sending end of one channel, what its last message looked like, and the tensors that have not left yet."""

    end: DeviceOutgoing
    metas: wire.Meta | None = None
    held: deque[tuple[int, list[Tensor | None]]] = field(default_factory=deque)
    captured: list[list[Tensor | None]] = field(default_factory=list)

    def let_go(self) -> None:
        done = self.end.completed()
        while self.held and self.held[0][0] <= done:
            self.held.popleft()


class DeviceTransport:
    """Channels between stages on devices. Use :class:`~paci_rt.transport.nccl.NcclTransport` or
    :class:`~paci_rt.transport.ipc.IpcTransport`.

    Args:
        name: what users call it.
        gathering: all processes of the pipeline.
        hardware: the device of this one.
        num_stages, chunks: stages of the pipeline, and of this process.
        candidates: what may move the bytes, in order of preference; where several can, they are measured.
    """

    capacity = None  # messages beyond the slots wait on the host, and their sender goes on

    def __init__(
        self,
        name: str,
        gathering: Gathering,
        hardware: Hardware,
        *,
        num_stages: int,
        chunks: int,
        candidates: Sequence[Candidate],
        options: DeviceOptions,
    ) -> None:
        self.name = name
        self._hardware, self._options, self._rank = hardware, options, gathering.rank
        self._pairing = Pairing(gathering, hardware, ranks=num_stages // chunks, candidates=candidates, options=options)
        self._engine = self._pairing.make_engine()
        self._outgoing: dict[Channel, _Outgoing] = {}
        self._incoming: dict[Channel, DeviceIncoming] = {}
        self._sent: dict[Channel, int] = {}  # messages between stages of this process that nobody has taken
        self._backends: dict[Channel, str] = {}
        self._measured: dict[Channel, list[Measured]] = {}

    # --- connecting ---

    def open(self, incoming: Sequence[Channel]) -> None:
        """Connect these channels and those that answer them, and warm them up; the other sides do so meanwhile."""
        receive = [channel for channel in incoming if channel not in self._incoming]
        within = [channel for channel in receive if self._pairing.within(channel)]
        receive = [channel for channel in receive if channel not in within]
        send = [opposite(channel) for channel in receive if opposite(channel) not in self._outgoing]
        # Both ends of all channels go through them in the same order, so that nobody waits in a circle.
        greetings = {channel: self._pairing.prepare(channel) for channel in sorted([*receive, *send], key=_order)}
        try:
            for channel in within:
                self._connect_within(channel)
            for channel in send:
                self._outgoing[channel] = _Outgoing(
                    self._pairing.add_outgoing(self._engine, channel, greetings[channel])
                )
                self._note(channel, greetings[channel])
            for channel in receive:
                self._incoming[channel], greeting = self._pairing.add_incoming(self._engine, channel)
                self._note(channel, greeting)
            self._engine.connect()
        except (TransferTimeoutError, PeerLostError) as error:
            self._explain(error)

    def _connect_within(self, channel: Channel) -> None:
        greeting = self._pairing.greeting_within()
        here, there = socket.socketpair()
        lanes = [self._pairing.lane(channel, link.detach(), greeting) for link in (here, there)]
        self._outgoing[channel] = _Outgoing(self._engine.add_outgoing(**lanes[0]))
        self._incoming[channel] = self._engine.add_incoming(**lanes[1])
        self._sent[channel] = 0
        self._note(channel, greeting)

    def _note(self, channel: Channel, greeting: dict[str, Any]) -> None:
        registered = " (registered buffers)" if greeting["register"] else ""
        self._backends[channel] = greeting["backend"] + registered
        if greeting["measured"]:
            self._measured[channel] = [Measured(*one) for one in greeting["measured"]]

    # --- messages ---

    def send(self, channel: Channel, index: int, message: Message) -> None:
        """Start sending and return at once. The tensors are kept until they have left; a message that finds no free
        slot waits in the transport."""
        outgoing = self._sender(channel)
        metas = wire.describe(message)
        packed = None if metas == outgoing.metas else wire.pack_metas(metas)
        tensors = [None if tensor is None else self._plain(tensor) for tensor in message.tensors]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        where = self._hardware.index, self._hardware.stream()
        try:
            if self._hardware.capturing():
                outgoing.end.capture(index, wire.pack_metas(metas), addresses, *where)
                outgoing.captured.append(tensors)  # or the graph's allocator would give their memory away
                return
            outgoing.held.append((outgoing.end.send_on(index, packed, addresses, *where), tensors))
            outgoing.metas = metas
            if channel in self._sent:
                self._sent[channel] += 1
            outgoing.let_go()
        except (TransferTimeoutError, PeerLostError) as error:
            self._explain(error)

    def ready(self, channel: Channel) -> bool:
        return self._sent.get(channel, 1) > 0

    def has_room(self, channel: Channel) -> bool:
        return True

    def recv(self, channel: Channel, index: int) -> Message:
        """The next message, in memory of the current stream, on which work that follows finds it there."""
        incoming = self._receiver(channel)
        where = self._hardware.index, self._hardware.stream()
        try:
            if self._hardware.capturing():
                return self._capture_recv(channel, incoming, index, where)
            arrived = incoming.take(index, *where)
            metas = _metas(arrived.packed)
            tensors = [self._hardware.empty(meta) if meta.present else None for meta in metas]
            arrived.unpack([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
            if channel in self._sent:
                self._sent[channel] -= 1
            for outgoing in self._outgoing.values():
                if outgoing.held:
                    outgoing.let_go()
        except (TransferTimeoutError, PeerLostError) as error:
            self._explain(error)
        return Message(tuple(tensors), tuple(meta.requires_grad for meta in metas))

    def _capture_recv(self, channel: Channel, incoming: DeviceIncoming, index: int, where: tuple[int, int]) -> Message:
        """A receive within a CUDA graph, of a message that looks like the last one before it."""
        if incoming.packed is None:
            raise StageError(
                f"channel {channel_name(channel)} has carried no message yet, so what a CUDA graph would receive is "
                "not known: run a step or two before recording"
            )
        metas = _metas(incoming.packed)
        tensors = [self._hardware.empty(meta) if meta.present else None for meta in metas]
        incoming.capture(index, [0 if tensor is None else tensor.data_ptr() for tensor in tensors], *where)
        return Message(tuple(tensors), tuple(meta.requires_grad for meta in metas))

    def flush(self) -> None:
        """Wait until every message sent so far has left this process. While a CUDA graph is recorded: make the current
        stream wait for the sends recorded so far, which every recording has to end with."""
        try:
            for outgoing in self._outgoing.values():
                if self._hardware.capturing():
                    outgoing.end.join_captured(self._hardware.index, self._hardware.stream())
                    outgoing.captured.clear()
                else:
                    outgoing.end.flush()
                    outgoing.held.clear()
        except (TransferTimeoutError, PeerLostError) as error:
            self._explain(error)

    def fail(self, error: BaseException) -> None:
        """Tell the neighbours that this process goes no further: their waits end with ``error``'s first line."""
        self._engine.fail(origin_of(error, self._rank))

    def close(self) -> None:
        self._engine.close()
        self._pairing.close()
        self._outgoing.clear()
        self._incoming.clear()

    @property
    def held_messages(self) -> int:
        """Messages sent whose tensors are kept, because they may not have left."""
        return sum(len(outgoing.held) for outgoing in self._outgoing.values())

    def stats(self) -> dict[str, Any]:
        """What moves the bytes of each channel, why, and what it takes: ``backends`` by edge, ``measured`` by edge (one
        entry a candidate: ``name small_us large_us error``), ``ring_bytes`` of device memory, ``nccl`` (path and
        version)."""
        nccl = self._hardware.nccl
        return {
            "backends": {channel_name(channel): backend for channel, backend in self._backends.items()},
            "measured": {
                channel_name(channel): [one._asdict() for one in all_] for channel, all_ in self._measured.items()
            },
            "ring_bytes": sum(end.ring_bytes for end in self._incoming.values()),
            "nccl": None if nccl is None else {"path": nccl.path, "version": nccl.version_text},
        }

    # --- inside ---

    def _sender(self, channel: Channel) -> _Outgoing:
        outgoing = self._outgoing.get(channel)
        if outgoing is None:
            raise ScheduleError(f"channel {channel_name(channel)} was not opened on the side that sends")
        return outgoing

    def _receiver(self, channel: Channel) -> DeviceIncoming:
        incoming = self._incoming.get(channel)
        if incoming is None:
            raise ScheduleError(f"channel {channel_name(channel)} was not opened on the side that receives")
        return incoming

    def _plain(self, tensor: Tensor) -> Tensor:
        """``tensor`` as bytes in a row; itself, but for rare exceptions."""
        self._hardware.check(tensor)
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        return tensor if tensor.is_contiguous() else tensor.contiguous()

    def _explain(self, error: TransferTimeoutError | PeerLostError) -> NoReturn:
        """Raise ``error`` again, with the file that has what came before."""
        ends = [*(outgoing.end for outgoing in self._outgoing.values()), *self._incoming.values()]
        written = dump_events(self.name, self._rank, error, [end.json() for end in ends], self._options.events_dir)
        text = f"{error}. Last events of this process's channels: {written}"
        if isinstance(error, PeerLostError):
            raise PeerLostError(error.action, text, error.origin) from None
        raise TransferTimeoutError(error.action, text) from None


def opposite(channel: Channel) -> Channel:
    """The channel that answers: gradients to activations, tied weights to their gradients."""
    kind, sender, receiver = channel
    answers = {"F": "B", "B": "F"}.get(kind) or kind[0] + ("W" if kind[1] == "G" else "G") + kind[2:]
    return answers, receiver, sender


@lru_cache(maxsize=64)  # messages of a channel look alike
def _metas(packed: bytes) -> wire.Meta:
    return wire.unpack_metas(packed)


def _order(channel: Channel) -> tuple[int, int, str]:
    kind, sender, receiver = channel
    return min(sender, receiver), max(sender, receiver), kind
