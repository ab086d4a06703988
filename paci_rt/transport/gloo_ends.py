"""The two ends of a channel over gloo.

Gloo moves a message only once its receive is posted, so receives are posted before the computation that runs
meanwhile. The sizes of a message still to come are guessed to be those of the message ``DEPTH`` places earlier on
the same channel. Sender and receiver make the same guess, so both know when it is wrong: a tensor larger than
guessed travels on a lane of its own, and one byte releases the buffer that was posted for it.

Lanes are tags: one for headers, and a regular and a spill lane for each tensor of a message.

Gloo tells that a send is complete only to somebody who waits for it. So each header also says how many messages its
sender has taken from the channel that runs the other way; those sends are complete, and their tensors let go.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt.errors import ScheduleError, StageError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import payload, wire
from paci_rt.transport.base import Message
from paci_rt.transport.diagnosis import standing
from paci_rt.transport.events import EventRing

DEPTH = 2
_LANES = 512  # tags per channel
_SPILL = 256
_CHANNELS = 32  # channels per transport, and as many for norms
_TRANSPORTS = 32767  # transports per group before tags are used again
_TAG_BASE = 1 << 30

Work = Any  # torch.distributed.Work; its type is None-able in torch's stubs


class Tags:
    """Tag numbers of one channel. Tags tell channels of the same pair of processes apart; gloo keeps their order.

    Every transport has tags of its own: the receives that it has posted ahead when it is closed must not take the
    messages of the next one.
    """

    def __init__(self, transport: int, channel: Channel, chunk: int, chunks: int) -> None:
        number = 2 * chunk + (channel.kind == "B")
        if channel.is_tied:
            number = 2 * chunks + 2 * channel.tied_weight + channel.kind.startswith("TW")
        if number >= _CHANNELS:
            raise ValueError(
                f"channel {channel.kind}: the gloo transport has room for {_CHANNELS // 2} stages per rank and tied "
                f"weights, and there are {chunks} stages: use fewer chunks"
            )
        if channel.kind[0] == "N":
            number = _CHANNELS + 2 * chunk + (channel.kind == "NB")
        self.header = _TAG_BASE + (transport % _TRANSPORTS * 2 * _CHANNELS + number) * _LANES

    def lane(self, at: int) -> int:
        return self.header + 1 + at

    def spill(self, at: int) -> int:
        return self.header + _SPILL + at


def _fits(meta: wire.TensorMeta, guess: wire.Meta, at: int) -> bool:
    return at < len(guess) and 0 < meta.nbytes <= guess[at].nbytes


class Outgoing:
    """Sending end of one channel."""

    def __init__(
        self, channel: Channel, tags: Tags, peer: int, group: dist.ProcessGroup | None, timeout: timedelta
    ) -> None:
        self._tags = tags
        self.events = EventRing(channel.name, "sender", timeout.total_seconds())
        self._peer, self._group, self._timeout = peer, group, timeout
        self._sequence = 0
        self._sent: deque[wire.Meta] = deque([()] * DEPTH, maxlen=DEPTH)
        self.leaving: deque[list[tuple[Work, Tensor]]] = deque()
        self._let_go = 0
        self.last_index = 0

    def pack(self, index: int, message: Message, taken: int) -> list[tuple[int, Tensor]]:
        """Bytes to be sent, with their tags; ``taken`` messages of the opposite channel have arrived here."""
        metas = wire.describe(message)
        guess = self._sent[0]
        total = sum(meta.nbytes for meta in metas)
        inline = total <= wire.INLINE_BYTES
        header = wire.pack_header(self._sequence, index, taken, metas, inline)
        control = torch.empty(wire.HEADER_BYTES + (total if inline else 0), dtype=torch.uint8)
        control[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        pieces: list[tuple[int, Tensor]] = [(self._tags.header, control)]
        at_byte = wire.HEADER_BYTES
        for at, (meta, tensor) in enumerate(zip(metas, message.tensors, strict=True)):
            if tensor is None or meta.nbytes == 0:
                continue
            raw = wire.byte_view(payload.plain(tensor))
            if raw.device.type != "cpu":
                raise StageError(f"a tensor on {raw.device} cannot travel over the gloo transport: move it to 'cpu'")
            if inline:
                control[at_byte : at_byte + meta.nbytes] = raw
                at_byte += meta.nbytes
            else:
                pieces.append((self._tags.lane(at) if _fits(meta, guess, at) else self._tags.spill(at), raw))
        pieces += [(self._tags.lane(at), torch.zeros(1, dtype=torch.uint8)) for at in _unused(metas, guess, inline)]
        self.events.note("send", self._sequence, index, total)
        self._sequence += 1
        self.last_index = index
        self._sent.append(metas if not inline else ())
        return pieces

    def start(self, pieces: list[tuple[int, Tensor]]) -> None:
        """Start sending what :meth:`pack` has packed."""
        self.leaving.append(
            [(dist.isend(piece, self._peer, group=self._group, tag=tag), piece) for tag, piece in pieces]
        )

    def let_go(self, taken: int) -> None:
        """Drop the first ``taken`` messages of the channel, waiting for those that have not left."""
        while self.leaving and self._let_go < taken:
            for work, _piece in self.leaving.popleft():
                work.wait(self._timeout)
            self.events.note("release", self._let_go)
            self._let_go += 1

    def flush(self) -> None:
        self.let_go(self._sequence)

    @property
    def held(self) -> int:
        return len(self.leaving)

    def standing(self) -> str:
        """For error messages: the message that waits, as far as it is known, and how far both sides are."""
        size = sum(piece.nbytes for _work, piece in self.leaving[0]) if self.leaving else 0
        return standing(self._let_go % DEPTH, f"{size} bytes", self._let_go - 1, None)

    def json(self) -> str:
        """For a dump."""
        return self.events.json(self._let_go - 1 if self._let_go else None, None)


def _unused(metas: wire.Meta, guess: wire.Meta, inline: bool) -> list[int]:
    """Lanes on which the receiver has posted a buffer that this message does not fill."""
    unused = []
    for at, guessed in enumerate(guess):
        filled = not inline and at < len(metas) and _fits(metas[at], guess, at)
        if guessed.nbytes > 0 and not filled:
            unused.append(at)
    return unused


class _Posted:
    """Receives posted for one message that has not been taken yet."""

    def __init__(self, tags: Tags, peer: int, group: dist.ProcessGroup | None, guess: wire.Meta) -> None:
        self.control = torch.empty(wire.CONTROL_BYTES, dtype=torch.uint8)
        self.control_work: Work = dist.irecv(self.control, peer, group=group, tag=tags.header)
        self.guess = guess
        self.lanes: dict[int, tuple[Work, Tensor]] = {}
        for at, meta in enumerate(guess):
            if meta.nbytes > 0:
                buffer = torch.empty(meta.nbytes, dtype=torch.uint8)
                self.lanes[at] = dist.irecv(buffer, peer, group=group, tag=tags.lane(at)), buffer


class Incoming:
    """Receiving end of one channel."""

    def __init__(
        self, channel: Channel, tags: Tags, peer: int, group: dist.ProcessGroup | None, timeout: timedelta
    ) -> None:
        self._channel = channel
        self.events = EventRing(channel.name, "receiver", timeout.total_seconds())
        self._tags = tags
        self._peer, self._group, self._timeout = peer, group, timeout
        self.sequence = 0
        self.acknowledged = 0
        self._seen: deque[wire.Meta] = deque([()] * DEPTH, maxlen=DEPTH)
        self.posted: deque[_Posted] = deque()
        self._post()

    def _post(self) -> None:
        """Keep receives posted ``DEPTH`` messages ahead, whether or not they will ever come."""
        while len(self.posted) < DEPTH:
            guess = self._seen[len(self.posted)]
            self.posted.append(_Posted(self._tags, self._peer, self._group, guess))

    def take(self, index: int) -> Message:
        posted = self.posted.popleft()
        self.events.note("wait", self.sequence, index)
        posted.control_work.wait(self._timeout)
        raw = posted.control.numpy()
        sequence, arrived, taken, metas, inline = wire.unpack_header(raw[: wire.HEADER_BYTES].tobytes())
        if sequence != self.sequence or arrived != index:
            raise ScheduleError(
                f"channel {self._channel}: message {arrived} (sequence {sequence}) arrived where "
                f"message {index} (sequence {self.sequence}) was due"
            )
        tensors = self._inline(posted, metas) if inline else self._payload(posted, metas)
        for at in _unused(metas, posted.guess, inline):
            posted.lanes[at][0].wait(self._timeout)
        self.events.note("take", self.sequence, index, sum(meta.nbytes for meta in metas))
        self.sequence += 1
        self.acknowledged = taken
        self._seen.append(metas if not inline else ())
        self._post()
        return Message(tensors, tuple(meta.requires_grad for meta in metas))

    def standing(self) -> str:
        """For error messages: the message that is waited for, as far as it is known, and how far both sides are."""
        size = sum(meta.nbytes for meta in self._seen[0])
        return standing(self.sequence % DEPTH, f"about {size} bytes" if size else "few bytes", None, self.sequence - 1)

    def json(self) -> str:
        """For a dump."""
        return self.events.json(None, self.sequence - 1 if self.sequence else None)

    def _inline(self, posted: _Posted, metas: wire.Meta) -> tuple[Tensor | None, ...]:
        tensors: list[Tensor | None] = []
        at = wire.HEADER_BYTES
        for meta in metas:
            tensor = torch.empty(meta.shape, dtype=meta.dtype) if meta.present else None
            if tensor is not None and meta.nbytes:
                wire.byte_view(tensor).copy_(posted.control[at : at + meta.nbytes])
                at += meta.nbytes
            tensors.append(tensor)
        return tuple(tensors)

    def _payload(self, posted: _Posted, metas: wire.Meta) -> tuple[Tensor | None, ...]:
        spilled: dict[int, tuple[Work, Tensor]] = {}
        for at, meta in enumerate(metas):
            if meta.nbytes and not _fits(meta, posted.guess, at):
                buffer = torch.empty(meta.nbytes, dtype=torch.uint8)
                work = dist.irecv(buffer, self._peer, group=self._group, tag=self._tags.spill(at))
                spilled[at] = work, buffer
        tensors: list[Tensor | None] = []
        for at, meta in enumerate(metas):
            if meta.nbytes == 0:
                tensors.append(torch.empty(meta.shape, dtype=meta.dtype) if meta.present else None)
                continue
            work, buffer = spilled[at] if at in spilled else posted.lanes[at]
            work.wait(self._timeout)
            tensors.append(buffer[: meta.nbytes].view(meta.dtype).view(meta.shape))
        return tuple(tensors)
