"""The command ``paci-rt``, one file a command."""

from __future__ import annotations

from paci_rt.cli.app import main

__all__ = ["main"]
