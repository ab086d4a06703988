"""From a profile to partition, accumulation, slack and schedule. No torch."""

from __future__ import annotations

from paci_rt.planner.candidate import AS_FAST, Candidate, Prediction
from paci_rt.planner.choose import Plan, plan
from paci_rt.planner.frontier import FrontierPoint, frontier
from paci_rt.planner.profile import BlockProfile, Profile, load_profile, parse_profile
from paci_rt.planner.stage_costs import stage_costs, step_costs
from paci_rt.planner.token_overhead import OverheadRow, OverheadTable, TokenOverhead, load_overheads, parse_overheads

__all__ = [
    "AS_FAST",
    "BlockProfile",
    "Candidate",
    "FrontierPoint",
    "OverheadRow",
    "OverheadTable",
    "Plan",
    "Prediction",
    "Profile",
    "TokenOverhead",
    "frontier",
    "load_overheads",
    "load_profile",
    "parse_overheads",
    "parse_profile",
    "plan",
    "stage_costs",
    "step_costs",
]
