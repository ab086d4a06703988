"""Partitions that are worth simulating for a schedule whose ranks hold several pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from paci_rt.planner.candidate import Candidate
from paci_rt.planner.memory import copies_beside
from paci_rt.planner.profile import Profile
from paci_rt.planner.rank_loads import RankKeeps, RankLoads, moments_by_piece
from paci_rt.planner.rank_partition import best_by_rank, least_full
from paci_rt.planner.stage_costs import stage_costs, step_costs
from paci_rt.schedules import Placement, ScheduleFamily, policies


def cuts_by_rank(
    profile: Profile,
    one: Candidate,
    family: ScheduleFamily,
    *,
    speeds: Sequence[float],
    limits_bytes: Sequence[float],
    by_stage: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """Partitions to choose from by simulation, each once.

    The slowest rank is as fast as possible: with even pieces; with the least on the fullest rank, in the order that
    fits those; and where memory is limited, within that, or as near to it as can be. An order that is made for
    equal stages may run faster on ``by_stage``, where the slowest *stage* is as fast as possible; one that is fitted to
    its stages does not.

    Args:
        one: several pieces a rank; its partition does not matter.
        speeds, limits_bytes: of each device.
        by_stage: what balances stages.
    """
    ranks = len(speeds)
    shape, again = one.shape(ranks), one.recomputing(ranks)
    places = Placement(num_stages=shape.num_stages, chunks=shape.chunks, name=shape.placement)
    loads = RankLoads(profile=profile, places=places, speeds=speeds, again=again)
    even = best_by_rank(loads, by_stage)
    assert even is not None
    one = replace(one, partition=even)
    if family.takes_costs and one.step_costs is None:
        costs = stage_costs(profile, even, device_speeds=speeds, placement=shape.placement)
        one = replace(one, step_costs=step_costs(costs, again))
    loads = replace(loads, keeps=[_keeps(profile, one, family, ranks, rank) for rank in range(ranks)])
    found = [even, best_by_rank(loads, even, lean=True)]
    if any(map(math.isfinite, limits_bytes)):
        within = replace(loads, limits_bytes=limits_bytes)
        found += [best_by_rank(within, even) or least_full(within, even), best_by_rank(within, even, lean=True)]
    found += [] if family.takes_costs else [by_stage]
    return list(dict.fromkeys(cut for cut in found if cut is not None))


def _keeps(profile: Profile, one: Candidate, family: ScheduleFamily, ranks: int, rank: int) -> RankKeeps:
    shape = one.shape(ranks)
    copies = 1 + profile.state_bytes_per_parameter_byte + copies_beside(profile, one, family, shape, rank)
    recompute = policies.recomputes(one.policy, family, shape, rank)
    return RankKeeps(copies, *moments_by_piece(family, shape, rank), recompute)
