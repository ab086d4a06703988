"""What a transport is: ordered channels between stages that carry tuples of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paci_rt.schedules.lowering import Channel

DEFAULT_TIMEOUT_S = 300.0
"""Deadline of a wait for another stage, unless the user says otherwise."""


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors on their way between two stages.

    Attributes:
        tensors: contiguous tensors; ``None`` where a gradient does not exist.
        requires_grad: for each tensor whether the sender wants its gradient back.
    """

    tensors: tuple[Tensor | None, ...]
    requires_grad: tuple[bool, ...]


class Transport(Protocol):
    """Ordered, reliable message channels between the stages of one pipeline.

    Messages of a channel arrive in the order in which they were sent; ``index`` is checked on arrival. Between
    processes, a wait that outlasts its deadline raises :class:`~paci_rt.errors.TransferTimeoutError`, and one for a
    stage that is gone :class:`~paci_rt.errors.PeerLostError`.
    """

    @property
    def name(self) -> str:
        """Which one it is: the name by which users ask for it."""

    @property
    def capacity(self) -> int | None:
        """Messages that fit into a channel before its next send has to wait; None where a send never waits."""

    def open(self, incoming: Sequence[Channel]) -> None:
        """Get ready to receive on these channels: from now on, receives are posted ahead of the computation that
        needs them."""

    def send(self, channel: Channel, index: int, message: Message) -> None:
        """Start sending and return; the transport keeps the tensors alive until they have left."""

    def ready(self, channel: Channel) -> bool:
        """Whether ``recv`` may be called: always, where it can block; in one process only once a message is there."""

    def has_room(self, channel: Channel) -> bool:
        """Whether ``send`` may be called: always, where it can block; in one process only once there is room."""

    def recv(self, channel: Channel, index: int) -> Message:
        """The next message of ``channel``, whose index must be ``index``."""

    def flush(self) -> None:
        """Wait until every message sent so far has left this process."""

    def fail(self, error: BaseException) -> None:
        """This process goes no further, because of ``error``: let those who wait for it know, where possible."""

    def close(self) -> None:
        """Release threads and buffers. Idempotent."""
