"""How stages exchange tensors: ``local`` inside one process, ``shm`` and ``gloo`` between processes."""

from __future__ import annotations

from paci_rt.transport.base import DEFAULT_TIMEOUT_S, Message, Transport
from paci_rt.transport.factory import TRANSPORTS, check_transport, make_transport
from paci_rt.transport.hand_over import hand_over
from paci_rt.transport.local import LocalTransport

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "TRANSPORTS",
    "LocalTransport",
    "Message",
    "Transport",
    "check_transport",
    "hand_over",
    "make_transport",
]
