"""Optimizers that a schedule owns: from a gradient to an updated weight."""

from __future__ import annotations

from paci_rt.optim.adam import AdamW, NAdam
from paci_rt.optim.lion import Lion
from paci_rt.optim.muon import Muon
from paci_rt.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Lion", "Muon", "NAdam"]
