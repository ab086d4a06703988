"""Costs to timeline to numbers: what a schedule does, without running it. No torch."""

from __future__ import annotations

from paci_rt.simulate.costs import Costs
from paci_rt.simulate.metrics import Simulation
from paci_rt.simulate.run import simulate

__all__ = ["Costs", "Simulation", "simulate"]
