"""All stages in one process: messages are handed over by reference."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from paci_rt.errors import ScheduleError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import payload
from paci_rt.transport.base import Message, check_slots


class _Mail(NamedTuple):
    """A message; on a GPU also the stream that made its tensors, and an event behind them."""

    number: int
    message: Message
    stream: torch.cuda.Stream | None
    made: torch.cuda.Event | None


class LocalTransport:
    """Mailboxes, one per channel. Tensors are shared, not copied.

    On a GPU the stream that receives waits for the one that sent; both are those that are current in torch.

    Args:
        capacity: messages that fit into a mailbox, None for any number.

    Raises:
        ValueError: ``capacity`` is below 1.

    Example:
        >>> from paci_rt.transport import LocalTransport, Message
        >>> transport, channel = LocalTransport(capacity=1), ("F", 0, 1)
        >>> transport.send(channel, 0, Message((torch.zeros(2),), (True,)))
        >>> transport.has_room(channel), transport.ready(channel)
        (False, True)
        >>> transport.recv(channel, 0).requires_grad
        (True,)
    """

    name = "local"
    polled = True

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None:
            check_slots(capacity, "capacity")
        self.capacity = capacity
        self._mailboxes: dict[Channel, deque[_Mail]] = {}

    def open(self, incoming: Sequence[Channel]) -> None:
        """Nothing needs to be posted ahead in one process."""

    def send(self, channel: Channel, index: int, message: Message) -> None:
        payload.check(channel, index, message)
        device = _gpu_of(message)
        stream = made = None
        if device is not None:
            stream = torch.cuda.current_stream(device)
            made = stream.record_event()
        self._mailboxes.setdefault(channel, deque()).append(_Mail(index, message, stream, made))

    def ready(self, channel: Channel) -> bool:
        return bool(self._mailboxes.get(channel))

    def has_room(self, channel: Channel) -> bool:
        return self.capacity is None or len(self._mailboxes.get(channel, ())) < self.capacity

    def recv(self, channel: Channel, index: int) -> Message:
        mail = self._mailboxes[channel].popleft()
        if mail.number != index:
            raise ScheduleError(f"channel {channel}: message {mail.number} arrived where {index} was due")
        if mail.stream is not None and mail.made is not None:
            _follow(mail.stream, mail.made, mail.message)
        return mail.message

    def flush(self) -> None:
        """Every message is handed over the moment it is sent."""

    def fail(self, error: BaseException) -> None:
        """No other process waits."""

    def close(self) -> None:
        self._mailboxes.clear()


def _gpu_of(message: Message) -> torch.device | None:
    return next((tensor.device for tensor in message.tensors if tensor is not None and tensor.is_cuda), None)


def _follow(sender: torch.cuda.Stream, made: torch.cuda.Event, message: Message) -> None:
    """Make the stream that receives wait, and keep the tensors' memory until it has used them."""
    here = torch.cuda.current_stream(sender.device)
    if here == sender:
        return
    here.wait_event(made)
    for tensor in message.tensors:
        if tensor is not None:
            tensor.record_stream(here)
