"""Links with latency, on one host: a message can be taken only some time after it was sent."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from paci_rt.schedules.channel import Channel
from paci_rt.transport import Message, Transport


class DelayedTransport:
    """Another transport, whose messages take at least ``hop_s`` seconds from ``send`` to the end of ``recv``.

    The sender goes on at once; the receiver sleeps until the time has come, also for a message that was there long
    before, and not at all for one that was sent longer ago. Any number of messages can be on their way, so this is
    latency, not bandwidth. The time of sending travels as one more tensor, nanoseconds of ``time.monotonic_ns``, a
    clock that all processes of a host share.

    Args:
        inner: what carries the messages; its own latency counts towards ``hop_s``.
        hop_s: seconds.

    Raises:
        ValueError: ``hop_s`` is below 0.
    """

    def __init__(self, inner: Transport, hop_s: float) -> None:
        if not hop_s >= 0:
            raise ValueError(f"hop_s is {hop_s!r}: give a number of seconds, at least 0")
        self._inner, self._hop_ns = inner, round(hop_s * 1e9)

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def capacity(self) -> int | None:
        return self._inner.capacity

    @property
    def polled(self) -> bool:
        return self._inner.polled

    def open(self, incoming: Sequence[Channel]) -> None:
        self._inner.open(incoming)

    def send(self, channel: Channel, index: int, message: Message) -> None:
        sent = torch.tensor([time.monotonic_ns()], dtype=torch.int64)
        stamped = Message((*message.tensors, sent), (*message.requires_grad, False), message.structure)
        self._inner.send(channel, index, stamped)

    def ready(self, channel: Channel) -> bool:
        return self._inner.ready(channel)

    def has_room(self, channel: Channel) -> bool:
        return self._inner.has_room(channel)

    def recv(self, channel: Channel, index: int) -> Message:
        stamped = self._inner.recv(channel, index)
        *tensors, sent = stamped.tensors
        assert sent is not None
        left_ns = int(sent) + self._hop_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        return Message(tuple(tensors), stamped.requires_grad[:-1], stamped.structure)

    def flush(self) -> None:
        self._inner.flush()

    def fail(self, error: BaseException) -> None:
        self._inner.fail(error)

    def close(self) -> None:
        self._inner.close()
