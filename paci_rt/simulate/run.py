"""What a schedule would do, from what its actions cost: timeline, bubbles, memory, drift.

Every rank runs its stream of actions in order. An action starts when its rank is free and what it needs has arrived;
an output travels over a channel of its own for every pair of neighbouring ranks and every direction, which carries one
message at a time: ``bytes / bandwidth`` of occupation, then ``hop_s`` of latency. Nothing ever waits for room in a
channel (that no schedule needs to is proved by :mod:`paci_rt.schedules.lowering`). ::

    >>> from paci_rt import schedules
    >>> unit = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    >>> simulate(schedules.get("zb-h1"), schedules.Shape(num_stages=4, accumulation=8), unit).makespan_s
    27.0
"""

from __future__ import annotations

from dataclasses import fields

from paci_rt.action import decode
from paci_rt.errors import ScheduleError
from paci_rt.schedules import limits, policies
from paci_rt.schedules.base import ScheduleFamily, Shape, check_shape
from paci_rt.simulate.costs import Costs
from paci_rt.simulate.metrics import Simulation, measure
from paci_rt.simulate.timeline import Work, play

__all__ = ["Costs", "Simulation", "simulate"]

_SHOWN_STUCK = 8


def simulate(
    family: ScheduleFamily,
    shape: Shape,
    costs: Costs,
    *,
    windows: int = 1,
    policy: str | None = None,
    lookahead: bool | None = None,
    keep_events: bool = False,
) -> Simulation:
    """Play ``windows`` windows of a schedule, from an empty pipeline to an empty one.

    A thousand ranks and ten thousand micro-batches take seconds and about a gigabyte. A searched schedule is taken for
    ``shape.costs``; it is for the caller to fit those to ``costs``.

    Args:
        family: the schedule, for example ``schedules.get("paci")``.
        shape: its integers.
        costs: what each action takes.
        windows: updates of every stage.
        policy: which weights forwards and backwards use; by default the schedule's own
            (``paci_rt.schedules.policies``).
        lookahead: whether early forwards look ahead (``paci_rt.weights.lookahead``); by default as the schedule does.
        keep_events: fill ``Simulation.events``, a Python object for every action.

    Raises:
        ValueError: values that do not fit together; the message names the value and the remedy.
        ScheduleError: the order cannot run to its end; the message names the actions that nothing gets past.

    Example:
        >>> from paci_rt import schedules
        >>> from paci_rt.simulate import Costs, simulate
        >>> unit = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
        >>> shape = schedules.Shape(num_stages=4, accumulation=8)
        >>> simulate(schedules.get("zb-h1"), shape, unit).makespan_s
        27.0
        >>> result = simulate(schedules.get("paci"), shape, unit, windows=10)
        >>> result.steady_utilization, result.max_drift
        (1.0, 1)
    """
    limits.check_integer("windows", windows, 1, limits.MOST_WINDOWS)
    check_shape(family, shape)
    size = shape.num_stages * windows * (shape.accumulation * (3 if family.split else 2) + 1)
    limits.check_actions(size, "simulate plays", limits.MOST_ACTIONS, "windows, micro-batches or stages")
    policy = policies.resolve(family, shape, policy)
    ahead = policies.looks_ahead(family, policy, lookahead)
    for field in fields(costs):
        if field.name != "micro_batch_factors" and isinstance(getattr(costs, field.name), tuple):
            costs.per_stage(field.name, shape.num_stages)
    work = Work(family, shape, costs, windows, policy, ahead)
    stuck = play(work)
    if len(stuck):
        names = ", ".join(map(str, decode(stuck[:_SHOWN_STUCK])))
        more = f" and {len(stuck) - _SHOWN_STUCK} more" if len(stuck) > _SHOWN_STUCK else ""
        raise ScheduleError(
            f"schedule {family.name} deadlocks: nothing can run past {names}{more}; each waits for an action that "
            "comes later, or never"
        )
    return measure(work, keep_events=keep_events)
