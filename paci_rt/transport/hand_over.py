"""Neighbouring stages on one rank, as at the turn of a V: what goes from one to the other takes no transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from paci_rt.schedules import Placement
from paci_rt.schedules.channel import Channel
from paci_rt.transport.base import Message, Transport, send_and_leave
from paci_rt.transport.local import LocalTransport
from paci_rt.wording import shown


def hand_over(transport: Transport, places: Placement) -> Transport:
    """``transport`` where all messages of a pipeline go from rank to rank, or where it has room for all that come;
    else one beside which messages that stay on their rank are handed over, in any number.

    Args:
        places: which rank holds which stages.

    Raises:
        ValueError: ``transport`` was made for another placement.

    Example:
        Stages 1 and 2 are on the second of two ranks:

        >>> from paci_rt.schedules import Placement
        >>> from paci_rt.transport import LocalTransport, Message, hand_over
        >>> v = Placement(num_stages=4, chunks=2, name="v")
        >>> transport = hand_over(LocalTransport(capacity=1), v)
        >>> for number in range(2):
        ...     transport.send(("F", 1, 2), number, Message((torch.zeros(2),), (True,)))
        >>> transport.send(("F", 0, 1), 0, Message((torch.zeros(2),), (True,)))
        >>> transport.has_room(("F", 1, 2)), transport.has_room(("F", 0, 1))
        (True, False)
    """
    made_for = getattr(transport, "places", None)
    if made_for is not None and made_for != places:
        raise ValueError(
            f"the transport {transport.name!r} was made for {_words(made_for)}, and the schedule has {_words(places)}: "
            f"make it with num_stages={places.num_stages}, chunks={places.chunks}, placement={shown(places.name)}"
        )
    if transport.capacity is None and transport.polled:  # mailboxes in this process already
        return transport
    turns = any(places.local(stage) for stage in range(places.num_stages))
    return _HandingOver(transport, places) if turns else transport


def _words(places: Placement) -> str:
    return f"{places.num_stages} stages in a {places.name} over {places.ranks} ranks"


class _HandingOver:
    """A transport beside mailboxes for what stays on a rank."""

    def __init__(self, transport: Transport, places: Placement) -> None:
        self._transport, self._mailboxes, self._places = transport, LocalTransport(), places
        self.name, self.capacity, self.polled = transport.name, transport.capacity, transport.polled
        ends = [stage for stage in range(places.num_stages) if places.local(stage)]
        self.handed_over = {stage for end in ends for stage in (end, end + 1)}
        """Stages that have a neighbour on their rank."""
        self._left: dict[tuple[Channel, int], int] = {}
        self._left_bytes = self._most_left_bytes = 0
        self._by_channel: dict[Channel, Transport] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)  # deadline, statistics

    def _find(self, channel: Channel) -> Transport:
        _, sender, receiver = channel
        here = self._places.rank_of(sender) == self._places.rank_of(receiver)
        found = self._by_channel[channel] = self._mailboxes if here else self._transport
        return found

    def open(self, incoming: Sequence[Channel]) -> None:
        self._transport.open([channel for channel in incoming if self._find(channel) is self._transport])

    def send(self, channel: Channel, index: int, message: Message) -> None:
        (self._by_channel.get(channel) or self._find(channel)).send(channel, index, message)

    def leave(self, channel: Channel, index: int, tensor: Tensor) -> None:
        """See :func:`paci_rt.transport.base.send_and_leave`: what stays here lies in a copy until it is taken."""
        carrier = self._by_channel.get(channel) or self._find(channel)
        send_and_leave(carrier, channel, index, tensor)
        if carrier is self._mailboxes:
            self._left[channel, index] = tensor.nbytes
            self._left_bytes += tensor.nbytes
            self._most_left_bytes = max(self._most_left_bytes, self._left_bytes)

    @property
    def message_bytes(self) -> int:
        """Bytes of the other transport's buffers, and the most that copies of tied weights and of the sums of their
        gradients have taken on this rank."""
        return int(getattr(self._transport, "message_bytes", 0)) + self._most_left_bytes

    def ready(self, channel: Channel) -> bool:
        return (self._by_channel.get(channel) or self._find(channel)).ready(channel)

    def has_room(self, channel: Channel) -> bool:
        return (self._by_channel.get(channel) or self._find(channel)).has_room(channel)

    def recv(self, channel: Channel, index: int) -> Message:
        if self._left:
            self._left_bytes -= self._left.pop((channel, index), 0)
        return (self._by_channel.get(channel) or self._find(channel)).recv(channel, index)

    def flush(self) -> None:
        self._transport.flush()

    def fail(self, error: BaseException) -> None:
        self._transport.fail(error)

    def close(self) -> None:
        self._mailboxes.close()
        self._transport.close()
