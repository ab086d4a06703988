"""Bytes that a candidate needs on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paci_rt.action import OPS, Op, decode_fields
from paci_rt.planner.candidate import Candidate
from paci_rt.planner.profile import Profile
from paci_rt.planner.stage_costs import Spans
from paci_rt.schedules import ScheduleFamily, Shape, policies
from paci_rt.simulate.costs import Floats


@dataclass(frozen=True)
class Keeps:
    """What a rank keeps.

    Attributes:
        extra: copies of its weights besides the current ones.
        moments: micro-batches between F and backward, and between I and W, at the moments when both are most.
        recompute: whether forwards run twice.
    """

    extra: int
    moments: tuple[tuple[int, int], ...]
    recompute: bool


def copies_beside(profile: Profile, one: Candidate, family: ScheduleFamily, shape: Shape, rank: int) -> int:
    """Copies of its weights that ``rank`` holds besides the current ones."""
    return policies.copies_held(one.policy, family, shape, rank, one.lookahead, masters=profile.has_masters)


def what_is_kept(profile: Profile, one: Candidate, family: ScheduleFamily, shape: Shape, rank: int) -> Keeps:
    """What ``rank`` keeps under a candidate's schedule and policy."""
    if family.split and one.chunks == 1:
        moments = _moments(family, shape, rank)
    else:
        moments = ((family.in_flight_bound(shape, rank), 0),)
    recompute = policies.recomputes(one.policy, family, shape, rank)
    return Keeps(copies_beside(profile, one, family, shape, rank), moments, recompute)


def peak_bytes(spans: Spans, keeps: Keeps, stage: int) -> Floats:
    """``[i, j]``: peak bytes of ``stage`` with middle blocks ``i ... j - 1``."""
    weights = spans.total("parameter_bytes", stage)
    activations, stashes = spans.total("activation_bytes", stage), spans.total("stash_bytes", stage)
    kept, during = activations, np.zeros_like(activations)
    if keeps.recompute:
        kept = np.broadcast_to(spans.arriving(stage), activations.shape)
        during = np.maximum(activations - kept, 0.0)
    held = [forwards * kept + stashed * stashes for forwards, stashed in keeps.moments]
    fixed = 1 + spans.profile.state_bytes_per_parameter_byte + keeps.extra
    return np.asarray(fixed * weights + np.maximum.reduce(held) + during)


def needs(spans: Spans, keeps: Sequence[Keeps], partition: Sequence[int]) -> list[float]:
    """Peak bytes of each device under a partition with one stage a device."""
    ends = np.cumsum((0, *partition))
    return [float(peak_bytes(spans, kept, stage)[ends[stage], ends[stage + 1]]) for stage, kept in enumerate(keeps)]


def _moments(family: ScheduleFamily, shape: Shape, rank: int) -> tuple[tuple[int, int], ...]:
    """Forwards in flight and stashes of one rank at the moments that no other exceeds in both."""
    windows = 1 if family.flush else 2 + -(-family.in_flight_bound(shape, rank) // shape.accumulation)
    op = decode_fields(family.stream(shape, rank, windows))[1]
    codes = {one: OPS.index(one) for one in (Op.F, Op.B, Op.I, Op.W)}
    halves = (op == codes[Op.I]).astype(np.int64)
    forwards = np.cumsum((op == codes[Op.F]).astype(np.int64) - (op == codes[Op.B]) - halves)
    stashes = np.cumsum(halves - (op == codes[Op.W]))
    return _undominated(forwards, stashes)


def _undominated(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for pair in sorted(set(zip(first.tolist(), second.tolist(), strict=True)), reverse=True):
        if not found or pair[1] > found[-1][1]:
            found.append(pair)
    return tuple(found)
