"""What the transports for GPUs share: channels of the native core's engine for devices.

The engine is ``csrc/p2p/device_engine.hpp``.

``send`` and ``recv`` are called with torch's current stream being the one that computes. Nothing on the device waits
for the host, and the host waits in ``recv`` only for a message that its sender has not yet issued.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paci_rt.errors import PeerLostError, ScheduleError, StageError, TransferTimeoutError
from paci_rt.schedules import Placement
from paci_rt.schedules.channel import Channel
from paci_rt.transport import wire
from paci_rt.transport.base import Message
from paci_rt.transport.device.backends import Candidate, Measured
from paci_rt.transport.device.hardware import Gathering, Hardware
from paci_rt.transport.device.pairing import DeviceOptions, Pairing
from paci_rt.transport.diagnosis import origin_of
from paci_rt.transport.native_channels import NativeTransport, Outgoing
from paci_rt.transport.packing import unpacked
from paci_rt.transport.structure import Structure

if TYPE_CHECKING:
    from paci_rt.native import DeviceIncoming


class DeviceTransport(NativeTransport):
    """Channels between stages on devices; base class of ``NcclTransport`` and ``IpcTransport``.

    Args:
        name: what users call it.
        gathering: all processes of the pipeline.
        hardware: the device of this one.
        candidates: what may move the bytes, in order of preference; where several can, they are measured.
        places: which stages are where; None is one a process.
    """

    capacity = None  # messages beyond the slots wait on the host, and their sender goes on
    _incoming: dict[Channel, DeviceIncoming]

    def __init__(
        self,
        name: str,
        gathering: Gathering,
        hardware: Hardware,
        *,
        candidates: Sequence[Candidate],
        options: DeviceOptions,
        places: Placement | None = None,
    ) -> None:
        super().__init__(gathering.rank, options.events_dir)
        self.name, self.places = name, places
        self._hardware = hardware
        self._pairing = Pairing(gathering, hardware, candidates=candidates, options=options, places=places)
        self._engine = self._pairing.make_engine()
        self._sent: dict[Channel, int] = {}  # messages between stages of this process that have not been taken
        self._backends: dict[Channel, str] = {}
        self._measured: dict[Channel, list[Measured]] = {}

    # --- connecting ---

    def open(self, incoming: Sequence[Channel]) -> None:
        """Connect these channels and those that answer them, and warm them up; the other sides do so meanwhile."""
        receive = [channel for channel in incoming if channel not in self._incoming]
        within = [channel for channel in receive if self._pairing.within(channel)]
        receive = [channel for channel in receive if channel not in within]
        send = [channel.opposite() for channel in receive if channel.opposite() not in self._outgoing]
        # Both ends of all channels go through them in the same order, so that no circle of waits can form.
        greetings = {channel: self._pairing.prepare(channel) for channel in sorted([*receive, *send], key=_order)}
        try:
            for channel in within:
                self._connect_within(channel)
            for channel in send:
                end = self._pairing.add_outgoing(self._engine, channel, greetings[channel])
                self._outgoing[channel] = Outgoing(end)
                self._note(channel, greetings[channel])
            for channel in receive:
                self._incoming[channel], greeting = self._pairing.add_incoming(self._engine, channel)
                self._note(channel, greeting)
            self._engine.connect()
        except (TransferTimeoutError, PeerLostError) as error:
            self._report(error)

    def _connect_within(self, channel: Channel) -> None:
        greeting = self._pairing.greeting_within()
        here, there = socket.socketpair()
        lanes = [self._pairing.lane(channel, link.detach(), greeting) for link in (here, there)]
        self._outgoing[channel] = Outgoing(self._engine.add_outgoing(**lanes[0]))
        self._incoming[channel] = self._engine.add_incoming(**lanes[1])
        self._sent[channel] = 0
        self.polled = True
        self._note(channel, greeting)

    def _note(self, channel: Channel, greeting: dict[str, Any]) -> None:
        registered = " (registered buffers)" if greeting["register"] else ""
        self._backends[channel] = greeting["backend"] + registered
        if greeting["measured"]:
            self._measured[channel] = [Measured(*one) for one in greeting["measured"]]

    # --- messages ---

    def send(self, channel: Channel, index: int, message: Message) -> None:
        """Start sending and return at once.

        The tensors are kept until they have left. A message that finds no free slot waits in the transport.
        """
        outgoing = self._sender(channel)
        metas, tensors = self._unpack(channel, index, message)
        if message.structure is not None:  # in the description, which the host reads and which travels when it changes
            more = wire.metas_of_bytes(message.structure.packed())
            metas, tensors = (*metas, *more), [*tensors, *(None for _ in more)]
        where = self._hardware.index, self._hardware.stream()
        try:
            if self._hardware.capturing():
                outgoing.end.capture(index, wire.pack_metas(metas), tensors, *where)
                outgoing.captured.append(tensors)  # or the graph's allocator would give their memory away
                return
            outgoing.hold(outgoing.end.send_on(index, outgoing.changed(metas), tensors, *where), metas, tensors)
            if channel in self._sent:
                self._sent[channel] += 1
            outgoing.let_go()
        except (TransferTimeoutError, PeerLostError) as error:
            self._report(error)

    def ready(self, channel: Channel) -> bool:
        return self._sent.get(channel, 1) > 0

    def recv(self, channel: Channel, index: int) -> Message:
        """The next message, in memory of the current stream, on which work that follows finds it there."""
        incoming = self._receiver(channel)
        where = self._hardware.index, self._hardware.stream()
        try:
            if self._hardware.capturing():
                return self._capture_recv(channel, incoming, index, where)
            arrived = incoming.take(index, *where)
            arriving = self._empty(arrived.packed)
            arrived.unpack(list(arriving.tensors))
            if channel in self._sent:
                self._sent[channel] -= 1
            self._let_go()
        except (TransferTimeoutError, PeerLostError) as error:
            self._report(error)
        return _structured(arriving, arrived.packed)

    def _capture_recv(self, channel: Channel, incoming: DeviceIncoming, index: int, where: tuple[int, int]) -> Message:
        """A receive within a CUDA graph, of a message that looks like the last one before it."""
        if incoming.packed is None:
            raise StageError(
                f"channel {channel.name} has carried no message yet, so what a CUDA graph would receive is "
                "not known: run a step or two before recording"
            )
        arriving = self._empty(incoming.packed)
        incoming.capture(index, list(arriving.tensors), *where)
        return _structured(arriving, incoming.packed)

    def _empty(self, packed: bytes) -> Message:
        """Memory for a message that looks as ``packed`` says, its structure among its absent tensors."""
        metas = _metas(packed)
        tensors = tuple(self._hardware.empty(meta) if meta.present else None for meta in metas)
        return Message(tensors, tuple(meta.requires_grad for meta in metas))

    def flush(self) -> None:
        """Wait until every message sent so far has left this process.

        While a CUDA graph is recorded, make the current stream wait for the sends recorded so far instead. Every
        recording has to end with this.
        """
        try:
            for outgoing in self._outgoing.values():
                if self._hardware.capturing():
                    outgoing.end.join_captured(self._hardware.index, self._hardware.stream())
                    outgoing.captured.clear()
                else:
                    outgoing.end.flush()
                    outgoing.held.clear()
        except (TransferTimeoutError, PeerLostError) as error:
            self._report(error)

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
        """What moves the bytes of each channel, why, and what memory that takes.

        Returns:
            ``backends`` by edge; ``measured`` by edge, with one entry per candidate (``name small_us large_us
            error``); ``ring_bytes`` of device memory; ``nccl`` (path and version).
        """
        nccl = self._hardware.nccl
        return {
            "backends": {channel.name: backend for channel, backend in self._backends.items()},
            "measured": {channel.name: [one._asdict() for one in all_] for channel, all_ in self._measured.items()},
            "ring_bytes": sum(end.ring_bytes for end in self._incoming.values()),
            "nccl": None if nccl is None else {"path": nccl.path, "version": nccl.version_text},
        }

    # --- inside ---

    def _sender(self, channel: Channel) -> Outgoing:
        outgoing = self._outgoing.get(channel)
        if outgoing is None:
            raise ScheduleError(f"channel {channel.name} was not opened on the side that sends")
        return outgoing

    def _receiver(self, channel: Channel) -> DeviceIncoming:
        incoming = self._incoming.get(channel)
        if incoming is None:
            raise ScheduleError(f"channel {channel.name} was not opened on the side that receives")
        return incoming

    def _check(self, tensor: Tensor) -> None:
        self._hardware.check(tensor)


@lru_cache(maxsize=64)  # messages of a channel look alike
def _metas(packed: bytes) -> wire.Meta:
    return wire.unpack_metas(packed)


@lru_cache(maxsize=64)
def _structure(packed: bytes) -> tuple[int, Structure | None]:
    """How many tensors a message has besides its structure, and that."""
    count, described = wire.bytes_of_metas(_metas(packed))
    return count, unpacked(described) if described else None


def _structured(arriving: Message, packed: bytes) -> Message:
    count, structure = _structure(packed)
    if structure is None:
        return arriving
    return Message(arriving.tensors[:count], arriving.requires_grad[:count], structure)


def _order(channel: Channel) -> tuple[int, int, str]:
    first, second = sorted((channel.sender, channel.receiver))
    return first, second, channel.kind
