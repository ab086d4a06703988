"""Processes of one host, over memory that they share: one copy per message, no sockets.

The channels are the native core's (``csrc/p2p/shm_channel.hpp``). What a process sends lies in a segment of its own, an
anonymous file that the others open through ``/proc``; nothing is left behind, however a process ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from paci_rt import native
from paci_rt.errors import PaciError, PeerLostError, StageError, TransferTimeoutError, TransportError
from paci_rt.schedules import Placement
from paci_rt.schedules.channel import Channel
from paci_rt.transport.base import DEFAULT_TIMEOUT_S, Message, check_slots, check_timeout
from paci_rt.transport.diagnosis import origin_of
from paci_rt.transport.native_channels import NativeTransport, Outgoing
from paci_rt.transport.packing import Structures
from paci_rt.transport.rendezvous import Meeting, check_group, host_identity, hosts_by_name, raise_first

if TYPE_CHECKING:
    from paci_rt.native import ShmIncoming, ShmSegment

SLOTS = 32
"""Messages that fit into a channel. Memory is taken for as many as were ever there at the same time."""
HELD = 64
"""Received messages whose memory the computation may keep; further ones are copied out."""


class ShmTransport(NativeTransport):
    """Stages on the ranks of ``group`` that their placement says, in a circle ``i`` on ``i mod P``; all on one host.

    Received tensors are views of shared memory, writable and aligned to 64 bytes, which goes back to the channel when
    the last of a message's tensors dies. Small messages, and those beyond the number that may be held, are copies.

    All processes of the group must construct their transports, in the same order; they meet there.

    Args:
        group: any process group, or None for the default group; only its store is used.
        num_stages: stages of the pipeline.
        chunks: stages per process.
        placement: which of them, see :class:`paci_rt.schedules.Placement`.
        timeout_s: deadline of every single wait, in seconds.
        slots: messages that may be under way on a channel before its next send waits.
        held: received messages of a channel whose memory may be kept; see ``HELD``.
        events_dir: folder for the last events of every channel, written when a wait ends badly; None is the system's
            folder for temporary files.

    Raises:
        ValueError: an argument that cannot work, or ``torch.distributed`` is not initialised.
        TransportError: the stages are on several hosts, the system does not allow it, or some process has no native
            core; on every process alike.
    """

    name = "shm"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_stages: int,
        slots: int = SLOTS,
        held: int = HELD,
        chunks: int = 1,
        placement: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        events_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_group(group, num_stages, chunks, self.name)
        check_slots(slots)
        if not isinstance(held, int) or held < 0:
            raise ValueError(f"held is {held!r}: the receiver keeps 0 messages or more")
        check_timeout(timeout_s)
        super().__init__(dist.get_rank(group), events_dir)
        self._structures = Structures()
        self.capacity = slots
        self._held, self.timeout_s = held, timeout_s
        self.places, self._group = Placement(num_stages=num_stages, chunks=chunks, name=placement), group
        self._peers: dict[int, ShmSegment] = {}
        self._own, self._addresses = self._meet(Meeting(group, timeout_s))
        self._peers[self._rank] = self._own
        self._copier = native.make_copier()

    def _meet(self, meeting: Meeting) -> tuple[ShmSegment, list[Any]]:
        """This process's segment, and the addresses of all. An error on one rank is raised on all ranks."""
        own, error = None, ""
        try:
            own = native.make_shm_segment()
        except PaciError as refusal:
            error = str(refusal)
        address = [] if own is None else [own.pid, own.fd, own.token]
        told = meeting.exchange("segment", {"host": host_identity(), "address": address, "error": error})
        raise_first([member["error"] for member in told])
        hosts = hosts_by_name([member["host"] for member in told])
        if len(hosts) > 1:
            where = "; ".join(f"{name}: {', '.join(map(str, ranks))}" for name, ranks in hosts.items())
            raise TransportError(
                f"the shm transport works within one host, and the stages are on {len(hosts)} (by rank: {where}); "
                "use transport 'gloo' (--transport gloo)"
            )
        assert own is not None
        addresses = [member["address"] for member in told]
        try:  # the neighbours' now: they may be through, and their segments gone, before a message is asked for
            for rank in {(meeting.rank + 1) % meeting.size, (meeting.rank - 1) % meeting.size} - {meeting.rank}:
                self._peers[rank] = native.attach_shm_segment(*addresses[rank])
        except TransportError as refusal:
            error = str(refusal)
        raise_first(meeting.exchange("attached", error))
        return own, addresses

    def open(self, incoming: Sequence[Channel]) -> None:
        for channel in incoming:
            self._receiver(channel)

    def send(self, channel: Channel, index: int, message: Message) -> None:
        outgoing = self._outgoing.get(channel) or self._sender(channel)
        metas, tensors = self._unpack(channel, index, self._structures.pack(channel, message))
        try:
            sequence = outgoing.end.send(index, outgoing.changed(metas), tensors)
        except (TransferTimeoutError, PeerLostError) as error:
            self._report(error)
        outgoing.hold(sequence, metas, tensors)
        self._let_go()

    def recv(self, channel: Channel, index: int) -> Message:
        incoming = self._incoming.get(channel) or self._receiver(channel)
        try:
            capsules, requires_grad = incoming.receive(index)
        except (TransferTimeoutError, PeerLostError) as error:
            self._report(error)
        self._let_go()
        message = Message(tuple(None if one is None else from_dlpack(one) for one in capsules), requires_grad)
        return self._structures.unpack(channel, message)

    def flush(self) -> None:
        self.await_copies()

    def await_copies(self) -> None:
        """Wait until all that was sent has been copied to where its receivers look for it, which waits for none of
        them."""
        for outgoing in self._outgoing.values():
            outgoing.end.flush()
            outgoing.held.clear()

    def fail(self, error: BaseException) -> None:
        """Tell the neighbours that this process goes no further: their waits end with ``error``'s first line."""
        self._own.fail(origin_of(error, self._rank))
        self._wake()

    def close(self) -> None:
        self.flush()
        self._own.close()
        self._wake()
        self._outgoing.clear()
        self._incoming.clear()
        self._peers.clear()

    @property
    def allocated_bytes(self) -> int:
        """Shared memory that this process's messages take."""
        return int(self._own.allocated_bytes)

    @property
    def message_bytes(self) -> int:
        """Shared memory of the process's own messages: what it sends lies there, and what came back waits there for the
        next ones."""
        return self.allocated_bytes

    @property
    def held_messages(self) -> int:
        """Received messages whose memory is still in use here."""
        return sum(end.held for end in self._incoming.values())

    def _wake(self) -> None:
        for end in self._ends():
            end.wake()

    def _check(self, tensor: Tensor) -> None:
        if not tensor.is_cpu:
            raise StageError(f"a tensor on {tensor.device} cannot travel over the shm transport: move it to 'cpu'")
        if not _can_view(tensor.dtype):
            raise StageError(
                f"torch {torch.__version__} cannot take {tensor.dtype} from shared memory: send "
                "tensor.view(torch.uint8), or use transport 'gloo' (--transport gloo)"
            )

    def _global_rank(self, stage: int) -> int:
        rank = self.places.rank_of(stage)
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _peer(self, stage: int) -> ShmSegment:
        rank = self.places.rank_of(stage)
        segment = self._peers.get(rank)
        if segment is None:
            segment = self._peers[rank] = native.attach_shm_segment(*self._addresses[rank])
        return segment

    def _sender(self, channel: Channel) -> Outgoing:
        options = {"slots": self.capacity, "held": self._held, "timeout_s": self.timeout_s}
        end = native.make_shm_outgoing(channel, self._own, self._peer(channel.receiver), copier=self._copier, **options)
        outgoing = self._outgoing[channel] = Outgoing(end)
        return outgoing

    def _receiver(self, channel: Channel) -> ShmIncoming:
        incoming = self._incoming.get(channel)
        if incoming is None:
            incoming = self._incoming[channel] = native.make_shm_incoming(
                channel, self._peer(channel.sender), slots=self.capacity, timeout_s=self.timeout_s
            )
        return incoming


@lru_cache(maxsize=32)
def _can_view(dtype: torch.dtype) -> bool:
    """Whether this version of torch takes tensors of ``dtype`` through DLPack; older ones know fewer."""
    try:
        return from_dlpack(to_dlpack(torch.empty(1, dtype=dtype))).dtype == dtype
    except (RuntimeError, BufferError, TypeError):
        return False


def why_unusable() -> str:
    """Why no process here could use shared memory; empty where it could."""
    try:
        segment = native.make_shm_segment()
        native.attach_shm_segment(segment.pid, segment.fd, segment.token)
    except PaciError as error:
        return str(error)
    return ""
