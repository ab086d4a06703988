"""``--slack`` as it is typed: a number, one per stage, or ``auto``, which needs to know how long messages take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paci_rt.planner.profile import load_profile
from paci_rt.planner.stage_costs import loops, stage_costs
from paci_rt.schedules import AUTO, ScheduleFamily, Shape, Slack, policies
from paci_rt.schedules.base import check_takes
from paci_rt.schedules.slack import check_slack, one_if_uniform
from paci_rt.simulate import Costs


def planned(costs: Costs, family: ScheduleFamily, shape: Shape, policy: str) -> Slack | None:
    """The slack that hides the links of ``costs``; None where messages take no time, so that nothing is known of
    them."""
    again = [policies.recomputes(policy, family, shape, stage) for stage in range(shape.num_stages)]
    waits = loops(costs, again, split=family.split)
    known = costs.hop_s or (any(costs.message_bytes) and costs.bandwidth_bytes_per_s < math.inf)
    return one_if_uniform(waits.plan()) if known else None


def checked(slack: Any, family: ScheduleFamily, num_stages: int) -> Slack:
    """``slack`` as ``schedules.Shape`` keeps it; 0 in place of ``auto``.

    Raises:
        ValueError: no such slack, or a schedule that takes none.
    """
    auto = isinstance(slack, str) and slack == AUTO
    try:
        value = 0 if auto else check_slack(slack, num_stages)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    check_takes(family, slack=AUTO if auto else value, prefix="--")
    return value


def from_profile(
    path: str | None,
    run: Mapping[str, Any],
    partition: Sequence[int],
    family: ScheduleFamily,
    shape: Shape,
    policy: str | None,
) -> Slack:
    """What ``--slack auto`` of ``paci-rt train`` stands for.

    Args:
        path: a file of ``paci-rt plan --profile``.
        run: what the profile must be of: model, dtype, rows, seq_len, threads.
        partition: blocks by stage.
        family, shape, policy: the schedule without slack.

    Raises:
        ValueError: no profile, one of something else, or one that does not know the links.
    """
    if path is None:
        raise ValueError(
            "--slack auto needs to know how long stages and messages take: give --profile FILE, which paci-rt plan "
            "--profile FILE --measure-link writes, or give --slack as numbers"
        )
    profile = load_profile(path)
    for name, value in run.items():
        if profile.profiled.get(name) != value:
            raise ValueError(
                f"--profile {path} was measured with {name} {profile.profiled.get(name)}, and this run has {value}: "
                "measure again, or give --slack as numbers"
            )
    costs = stage_costs(profile, partition)
    slack = planned(costs, family, shape, policies.resolve(family, shape, policy))
    if slack is None:
        raise ValueError(
            f"--profile {path} says nothing about how long messages take: write another by paci-rt plan --profile NEW "
            "--measure-link, or with --hop-ms, or give --slack as numbers"
        )
    return slack
