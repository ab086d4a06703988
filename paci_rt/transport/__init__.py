"""How stages exchange tensors: ``local`` inside one process, ``gloo`` between processes."""

from __future__ import annotations

from paci_rt.transport.base import Message, Transport
from paci_rt.transport.local import LocalTransport

TRANSPORTS = ("auto", "local", "gloo")

__all__ = ["TRANSPORTS", "LocalTransport", "Message", "Transport"]
