"""All stages in one process: messages are handed over by reference."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from paci_rt.errors import ScheduleError
from paci_rt.lowering import Channel
from paci_rt.transport.base import Message


class LocalTransport:
    """Mailboxes, one a channel. Tensors are shared, not copied."""

    def __init__(self) -> None:
        self._mailboxes: dict[Channel, deque[tuple[int, Message]]] = {}

    def open(self, incoming: Sequence[Channel]) -> None:
        """Nothing needs to be posted ahead in one process."""

    def send(self, channel: Channel, index: int, message: Message) -> None:
        self._mailboxes.setdefault(channel, deque()).append((index, message))

    def ready(self, channel: Channel) -> bool:
        return bool(self._mailboxes.get(channel))

    def recv(self, channel: Channel, index: int) -> Message:
        arrived, message = self._mailboxes[channel].popleft()
        if arrived != index:
            raise ScheduleError(f"channel {channel}: message {arrived} arrived where {index} was due")
        return message

    def flush(self) -> None:
        """Every message is handed over the moment it is sent."""

    def close(self) -> None:
        self._mailboxes.clear()
