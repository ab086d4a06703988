"""In-flight slack: how many forwards a stage runs ahead of its backwards, and how many it takes to hide link latency.

Stage ``i`` of ``P`` warms up with ``w_i = P-1-i + s_i`` forwards; ``s_i`` is its slack. In the steady state it then
alternates: forward ``m``, backward ``m - w_i``. Let ``T_i`` be what both take together and ``c_i`` the latency of the
link from ``i`` to ``i+1``, the same in both directions. Who waits for whom is a graph. Forwards lead down the pipeline
only and backwards up only, so a closed walk that meets nothing twice goes down some run of stages ``a ... b``, turns,
and comes back up the same::

    forward m of stages a, a+1, ... b, backward of b for micro-batch m - w_b, backwards of b-1, ... a for that one,
    and, next on stage a, forward m - w_b + w_a + 1

The loop takes ``T_a + ... + T_b + 2 (c_a + ... + c_{b-1})`` and gets ``w_a - w_b + 1`` micro-batches further. (Where W
comes after the gradient has been sent, the loop meets that of stage ``a`` only.) A system of such waits settles to the
longest time per micro-batch of all loops (the maximum cycle ratio: Baccelli, Cohen, Olsder, Quadrat, Synchronization
and Linearity, 1992, chapter 3). So

    period = max over a <= b of  (T_a + ... + T_b + 2 (c_a + ... + c_{b-1})) / (w_a - w_b + 1)

and a loop that gets no further stops everything: orders that run are those with ``w_a >= w_b`` for all ``a < b``.

To keep a period ``t``, each loop needs ``w_a >= w_b + ceil((...) / t) - 1``. Such constraints have one smallest
solution, which is smallest on every stage at once; it is found from the last stage to the first. With equal stages and
``t = T`` a link of any latency up to ``T/2`` takes ``w_i - w_{i+1} = 2``: differences are whole, hence the same
slack on two neighbours never hides the link between them.

Slack of single stages may be below 0, down to ``-(P-1-i)``: fewer in flight, which takes less memory and makes fewer
forwards early, at a longer period.

Updates come on top, once per window: no walk meets more of them than it passes windows, so with updates of ``U_i`` the
period is at least ``max T_i + U_i / a`` and at most the above plus ``max U_i / a``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from paci_rt.schedules import limits
from paci_rt.wording import shown

Slack = int | tuple[int, ...]
"""One number of at least 0 for all stages but the last, or one for each, the last of them 0. One of ``P-1-i`` below 0
leaves stage ``i`` no forward ahead."""

AUTO = "auto"
"""In place of slack: as much as hides the latency of links, see :func:`plan_slack`."""

TOLERANCE = 0.01
_ROUNDING = 1e-9  # periods this close are the same


def check_slack(slack: Any, num_stages: int) -> Slack:
    """``slack`` in its one form: a single number where that says the same.

    Raises:
        ValueError: no such slack, or one with which no order would run to its end.
    """
    if isinstance(slack, (tuple, list)):
        return one_if_uniform(_check_each(tuple(slack), num_stages))
    if not _is_count(slack):
        raise ValueError(
            f"slack is {shown(slack)}: give an integer of at least 0, or one for each stage with 0 for the last"
        )
    _check_most(slack)
    return slack  # type: ignore[no-any-return]


def _check_most(slack: int) -> None:
    if slack > limits.MOST_MICRO_BATCHES:
        raise ValueError(f"slack is {shown(slack)}: give at most {limits.MOST_MICRO_BATCHES:,}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_each(slack: tuple[Any, ...], num_stages: int) -> tuple[int, ...]:
    text = ",".join(map(shown, slack[:20])) + (", ..." if len(slack) > 20 else "")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in slack):
        raise ValueError(f"slack is {text}: give integers, one for each stage")
    if len(slack) != num_stages:
        raise ValueError(
            f"slack is {text}, which is for {len(slack)} stages, and there are {num_stages}: give one number for all "
            "stages but the last, or one for each"
        )
    _check_most(max(slack))
    for stage, value in enumerate(slack):
        if value < stage + 1 - num_stages:
            raise ValueError(
                f"slack is {text}: stage {stage} runs {num_stages - 1 - stage} forwards ahead without any, so give it "
                f"at least {stage + 1 - num_stages}"
            )
    if slack[-1]:
        raise ValueError(f"slack is {text}: the last stage waits for no gradient, so end with 0")
    for stage, (here, after) in enumerate(itertools.pairwise(slack)):
        if after > here + 1:
            raise ValueError(
                f"slack is {text}: stage {stage + 1} would run {num_stages - 2 - stage + after} forwards ahead, and "
                f"stage {stage} before it only {num_stages - 1 - stage + here}, so it would wait for ever; give stage "
                f"{stage} at least {after - 1}"
            )
    return slack


def one_if_uniform(slack: tuple[int, ...]) -> Slack:
    """A single number where it says the same as one per stage and can."""
    return slack[0] if len(set(slack[:-1])) <= 1 and slack[0] >= 0 else slack


def slack_by_stage(slack: Slack, num_stages: int) -> tuple[int, ...]:
    """One number per stage, 0 for the last."""
    return slack if isinstance(slack, tuple) else (slack,) * (num_stages - 1) + (0,)


def warm_ups(slack: Slack, num_stages: int) -> tuple[int, ...]:
    """``w_i``: forwards that each stage runs ahead of its backwards."""
    return tuple(num_stages - 1 - stage + more for stage, more in enumerate(slack_by_stage(slack, num_stages)))


def parse_slack(text: str) -> Slack | str:
    """Read ``2``, ``7,6,5,0`` or ``auto``; whether it fits the stages is for :func:`check_slack` to say.

    Raises:
        ValueError: neither of them.
    """
    if text == AUTO:
        return AUTO
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{shown(text)} is not a slack: write 2, or one number per stage such as 3,2,1,0, or auto"
        ) from None
    return values if len(values) > 1 else values[0]


def slack_text(slack: Slack | str) -> str:
    """What :func:`parse_slack` reads back."""
    return ",".join(map(str, slack)) if isinstance(slack, tuple) else str(slack)


# ---------------------------------------------------------------------------------------------------------- planning


class Loops:
    """Who waits for whom in a pipeline, see the top of this file.

    Args:
        stage_times: forward and backward of a micro-batch, by stage; any unit.
        hops: latency of each link, the same in both directions; one less than stages.
        after_send: part of each stage's time that comes after its gradient has been sent (its W); none by default.
        least_period: what nothing can beat anyway, such as the time that a link is busy with one message.

    Attributes:
        stages: how many.
        shortest_period: what the slowest stage takes, or ``least_period``.

    Raises:
        ValueError: times that are negative or not finite, or numbers that do not fit together.
    """

    def __init__(
        self,
        stage_times: Sequence[float],
        hops: Sequence[float],
        *,
        after_send: Sequence[float] = (),
        least_period: float = 0.0,
    ) -> None:
        whole, links = _times("stage_times", stage_times), _times("hops", hops)
        late = _times("after_send", after_send) if len(after_send) else np.zeros_like(whole)
        self.stages = len(whole)
        if self.stages > limits.MOST_PLANNED:
            raise ValueError(
                f"stage_times has {self.stages:,} values: slack is planned for at most {limits.MOST_PLANNED:,}"
            )
        if not self.stages:
            raise ValueError("stage_times is empty: give one time per stage")
        if len(links) != self.stages - 1:
            raise ValueError(
                f"hops has {len(links)} values for {self.stages} stages: give one per link, {self.stages - 1}"
            )
        if len(late) != self.stages or (late > whole).any():
            raise ValueError("after_send must give each stage a part of its stage_times")
        # A loop meets what comes after the send only on its first stage, where it waits for the next forward.
        before = np.concatenate(([0.0], np.cumsum(whole - late)))
        linked = np.concatenate(([0.0], np.cumsum(links)))
        # [a, b]: what the loop over stages a ... b takes.
        self._times = before[None, 1:] - before[:-1, None] + late[:, None] + 2 * (linked[None, :] - linked[:, None])
        self.shortest_period = max(float(whole.max()), _time("least_period", least_period))

    def period(self, slack: Slack | Sequence[int] = 0) -> float:
        """Time from one micro-batch to the next in the steady state; updates come on top.

        Raises:
            ValueError: no slack that these stages can have.
        """
        warm_up = np.array(warm_ups(check_slack(slack, self.stages), self.stages))
        further = warm_up[:, None] - warm_up[None, :] + 1
        inside = np.triu(np.ones_like(further, dtype=bool))
        return max(float((self._times[inside] / further[inside]).max()), self.shortest_period)

    def least_slack(self, period: float) -> tuple[int, ...]:
        """The least slack, by stage, that keeps ``period``, or else the shortest that can be: no stage could do with
        less."""
        period = max(period, self.shortest_period)
        last = self.stages - 1
        warm_up = [0] * self.stages
        for stage in reversed(range(last)):
            warm_up[stage] = last - stage
            for end in range(stage + 1, self.stages):
                rounds = float(self._times[stage, end]) / period if period else 0.0
                if rounds > limits.MOST_MICRO_BATCHES:
                    raise ValueError(
                        f"the links between stages {stage} and {end} take {rounds:.3g} times as long as a micro-batch: "
                        f"no slack hides that, at most {limits.MOST_MICRO_BATCHES:,} can be planned"
                    )
                warm_up[stage] = max(warm_up[stage], warm_up[end] + max(0, math.ceil(rounds * (1 - _ROUNDING)) - 1))
        return tuple(count - (last - stage) for stage, count in enumerate(warm_up))

    def plan(self, tolerance: float = TOLERANCE) -> tuple[int, ...]:
        """The least slack with which a micro-batch takes at most ``1 + tolerance`` times the shortest period.

        Raises:
            ValueError: a tolerance below 0 or not finite.
        """
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance!r}: give a share of at least 0, such as 0.01")
        return self.least_slack(self.shortest_period * (1 + tolerance))

    def choices(self, step: float = TOLERANCE) -> list[Slack]:
        """No slack, what :meth:`plan` finds without tolerance, and what lies between.

        Each is the least for its period. Each shortens the period of the one before it by a share of at least
        ``step``, except the last.
        """
        found: list[Slack] = [0]
        while (period := self.period(found[-1])) > self.shortest_period * (1 + _ROUNDING):
            try:
                found.append(one_if_uniform(self.least_slack(period * (1 - step))))
            except ValueError:  # more than can be planned
                break
        return found


def steady_period(
    stage_times: Sequence[float],
    hops: Sequence[float],
    slack: Slack | Sequence[int] = 0,
    *,
    after_send: Sequence[float] = (),
) -> float:
    """Time from one micro-batch to the next in the steady state of an order with ``slack``; see :class:`Loops`.

    Args:
        stage_times, hops, after_send: as for :class:`Loops`, all in one unit.
        slack: one number for all stages but the last, or one for each stage.

    Returns:
        Time per micro-batch, in the unit of the arguments.

    Raises:
        ValueError: times that are no times, or slack that these stages cannot have.

    Example:
        F 1, B 2, and links as slow as a forward: without slack a micro-batch takes 4.5 units of time, with it 3.

        >>> from paci_rt import schedules
        >>> schedules.steady_period([3, 3, 3, 3], [1, 1, 1])
        4.5
        >>> schedules.steady_period([3, 3, 3, 3], [1, 1, 1], slack=(3, 2, 1, 0))
        3.0
    """
    return Loops(stage_times, hops, after_send=after_send).period(slack)


def plan_slack(
    stage_times: Sequence[float],
    hops: Sequence[float],
    *,
    after_send: Sequence[float] = (),
    least_period: float = 0.0,
    tolerance: float = TOLERANCE,
) -> tuple[int, ...]:
    """The least slack, by stage, with which links cost no throughput.

    That is: with which :func:`steady_period` is at most ``1 + tolerance`` times what the slowest stage takes. No stage
    could do with less.

    Args:
        stage_times, hops, after_send, least_period: as for :class:`Loops`.
        tolerance: share of the period that may be lost.

    Returns:
        Slack of every stage, 0 for the last.

    Raises:
        ValueError: times that are no times, or numbers that do not fit together.

    Example:
        >>> from paci_rt import plan_slack
        >>> plan_slack([3, 3, 3, 3], [1, 1, 1])  # F 1, B 2, and a hop as long as a forward
        (3, 2, 1, 0)
        >>> plan_slack([3, 3, 3, 3], [1, 0, 0])  # only the first link is slow
        (1, 0, 0, 0)
        >>> plan_slack([3, 3, 3, 3], [0.5, 0.5, 0.5], after_send=[1, 1, 1, 1])  # W runs while the gradient travels
        (0, 0, 0, 0)
    """
    return Loops(stage_times, hops, after_send=after_send, least_period=least_period).plan(tolerance)


def _times(name: str, values: Sequence[float]) -> npt.NDArray[np.float64]:
    return np.array([_time(name, value) for value in values], dtype=np.float64)


def _time(name: str, value: Any) -> float:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 <= value <= limits.MOST_SECONDS:
        raise ValueError(
            f"{name} has {shown(value)}: give times that are at least 0 and finite, up to {limits.MOST_SECONDS:g}"
        )
    return float(value)
