"""How stages exchange tensors: ``local`` inside one process, ``gloo`` between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paci_rt.transport.base import Message, Transport
from paci_rt.transport.local import LocalTransport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TRANSPORTS = ("auto", "local", "gloo")

__all__ = ["TRANSPORTS", "LocalTransport", "Message", "Transport", "make_transport"]


def make_transport(name: str, *, group: ProcessGroup | None, num_stages: int, chunks: int = 1) -> Transport:
    """The transport ``name`` between the processes of ``group``.

    Raises:
        ValueError: no such transport between processes.
    """
    if name not in ("auto", "gloo"):
        raise ValueError(f"no transport between processes is called {name!r}: choose auto or gloo")
    from paci_rt.transport.gloo import GlooTransport  # imports torch.distributed

    return GlooTransport(group, num_stages=num_stages, chunks=chunks)
