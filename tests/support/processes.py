"""Processes that begin with torch imported: a server imports it once, and each process is a fork of the server."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def processes() -> ForkServerContext:
    """The context to make them with, as one makes spawned ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "paci_rt"])
    return context
