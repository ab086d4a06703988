"""Processes on CPUs, over a gloo process group of ``torch.distributed``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from paci_rt.errors import PaciError, PeerLostError, TransferTimeoutError
from paci_rt.schedules import Placement
from paci_rt.schedules.channel import Channel
from paci_rt.transport import payload
from paci_rt.transport.base import DEFAULT_TIMEOUT_S, Message, WaitingTransport, check_timeout
from paci_rt.transport.diagnosis import action_of, both_sides, dump_events, timeout_text
from paci_rt.transport.gloo_ends import Incoming, Outgoing, Tags
from paci_rt.transport.packing import Structures
from paci_rt.transport.rendezvous import check_group


class GlooTransport(WaitingTransport):
    """Stages on the ranks of ``group`` that their placement says: stage ``i`` on ``i mod P`` in a circle.

    Args:
        group: a gloo process group, or None for the default group.
        num_stages: stages of the pipeline.
        chunks: stages per process.
        placement: which of them, see :class:`paci_rt.schedules.Placement`.
        timeout_s: deadline of every single wait, in seconds.
        events_dir: folder for the last events of every channel, written when a wait ends badly; None is the system's
            folder for temporary files, empty writes none.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, the group has another size, or its CPU backend is
            not gloo.
    """

    name = "gloo"
    capacity = None  # gloo starts a send at once, whether or not its receive is posted
    _made: ClassVar[WeakKeyDictionary[dist.ProcessGroup, int]] = WeakKeyDictionary()

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_stages: int,
        chunks: int = 1,
        placement: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        events_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_group(group, num_stages, chunks, self.name)
        backend = dist.get_backend_config(group)
        if "gloo" not in backend:
            raise ValueError(f"the process group's backend is {backend!r}: the gloo transport needs a gloo group")
        check_timeout(timeout_s)
        self.places = Placement(num_stages=num_stages, chunks=chunks, name=placement)
        self._group, self._chunks = group, chunks
        self._timeout, self.timeout_s = timedelta(seconds=timeout_s), timeout_s
        # All processes make their pipelines in the same order, so they agree on the number without talking.
        members = dist.group.WORLD if group is None else group
        assert members is not None
        self._number = self._made.get(members, 0)
        self._made[members] = self._number + 1
        self._outgoing: dict[Channel, Outgoing] = {}
        self._incoming: dict[Channel, Incoming] = {}
        self._structures = Structures()
        self._events_dir = events_dir

    def open(self, incoming: Sequence[Channel]) -> None:
        for channel in incoming:
            self._receiver(channel)

    def send(self, channel: Channel, index: int, message: Message) -> None:
        opposite, outgoing = self._incoming.get(channel.opposite()), self._sender(channel)
        with payload.packing(channel, index, message):
            payload.check(channel, index, message)
            packed = self._structures.pack(channel, message)
            pieces = outgoing.pack(index, packed, 0 if opposite is None else opposite.sequence)
        with self._losing(channel, index, outgoing):
            outgoing.start(pieces)

    def recv(self, channel: Channel, index: int) -> Message:
        incoming, opposite = self._receiver(channel), self._outgoing.get(channel.opposite())
        with self._losing(channel, index, incoming):
            message = incoming.take(index)
            if opposite is not None:
                opposite.let_go(incoming.acknowledged)
        return self._structures.unpack(channel, message)

    def flush(self) -> None:
        for channel, outgoing in self._outgoing.items():
            with self._losing(channel, outgoing.last_index, outgoing):
                outgoing.flush()

    def fail(self, error: BaseException) -> None:
        """Nothing: gloo cannot tell. Neighbours notice when this process ends, or at their deadline."""

    @property
    def message_bytes(self) -> int:
        """Bytes of messages that have not been taken on the other side, and of receives that wait for one."""
        leaving = [piece for end in self._outgoing.values() for pieces in end.leaving for _, piece in pieces]
        posted = [one for end in self._incoming.values() for one in end.posted]
        buffers = [buffer for one in posted for _, buffer in one.lanes.values()]
        return sum(tensor.nbytes for tensor in [*leaving, *buffers, *(one.control for one in posted)])

    @property
    def held_messages(self) -> int:
        """Messages sent and kept alive because the other side has not yet said that it took them."""
        return sum(outgoing.held for outgoing in self._outgoing.values())

    def close(self) -> None:
        self._outgoing.clear()
        self._incoming.clear()

    def _sender(self, channel: Channel) -> Outgoing:
        outgoing = self._outgoing.get(channel)
        if outgoing is None:
            outgoing = self._outgoing[channel] = Outgoing(
                channel, self._tags(channel), self._rank(channel.receiver), self._group, self._timeout
            )
        return outgoing

    def _receiver(self, channel: Channel) -> Incoming:
        incoming = self._incoming.get(channel)
        if incoming is None:
            incoming = self._incoming[channel] = Incoming(
                channel, self._tags(channel), self._rank(channel.sender), self._group, self._timeout
            )
        return incoming

    def _tags(self, channel: Channel) -> Tags:
        chunk = self.places.chunk_of(min(channel.sender, channel.receiver))
        return Tags(self._number, channel, chunk, self._chunks)

    def _rank(self, stage: int) -> int:
        rank = self.places.rank_of(stage)
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    @contextmanager
    def _losing(self, channel: Channel, index: int, end: Outgoing | Incoming) -> Iterator[None]:
        """Turn gloo's errors into ours: the deadline has passed, or the stage at the other end is gone."""
        try:
            yield
        except PaciError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            sending = isinstance(end, Outgoing)
            action, peer = action_of(channel, index, sending=sending), channel.receiver if sending else channel.sender
            if "timed out" in reason.lower():
                end.events.note("timeout", index=index)
                text = timeout_text(channel, index, reason, end.standing(), self.timeout_s, sending=sending)
                raise TransferTimeoutError(action, self._explained(action, text)) from error
            end.events.note("fail", index=index)
            where = f"on edge {channel.name}, {end.standing()}"
            message = f"action {action} lost the connection to stage {peer} {where}: {reason}"
            raise PeerLostError(action, self._explained(action, message)) from error

    def _explained(self, action: str, text: str) -> str:
        """``text`` with what both sides did last, and the file with the last events of every channel."""
        text = f"{text}; {both_sides(action, self._rank)}"
        ends = [end.json() for end in self._outgoing.values()] + [end.json() for end in self._incoming.values()]
        written = dump_events(self.name, dist.get_rank(self._group), RuntimeError(text), ends, self._events_dir)
        return text + written
