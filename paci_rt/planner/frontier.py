"""What activations buy: utilization, drift and delay of stages in a V under one activation limit after another, and of
the line, where slack is what activations go into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from paci_rt import schedules
from paci_rt.planner.stage_costs import loops, step_costs
from paci_rt.schedules import ScheduleFamily, Shape, Slack, limits, v_search
from paci_rt.schedules.base import StepCosts
from paci_rt.schedules.slack import slack_text
from paci_rt.simulate import Costs, Simulation, simulate

POINTS = 8
"""At most so many limits, and so many choices of slack, are tried."""


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One order and what it reaches, by simulation.

    Attributes:
        schedule: its name.
        activation_limit: of ``paci-v``, in whole stages; None where it has none, and for the others.
        slack: of ``paci``; 0 for the others.
        activations: forwards without their backward on the fullest rank, in whole stages: a rank's share of the model.
        stashes: likewise between I and W.
        utilization, micro_batches_per_s: in the steady state; of the whole run where it had none, see ``steady``.
        steady: there were enough windows for a steady state.
        drift, delay: largest of any micro-batch, in updates.
        dominated: another point needs no more activations and is no slower, and better in one of them.

    Example:
        >>> from paci_rt.planner import frontier
        >>> from paci_rt.simulate import Costs
        >>> costs = Costs(forward_s=(0.5,), input_grad_s=(0.5,), weight_grad_s=(0.5,), hop_s=0.03)
        >>> [(one.schedule, one.activations) for one in frontier(2, 8, costs) if not one.dominated]
        [('paci-v', 1.0), ('paci-v', 1.5)]
    """

    schedule: str
    activation_limit: float | None
    slack: Slack
    activations: float
    stashes: float
    utilization: float
    micro_batches_per_s: float
    drift: int
    delay: int
    dominated: bool = False
    steady: bool = True

    @property
    def label(self) -> str:
        """Name and what is varied."""
        if schedules.get(self.schedule).takes_activation_limit:
            limit = "no limit" if self.activation_limit is None else f"limit {self.activation_limit:g}"
            return f"{self.schedule}, {limit}"
        return f"{self.schedule}, slack {slack_text(self.slack)}"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self)
        return {**values, "slack": list(self.slack) if isinstance(self.slack, tuple) else self.slack}


def frontier(
    ranks: int, accumulation: int, costs: Costs, *, line: Costs | None = None, windows: int | None = None
) -> tuple[FrontierPoint, ...]:
    """Points by activations, those of the V and those of the line.

    Args:
        ranks: processes.
        accumulation: micro-batches an update.
        costs: of the ``2 * ranks`` pieces of the V.
        line: of the ``ranks`` stages of the line; by default, each is two neighbouring pieces of the V.
        windows: to simulate; enough to reach the steady state by default.

    Raises:
        ValueError: values that do not fit together.

    Example:
        >>> from paci_rt.planner import frontier
        >>> from paci_rt.simulate import Costs
        >>> costs = Costs(forward_s=(0.5,), input_grad_s=(0.5,), weight_grad_s=(0.5,))
        >>> found = frontier(4, 8, costs)
        >>> min(one.activations for one in found if one.utilization == 1)
        2.0
    """
    points: dict[tuple[Any, ...], FrontierPoint] = {}
    for family, shape, of_shape in _orders(ranks, accumulation, costs, merged(costs, ranks) if line is None else line):
        found = simulate(family, shape, of_shape, windows=windows or _windows(family, shape))
        point = _point(shape, found)
        # Of limits that lead to the same, the tightest says it.
        points[point.schedule, point.slack, point.activations, round(point.utilization, 9)] = point
    sorted_points = sorted(points.values(), key=lambda one: (one.activations, -one.utilization, one.schedule))
    return tuple(replace(one, dominated=any(_beats(other, one) for other in sorted_points)) for one in sorted_points)


def merged(costs: Costs, ranks: int) -> Costs:
    """Costs of a line of ``ranks`` stages, each of which does the work of two neighbouring pieces."""
    values: dict[str, Any] = {}
    for name in Costs.__dataclass_fields__:
        value = getattr(costs, name)
        if isinstance(value, tuple) and name != "micro_batch_factors":
            each = costs.per_stage(name, 2 * ranks).tolist()
            pairs = list(zip(each[::2], each[1::2], strict=True))
            if name == "message_bytes":
                value = tuple(last for _, last in pairs)
            elif name == "input_bytes":
                value = tuple(first for first, _ in pairs)
            else:
                value = tuple(first + last for first, last in pairs)
        values[name] = value
    return Costs(**values)


def _orders(ranks: int, accumulation: int, costs: Costs, line: Costs) -> Iterator[tuple[ScheduleFamily, Shape, Costs]]:
    fitted = _fitted(costs, 2 * ranks)
    in_a_v = Shape(num_stages=2 * ranks, accumulation=accumulation, chunks=2, placement="v", costs=fitted)
    for limit in limits_to_try(ranks, fitted):
        yield schedules.get("paci-v"), replace(in_a_v, activation_limit=limit), costs
    choices = loops(_spread(line, ranks), [False] * ranks, split=False).choices()
    for slack in choices[:: math.ceil(len(choices) / POINTS)] + choices[-1:]:
        yield schedules.get("paci"), Shape(num_stages=ranks, accumulation=accumulation, slack=slack), line


def _spread(costs: Costs, stages: int) -> Costs:
    """With one time for each of ``stages``."""
    names = ("forward_s", "input_grad_s", "weight_grad_s")
    values: dict[str, Any] = {name: tuple(costs.per_stage(name, stages).tolist()) for name in names}
    return replace(costs, **values)


def _fitted(costs: Costs, stages: int) -> StepCosts:
    fitted = step_costs(_spread(costs, stages), [False] * stages)
    return fitted if any(costs.activation_bytes) else fitted._replace(stash=StepCosts().stash)


def limits_to_try(ranks: int, costs: StepCosts) -> list[float | None]:
    """None, and from what full rate takes down to a single micro-batch, in whole and half stages."""
    most = v_search.find(ranks, costs).activations
    step = max(0.5, math.ceil(2 * (most - 1) / (POINTS - 2)) / 2)
    return [None, *(most - step * at for at in range(POINTS - 2) if most - step * at > 1), 1.0]


def _windows(family: ScheduleFamily, shape: Shape) -> int:
    ahead = max(family.in_flight_bound(shape, rank) for rank in range(shape.ranks))
    needed = 8 + -(-(2 * ahead + 4 * shape.ranks) // shape.accumulation)
    size = shape.num_stages * needed * (shape.accumulation * 3 + 1)
    limits.check_actions(size, "a frontier plays", limits.MOST_ACTIONS, "micro-batches or stages")
    return needed


def _point(shape: Shape, found: Simulation) -> FrontierPoint:
    return FrontierPoint(
        schedule=found.schedule,
        activation_limit=shape.activation_limit,
        slack=shape.slack,
        activations=max(found.peak_activations.values()) / shape.chunks,
        stashes=max(found.peak_stashes.values()) / shape.chunks,
        utilization=found.steady_utilization,
        micro_batches_per_s=found.micro_batches_per_s,
        drift=found.max_drift,
        delay=found.max_delay,
        steady=found.steady_windows > 0,
    )


def _beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    no_worse = one.activations <= other.activations and one.utilization >= other.utilization - 1e-6
    return no_worse and (one.activations < other.activations or one.utilization > other.utilization + 1e-6)
