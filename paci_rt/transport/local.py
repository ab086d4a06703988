"""All stages in one process: messages are handed over by reference."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from paci_rt.errors import ScheduleError
from paci_rt.lowering import Channel
from paci_rt.transport.base import Message


class LocalTransport:
    """Mailboxes, one a channel. Tensors are shared, not copied.

    Args:
        capacity: messages that fit into a mailbox, None for any number.
    """

    name = "local"

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity is {capacity}: a channel holds at least 1 message")
        self.capacity = capacity
        self._mailboxes: dict[Channel, deque[tuple[int, Message]]] = {}

    def open(self, incoming: Sequence[Channel]) -> None:
        """Nothing needs to be posted ahead in one process."""

    def send(self, channel: Channel, index: int, message: Message) -> None:
        self._mailboxes.setdefault(channel, deque()).append((index, message))

    def ready(self, channel: Channel) -> bool:
        return bool(self._mailboxes.get(channel))

    def has_room(self, channel: Channel) -> bool:
        return self.capacity is None or len(self._mailboxes.get(channel, ())) < self.capacity

    def recv(self, channel: Channel, index: int) -> Message:
        arrived, message = self._mailboxes[channel].popleft()
        if arrived != index:
            raise ScheduleError(f"channel {channel}: message {arrived} arrived where {index} was due")
        return message

    def flush(self) -> None:
        """Every message is handed over the moment it is sent."""

    def fail(self, error: BaseException) -> None:
        """Nobody waits elsewhere."""

    def close(self) -> None:
        self._mailboxes.clear()
