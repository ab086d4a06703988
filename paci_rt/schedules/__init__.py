"""Schedules as data: ``get("paci")`` returns the functions that turn integers into action streams."""

from __future__ import annotations

from paci_rt.schedules.base import ScheduleFamily, Shape, StepCosts
from paci_rt.schedules.flush import GPIPE, ONE_F_ONE_B
from paci_rt.schedules.interleaved import INTERLEAVED_1F1B, INTERLEAVED_ZB, LOOPED_BFS
from paci_rt.schedules.paci import ASYNC_1F1B, PACI, PACI_SPLIT
from paci_rt.schedules.paci_v import PACI_V
from paci_rt.schedules.pipedream import PIPEDREAM, PIPEDREAM_2BW
from paci_rt.schedules.placement import Placement
from paci_rt.schedules.search import ZB_1P, ZB_2P
from paci_rt.schedules.slack import AUTO, Slack, plan_slack, steady_period
from paci_rt.schedules.v_blocks import V_HALF, V_MIN
from paci_rt.schedules.v_flush import DUALPIPE_V, ZB_V
from paci_rt.schedules.zero_bubble import ZB_H1, ZB_H2
from paci_rt.wording import unknown

FAMILIES: dict[str, ScheduleFamily] = {
    family.name: family
    for family in (
        *(PACI, PACI_SPLIT, PACI_V, ONE_F_ONE_B, GPIPE, INTERLEAVED_1F1B, LOOPED_BFS, ZB_H1, ZB_H2, ZB_1P, ZB_2P),
        *(INTERLEAVED_ZB, ZB_V, V_HALF, V_MIN, DUALPIPE_V),
        *(ASYNC_1F1B, PIPEDREAM, PIPEDREAM_2BW),
    )
}


def get(name: str) -> ScheduleFamily:
    """The family called ``name``, in any case.

    Args:
        name: a key of ``FAMILIES``.

    Raises:
        ValueError: no schedule has that name; the message suggests the nearest.

    Example:
        >>> from paci_rt import schedules
        >>> schedules.get("ZB-H1").split
        True
        >>> schedules.get("zbh1")
        Traceback (most recent call last):
        ValueError: unknown schedule 'zbh1': did you mean 'zb-h1'? ...
    """
    family = FAMILIES.get(name.lower())
    if family is None:
        raise unknown("schedule", name, FAMILIES)
    return family


__all__ = [
    "AUTO",
    "FAMILIES",
    "Placement",
    "ScheduleFamily",
    "Shape",
    "Slack",
    "StepCosts",
    "get",
    "plan_slack",
    "steady_period",
]
