"""How large the numbers may be that people give: beyond these, work or memory would grow without an end in sight.

Far above what any pipeline has, and small enough that what is computed from them ends.
"""

from __future__ import annotations

import math
from typing import Any

from paci_rt.wording import shown

MOST_STAGES = 1 << 17
MOST_PLANNED = 4096
"""Stages whose slack is planned: the plan looks at every pair of them."""
MOST_MICRO_BATCHES = 1 << 20
"""In a window, and of slack."""
MOST_WINDOWS = 10**7
MOST_ACTIONS = 10**8
"""Of all stages together, that one simulation plays."""
MOST_CHECKED = 2 * 10**6
"""Of all stages together, that are checked before a pipeline runs."""
MOST_SEARCHED = 50_000
"""Stages times micro-batches that an order is searched for."""
MOST_SECONDS = 1e9
"""Thirty years: more than any operation takes, and sums of it are finite."""
MOST_BYTES = float(1 << 60)


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless ``value`` is an integer in these bounds; ``name`` as the message shall have it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {shown(value)}: give an integer of at least {least}")
    if value > most:
        raise ValueError(f"{name} is {shown(value)}: give at most {most:,}")


def check_activation_limit(limit: Any, name: str = "activation_limit") -> None:
    """Raise ValueError unless ``limit`` is None or a number of whole stages, of at least 1."""
    if limit is not None and not (is_number(limit, MOST_MICRO_BATCHES) and limit >= 1):
        raise ValueError(
            f"{name} is {shown(limit)}: give what a rank may hold, in whole stages of two pieces each: at least 1, "
            "such as 4.5; or leave it out for the least at full rate"
        )


def check_actions(count: int, what: str, most: int, remedy: str) -> None:
    """Raise ValueError where ``what`` would have more actions than ``most``."""
    if count > most:
        raise ValueError(f"{what} at most {most:,} actions, and these are {shown(count)}: give fewer {remedy}")


def is_number(value: Any, most: float) -> bool:
    """Whether ``value`` is a real number from 0 to ``most``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most and value < math.inf
