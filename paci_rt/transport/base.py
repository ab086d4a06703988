"""What a transport is: ordered channels between stages that carry tuples of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paci_rt.schedules.channel import Channel
from paci_rt.transport.structure import Structure

DEFAULT_TIMEOUT_S = 300.0
MOST_TIMEOUT_S = 1e9
"""Deadline of a wait for another stage, unless the user says otherwise."""


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors on their way between two stages.

    Attributes:
        tensors: contiguous tensors of any shape and dtype; ``None`` where a gradient does not exist.
        requires_grad: for each tensor whether the sender wants its gradient back.
        structure: what they are part of, where that is more than a tuple of them.

    Example:
        >>> from paci_rt.transport import Message
        >>> message = Message(tensors=(torch.ones(2, 3), None), requires_grad=(True, False))
        >>> [None if tensor is None else tuple(tensor.shape) for tensor in message.tensors]
        [(2, 3), None]
    """

    tensors: tuple[Tensor | None, ...]
    requires_grad: tuple[bool, ...]
    structure: Structure | None = None


class Transport(Protocol):
    """Ordered, reliable message channels between the stages of one pipeline.

    Messages of a channel arrive in the order in which they were sent; ``index`` is checked on arrival. Between
    processes, a wait that outlasts its deadline raises :class:`~paci_rt.errors.TransferTimeoutError`, and one for a
    stage that is gone :class:`~paci_rt.errors.PeerLostError`.

    Example:
        What every transport can do, shown with the one that stays inside a process:

        >>> from paci_rt.transport import LocalTransport, Message, Transport
        >>> transport: Transport = LocalTransport()
        >>> channel = ("F", 0, 1)  # outputs of forwards, from stage 0 to stage 1
        >>> transport.open([channel])
        >>> transport.send(channel, 0, Message((torch.ones(2),), (True,)))
        >>> transport.ready(channel), transport.recv(channel, 0).tensors
        (True, (tensor([1., 1.]),))
        >>> transport.close()
    """

    @property
    def name(self) -> str:
        """The name by which users ask for it."""

    @property
    def capacity(self) -> int | None:
        """Messages that fit into a channel before its next send has to wait; None where a send never waits."""

    @property
    def polled(self) -> bool:
        """Whether ``ready`` and ``has_room`` must be asked before ``recv`` and ``send``.

        So it is between stages of one process, which take turns. Between processes ``send`` and ``recv`` wait instead.
        """

    def open(self, incoming: Sequence[Channel]) -> None:
        """Get ready to receive on these channels.

        From now on, receives are posted ahead of the computation that needs them.
        """

    def send(self, channel: Channel, index: int, message: Message) -> None:
        """Start sending and return; the transport keeps the tensors alive until they have left."""

    def ready(self, channel: Channel) -> bool:
        """Whether ``recv`` may be called; see ``polled``."""

    def has_room(self, channel: Channel) -> bool:
        """Whether ``send`` may be called; see ``polled``. Always where ``capacity`` is None."""

    def recv(self, channel: Channel, index: int) -> Message:
        """The next message of ``channel``, whose index must be ``index``."""

    def flush(self) -> None:
        """Wait until every message sent so far has left this process."""

    def fail(self, error: BaseException) -> None:
        """This process stops because of ``error``: tell those who wait for it, where possible."""

    def close(self) -> None:
        """Release threads and buffers. Idempotent."""


def send_and_leave(transport: Transport, channel: Channel, index: int, tensor: Tensor) -> None:
    """Send one tensor that the caller will write to when this returns.

    A transport that copies what it sends has an ``await_copies``, which is waited for; that is no dearer than a copy
    made here, which takes as much memory as the tensor until it has left. One that hands over what stays on a rank
    has a ``leave``.
    """
    leave = getattr(transport, "leave", None)
    if leave is not None:
        leave(channel, index, tensor)
        return
    await_copies = getattr(transport, "await_copies", None)
    transport.send(channel, index, Message((tensor.clone() if await_copies is None else tensor,), (False,)))
    if await_copies is not None:
        await_copies()


class WaitingTransport:
    """Half of a transport between processes: ``send`` and ``recv`` wait for the other side, so nothing is polled."""

    polled: bool = False

    def ready(self, channel: Channel) -> bool:
        return True

    def has_room(self, channel: Channel) -> bool:
        return True


def check_timeout(seconds: float, name: str = "timeout_s") -> None:
    """Raise ValueError, with ``name`` in it, unless ``seconds`` is a number above 0 and at most ``MOST_TIMEOUT_S``."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not (number and 0 < seconds <= MOST_TIMEOUT_S):
        raise ValueError(f"{name} is {seconds!r}: give a number of seconds above 0 and up to {MOST_TIMEOUT_S:g}")


def check_slots(slots: int, name: str = "slots") -> None:
    """Raise ValueError, with ``name`` in it, unless a channel can hold ``slots`` messages."""
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(f"{name} is {slots!r}: a channel holds at least 1 message")
