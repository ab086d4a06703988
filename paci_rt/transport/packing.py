"""How the structure of a message travels between processes on CPUs: among its tensors.

The sender tells it once, and again where it changes; each end of a channel remembers the last one.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from paci_rt.errors import TransportError
from paci_rt.schedules.channel import Channel
from paci_rt.transport.base import Message
from paci_rt.transport.structure import Structure


def unpacked(packed: bytes) -> Structure:
    """What :meth:`Structure.packed` has packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's pytree says how it will change
        return Structure(*pickle.loads(packed))


class Structures:
    """The last structure of every channel of a transport between processes, in both directions.

    A message with a structure gets two entries more: the packed structure and nothing, or nothing twice where it is
    that of the last such message. What an absent tensor's ``requires_grad`` says tells them apart.
    """

    def __init__(self) -> None:
        self._sent: dict[Channel, tuple[Structure, bytes]] = {}
        self._seen: dict[Channel, Structure] = {}

    def pack(self, channel: Channel, message: Message) -> Message:
        """``message`` for the wire: its structure among its tensors."""
        structure, tensors = message.structure, message.tensors
        if channel.kind != "F" or (structure is None and (not tensors or tensors[-1] is not None)):
            return message
        more: tuple[Tensor | None, Tensor | None] = (None, None)
        flags = (False, False)  # no structure, and the last tensor was absent already
        if structure is not None:
            flags = (True, False)
            sent = self._sent.get(channel)
            if sent is None or sent[0] is not structure:
                packed = structure.packed()
                if sent is None or sent[1] != packed:
                    more, flags = (torch.frombuffer(bytearray(packed), dtype=torch.uint8), None), (False, True)
                self._sent[channel] = structure, packed
        return replace(
            message, tensors=(*tensors, *more), requires_grad=(*message.requires_grad, *flags), structure=None
        )

    def unpack(self, channel: Channel, message: Message) -> Message:
        """``message`` as it was before :meth:`pack`."""
        tensors = message.tensors
        if channel.kind != "F" or not tensors or tensors[-1] is not None:
            return message
        packed, (repeated, new) = tensors[-2], message.requires_grad[-2:]
        structure = None
        if new:
            assert packed is not None
            structure = self._seen[channel] = unpacked(packed.numpy().tobytes())
        elif repeated:
            structure = self._seen.get(channel)
            if structure is None:
                raise TransportError(f"channel {channel.name}: a message refers to a structure that never came")
        return replace(message, tensors=tensors[:-2], requires_grad=message.requires_grad[:-2], structure=structure)
