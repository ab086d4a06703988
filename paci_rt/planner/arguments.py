"""What :func:`paci_rt.planner.plan` is asked for, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paci_rt.planner.profile import Profile
from paci_rt.schedules import limits
from paci_rt.wording import shown

MOST_ACCUMULATION = 1 << 14
"""Micro-batches an update, of which every candidate is simulated."""
MOST_CHOICES = 64


def check_choices(profile: Profile, stages: int, accumulations: Sequence[int], chunks: Sequence[int]) -> None:
    """Raise ValueError unless there is something to choose from, within the limits."""
    for name, values, most in (
        ("stages", (stages,), limits.MOST_STAGES),
        ("accumulation", accumulations, MOST_ACCUMULATION),
        ("chunks", chunks, limits.MOST_STAGES),
    ):
        need_list(name, values)
        if not len(values):
            raise ValueError(f"no {name} to choose from: give at least one")
        if len(values) > MOST_CHOICES:
            raise ValueError(f"{len(values):,} numbers for {name} to choose from: give at most {MOST_CHOICES}")
        for value in values:
            limits.check_integer(name, value, 1, most)
    if stages > profile.middle:
        raise ValueError(
            f"{stages} stages, but there are only {profile.middle} blocks to cut between; ask for at most "
            f"{profile.middle} stages"
        )
    if not any(block.compute_s for block in profile.blocks):
        raise ValueError("no block of the profile takes any time, so there is nothing to plan for: measure again")


def need_list(name: str, values: Any, of: type = object) -> None:
    """Raise ValueError unless ``values`` is a list or tuple, of strings where ``of`` says so."""
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, of) for value in values):
        raise ValueError(f"{name} is {shown(values)}: give a list{' of names' if of is str else ''}")


def check_limit(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is None or a number of updates."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{name} is {shown(value)}: give a number of updates, at least 0")


def memory_limits(given: Any, stages: int) -> tuple[float, ...]:
    """Bytes of each device; infinite where there is no limit.

    Raises:
        ValueError: they are no sizes, or of another number of devices.
    """
    if given is None:
        return (math.inf,) * stages
    values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if len(values) not in (1, stages):
        raise ValueError(f"{len(values)} memory limits for {stages} stages: give one for all devices, or one for each")
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1 <= value <= limits.MOST_BYTES:
            size = f"{value:g}" if isinstance(value, float) else shown(value)
            raise ValueError(f"memory limit is {size} bytes: give more than 0, from 1 to {limits.MOST_BYTES:g}")
    return tuple(map(float, values * stages if len(values) == 1 else values))
