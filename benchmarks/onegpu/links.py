"""Links between stages that share a GPU: messages are copied, as they would be between two GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paci_rt.schedules.channel import Channel
from paci_rt.transport import LocalTransport
from paci_rt.transport.base import Message


class LinkTransport(LocalTransport):
    """Copies every message, on a stream of its directed edge, so that neither stage spends its own time on it.

    The copy begins when the sender has made the message, and the receiver waits for its end and for the latency. An
    edge carries one message after another, latency included, so a latency longer than a forward costs throughput too.

    Args:
        stream_of: the stream of a channel; None on the CPU, where a message is copied when it is sent.
        delay: keeps a stream from going on for the latency to emulate; None is none.
    """

    def __init__(
        self,
        stream_of: Callable[[Channel], torch.cuda.Stream] | None = None,
        delay: Callable[[torch.cuda.Stream], None] | None = None,
    ) -> None:
        super().__init__()
        self._stream_of, self._delay = stream_of, delay

    def send(self, channel: Channel, index: int, message: Message) -> None:
        if self._stream_of is None:
            super().send(channel, index, _copied(message))
            return
        link = self._stream_of(channel)
        link.wait_stream(torch.cuda.current_stream(link.device))
        with torch.cuda.stream(link):
            copies = _copied(message)
            for tensor in message.tensors:
                if tensor is not None:
                    tensor.record_stream(link)  # the sender lets go of it before the copy has been made
            if self._delay is not None:
                self._delay(link)
            # For the receiver, who sees to the copy's memory, the link is where the message comes from.
            super().send(channel, index, copies)


def _copied(message: Message) -> Message:
    copies = tuple(None if tensor is None else tensor.clone() for tensor in message.tensors)
    return Message(copies, message.requires_grad, message.structure)
