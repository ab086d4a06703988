"""Compares a model that was cut into stages with the uncut one, once, before it trains."""

from __future__ import annotations

from paci_rt.check.against import CutReport, check_against

__all__ = ["CutReport", "check_against"]
