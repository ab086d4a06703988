"""What all transports share whose channels are the native core's: ``shm``, ``nccl``, ``ipc``."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from paci_rt.errors import PeerLostError, TransferTimeoutError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import payload, wire
from paci_rt.transport.base import Message, WaitingTransport
from paci_rt.transport.diagnosis import both_sides, dump_events


@dataclass(slots=True)
class Outgoing:
    """Sending end of one channel, what its last message looked like, and the tensors that have not left yet.

    Attributes:
        end: of the native core.
        held: tensors by sequence number, oldest first; they must stay as they are.
        captured: tensors of sends recorded in a CUDA graph.
    """

    end: Any
    metas: wire.Meta | None = None
    held: deque[tuple[int, list[Tensor | None]]] = field(default_factory=deque)
    captured: list[list[Tensor | None]] = field(default_factory=list)

    def changed(self, metas: wire.Meta) -> bytes | None:
        """``metas`` for the native core, or None if the last message looked alike."""
        return None if metas == self.metas else wire.pack_metas(metas)

    def hold(self, sequence: int, metas: wire.Meta, tensors: list[Tensor | None]) -> None:
        """Keep the tensors of a message that is on its way."""
        self.held.append((sequence, tensors))
        self.metas = metas

    def let_go(self) -> None:
        """Drop tensors that have left."""
        if not self.held:
            return
        done = self.end.completed()
        while self.held and self.held[0][0] <= done:
            self.held.popleft()


class NativeTransport(WaitingTransport):
    """Base class: the ends of this process's channels, and the report when a wait ends badly."""

    name: str

    def __init__(self, rank: int, events_dir: str | os.PathLike[str] | None) -> None:
        self._rank, self._events_dir = rank, events_dir
        self._outgoing: dict[Channel, Outgoing] = {}
        self._incoming: dict[Channel, Any] = {}

    def _global_rank(self, stage: int) -> int:
        """The rank, in the default group, of the process of a stage."""
        return stage

    def _check(self, tensor: Tensor) -> None:
        """Raise StageError unless ``tensor`` lies where this transport can read it."""
        raise NotImplementedError

    def _unpack(self, channel: Channel, index: int, message: Message) -> tuple[wire.Meta, list[Tensor | None]]:
        """What ``message`` looks like, and its tensors as bytes in a row."""
        payload.check(channel, index, message)
        metas = wire.describe(message)
        tensors = [None if tensor is None else self._contiguous(tensor) for tensor in message.tensors]
        return metas, tensors

    def _contiguous(self, tensor: Tensor) -> Tensor:
        """``tensor`` as bytes in a row; itself, but for rare exceptions."""
        self._check(tensor)
        return payload.plain(tensor)

    def _let_go(self) -> None:
        for outgoing in self._outgoing.values():
            outgoing.let_go()

    def _ends(self) -> list[Any]:
        return [*(outgoing.end for outgoing in self._outgoing.values()), *self._incoming.values()]

    def _report(self, error: TransferTimeoutError | PeerLostError) -> NoReturn:
        """Raise ``error`` again, with the file that has the last events of every channel."""
        written = dump_events(self.name, self._rank, error, [end.json() for end in self._ends()], self._events_dir)
        text = f"{error}; {both_sides(error.action, self._global_rank)}{written}"
        if isinstance(error, PeerLostError):
            raise PeerLostError(error.action, text, error.origin) from None
        raise TransferTimeoutError(error.action, text) from None
