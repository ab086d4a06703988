"""Processes on CPUs, over a gloo process group of ``torch.distributed``.

Gloo moves a message only once its receive is posted, so receives are posted before the computation that runs
meanwhile. The sizes of a message still to come are guessed to be those of the message ``DEPTH`` places earlier on
the same channel. Sender and receiver make the same guess, so both know when it is wrong: a tensor larger than
guessed travels on a lane of its own, and one byte releases the buffer that was posted for it.

Lanes are tags: one for headers, and a regular and a spill lane for each tensor of a message.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt.errors import PeerLostError, ScheduleError
from paci_rt.lowering import Channel
from paci_rt.transport import wire
from paci_rt.transport.base import Message

DEPTH = 2
_TAG_BASE = 0x50000000
_LANES = 512
_SPILL = 256

Work = Any  # torch.distributed.Work; its type is None-able in torch's stubs


class _Tags:
    """Tag numbers of one channel. Tags tell channels of the same pair of processes apart; gloo keeps their order."""

    def __init__(self, kind: str) -> None:
        number = {"F": 0, "B": 1}.get(kind)
        if number is None:  # TG<n> and TW<n>
            number = 2 + 2 * int(kind[2:]) + (kind[1] == "W")
        self.header = _TAG_BASE + number * _LANES

    def lane(self, at: int) -> int:
        return self.header + 1 + at

    def spill(self, at: int) -> int:
        return self.header + _SPILL + at


def _fits(meta: wire.TensorMeta, guess: wire.Meta, at: int) -> bool:
    return at < len(guess) and 0 < meta.nbytes <= guess[at].nbytes


class _Outgoing:
    """Sending end of one channel."""

    def __init__(self, channel: Channel, peer: int, group: dist.ProcessGroup | None) -> None:
        self._tags = _Tags(channel[0])
        self._peer, self._group = peer, group
        self._sequence = 0
        self._sent: deque[wire.Meta] = deque([()] * DEPTH, maxlen=DEPTH)

    def start(self, index: int, message: Message) -> list[tuple[Work, Tensor]]:
        metas = wire.describe(message)
        guess = self._sent[0]
        total = sum(meta.nbytes for meta in metas)
        inline = total <= wire.INLINE_BYTES
        header = wire.pack_header(self._sequence, index, metas, inline)
        control = torch.empty(wire.HEADER_BYTES + (total if inline else 0), dtype=torch.uint8)
        control[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        pieces: list[tuple[int, Tensor]] = [(self._tags.header, control)]
        at_byte = wire.HEADER_BYTES
        for at, (meta, tensor) in enumerate(zip(metas, message.tensors, strict=True)):
            if tensor is None or meta.nbytes == 0:
                continue
            if inline:
                control[at_byte : at_byte + meta.nbytes] = wire.byte_view(tensor)
                at_byte += meta.nbytes
            else:
                tag = self._tags.lane(at) if _fits(meta, guess, at) else self._tags.spill(at)
                pieces.append((tag, wire.byte_view(tensor)))
        pieces += [(self._tags.lane(at), torch.zeros(1, dtype=torch.uint8)) for at in _unused(metas, guess, inline)]
        self._sequence += 1
        self._sent.append(metas if not inline else ())
        return [(dist.isend(piece, self._peer, group=self._group, tag=tag), piece) for tag, piece in pieces]


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

    def __init__(self, tags: _Tags, peer: int, group: dist.ProcessGroup | None, guess: wire.Meta) -> None:
        self.control = torch.empty(wire.CONTROL_BYTES, dtype=torch.uint8)
        self.control_work: Work = dist.irecv(self.control, peer, group=group, tag=tags.header)
        self.guess = guess
        self.lanes: dict[int, tuple[Work, Tensor]] = {}
        for at, meta in enumerate(guess):
            if meta.nbytes > 0:
                buffer = torch.empty(meta.nbytes, dtype=torch.uint8)
                self.lanes[at] = dist.irecv(buffer, peer, group=group, tag=tags.lane(at)), buffer


class _Incoming:
    """Receiving end of one channel."""

    def __init__(self, channel: Channel, peer: int, group: dist.ProcessGroup | None) -> None:
        self._channel = channel
        self._tags = _Tags(channel[0])
        self._peer, self._group = peer, group
        self._sequence = 0
        self._seen: deque[wire.Meta] = deque([()] * DEPTH, maxlen=DEPTH)
        self._posted: deque[_Posted] = deque()
        self.expected = 0

    def post(self) -> None:
        """Post receives for messages that are known to come, up to ``DEPTH`` ahead."""
        while len(self._posted) < min(self.expected, DEPTH):
            guess = self._seen[len(self._posted)]
            self._posted.append(_Posted(self._tags, self._peer, self._group, guess))

    def take(self, index: int) -> Message:
        self.post()
        posted = self._posted.popleft()
        posted.control_work.wait()
        raw = posted.control.numpy()
        sequence, arrived, metas, inline = wire.unpack_header(raw[: wire.HEADER_BYTES].tobytes())
        if sequence != self._sequence or arrived != index:
            raise ScheduleError(
                f"channel {self._channel}: message {arrived} (sequence {sequence}) arrived where "
                f"message {index} (sequence {self._sequence}) was due"
            )
        tensors = self._inline(posted, metas) if inline else self._payload(posted, metas)
        for at in _unused(metas, posted.guess, inline):
            posted.lanes[at][0].wait()
        self._sequence += 1
        self._seen.append(metas if not inline else ())
        self.expected -= 1
        self.post()
        return Message(tensors, tuple(meta.requires_grad for meta in metas))

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
        arriving: list[tuple[wire.TensorMeta, Work, Tensor | None]] = []
        for at, meta in enumerate(metas):
            if meta.nbytes == 0:
                arriving.append((meta, None, torch.empty(meta.shape, dtype=meta.dtype) if meta.present else None))
            elif _fits(meta, posted.guess, at):
                arriving.append((meta, *posted.lanes[at]))
            else:
                buffer = torch.empty(meta.nbytes, dtype=torch.uint8)
                work = dist.irecv(buffer, self._peer, group=self._group, tag=self._tags.spill(at))
                arriving.append((meta, work, buffer))
        tensors: list[Tensor | None] = []
        for meta, work, buffer in arriving:
            if work is not None:
                work.wait()
                assert buffer is not None
                buffer = buffer[: meta.nbytes].view(meta.dtype).view(meta.shape)
            tensors.append(buffer)
        return tuple(tensors)


class GlooTransport:
    """One process a stage; stage ``i`` is rank ``i`` of ``group``.

    Args:
        group: a gloo process group, or None for the default group.
        num_stages: stages of the pipeline, one for each rank of the group.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, the group has another size, or its CPU backend is
            not gloo.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, num_stages: int) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "the gloo transport needs torch.distributed: call "
                "torch.distributed.init_process_group('gloo') first, or use paci_rt.LocalPipeline in one process"
            )
        backend = dist.get_backend_config(group)
        if "gloo" not in backend:
            raise ValueError(f"the process group's backend is {backend!r}: the gloo transport needs a gloo group")
        if dist.get_world_size(group) != num_stages:
            raise ValueError(
                f"{num_stages} stages on a process group of {dist.get_world_size(group)}: start one process a stage, "
                "or pass PipelineStage(group=...) with one rank a stage"
            )
        self._group = group
        self._outgoing: dict[Channel, _Outgoing] = {}
        self._incoming: dict[Channel, _Incoming] = {}
        self._reaper = _Reaper()

    def expect(self, counts: Counter[Channel]) -> None:
        for channel, count in counts.items():
            incoming = self._receiver(channel)
            incoming.expected += count
            incoming.post()

    def send(self, channel: Channel, index: int, message: Message) -> None:
        outgoing = self._outgoing.get(channel)
        if outgoing is None:
            outgoing = self._outgoing[channel] = _Outgoing(channel, self._rank(channel[2]), self._group)
        try:
            self._reaper.watch(outgoing.start(index, message))
        except RuntimeError as error:
            raise PeerLostError(f"{channel[1]}SEND_{channel[0]}{index}", _lost(channel[2], error)) from error

    def ready(self, channel: Channel) -> bool:
        return True

    def recv(self, channel: Channel, index: int) -> Message:
        try:
            return self._receiver(channel).take(index)
        except ScheduleError:
            raise
        except RuntimeError as error:
            raise PeerLostError(f"{channel[2]}RECV_{channel[0]}{index}", _lost(channel[1], error)) from error

    def flush(self) -> None:
        self._reaper.drain()

    def close(self) -> None:
        self._reaper.close()

    def _receiver(self, channel: Channel) -> _Incoming:
        incoming = self._incoming.get(channel)
        if incoming is None:
            incoming = self._incoming[channel] = _Incoming(channel, self._rank(channel[1]), self._group)
        return incoming

    def _rank(self, stage: int) -> int:
        return stage if self._group is None else dist.get_global_rank(self._group, stage)


def _lost(stage: int, error: RuntimeError) -> str:
    reason = str(error).splitlines()[0]
    return f"lost the connection to stage {stage}, which failed or was ended: {reason}"


class _Reaper(threading.Thread):
    """Holds sent tensors until they have left, and lets go of them then.

    Gloo tells that a send is complete only to somebody who waits for it, so one thread waits, in order.
    """

    def __init__(self) -> None:
        super().__init__(name="paci_rt-gloo-reaper", daemon=True)
        self._inbox: queue.SimpleQueue[Sequence[tuple[Work, Tensor]] | threading.Event | None] = queue.SimpleQueue()
        self._error: RuntimeError | None = None
        self._closed = False
        self.start()

    def watch(self, sends: Sequence[tuple[Work, Tensor]]) -> None:
        if self._error is not None:
            raise self._error
        self._inbox.put(sends)

    def drain(self) -> None:
        """Wait until everything watched so far has left."""
        done = threading.Event()
        self._inbox.put(done)
        done.wait()
        if self._error is not None:
            raise PeerLostError("SEND", f"a send to a neighbouring stage failed: {self._error}") from self._error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._inbox.put(None)

    def run(self) -> None:
        while (item := self._inbox.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._wait(item)
            del item  # the queue's next get() may block: keep nothing alive meanwhile

    def _wait(self, sends: Sequence[tuple[Work, Tensor]]) -> None:
        for work, _tensor in sends:
            try:
                work.wait()
            except RuntimeError as error:
                self._error = error
                return
