"""A slow, plain clock for schedules: every action starts as soon as what it needs has ended."""

from __future__ import annotations

from paci_rt.action import Action, Op, decode, dependencies
from paci_rt.schedules import ScheduleFamily, Shape


def longest_rank(family: ScheduleFamily, shape: Shape, times: tuple[float, float, float], hop: float = 0.0) -> float:
    """Longest time, over the ranks, from a rank's first start to the end of its last backward, for one window.

    ``times`` of F, I and W of one stage; a whole B takes those of I and W.
    """
    seconds = {Op.F: times[0], Op.B: times[1] + times[2], Op.I: times[1], Op.W: times[2], Op.U: 0.0}
    left = {rank: decode(family.stream(shape, rank, 1)) for rank in range(shape.ranks)}
    end: dict[Action, float] = {}
    now, first = dict.fromkeys(left, 0.0), {}
    while any(left.values()):
        before = len(end)
        for rank, actions in left.items():
            while actions:
                action = actions[0]
                needs = list(dependencies(action, shape.num_stages, shape.accumulation, split=family.split))
                if not all(need in end for need in needs):
                    break
                arrivals = [end[need] + (hop if shape.rank_of(need.stage) != rank else 0.0) for need in needs]
                start = max([now[rank], *arrivals])
                first.setdefault(rank, start)
                now[rank] = end[action] = start + seconds[action.op]
                actions.pop(0)
        assert len(end) > before, "the schedule is stuck"
    return max(now[rank] - first[rank] for rank in left)


def bubble_rate(family: ScheduleFamily, shape: Shape, times: tuple[float, float, float], hop: float = 0.0) -> float:
    """Share of ``longest_rank`` that is idle."""
    return 1 - shape.accumulation * shape.chunks * sum(times) / longest_rank(family, shape, times, hop)
