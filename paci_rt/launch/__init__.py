"""Starts and supervises the processes of a run."""

from __future__ import annotations

from paci_rt.launch.child import Context
from paci_rt.launch.interface import init_gloo
from paci_rt.launch.parent import run
from paci_rt.launch.torchrun import run_under_torchrun, under_torchrun
from paci_rt.launch.watch import alone, stopped_before

__all__ = ["Context", "alone", "init_gloo", "run", "run_under_torchrun", "stopped_before", "under_torchrun"]
