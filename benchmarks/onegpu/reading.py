"""What a trace says of whole windows in the steady state, and what the simulator makes of it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onegpu.run import Case
from paci_rt.action import Action, Op
from paci_rt.schedules import StepCosts
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import Event
from schedules import Link


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What whole windows show, from the end of one update to that of a later one, stage by stage.

    Attributes:
        micro_batches_per_s: micro-batches of these windows over the seconds that they took, mean over the stages.
        utilization: share of these seconds inside actions, mean over the stages.
        took_s: mean length of each operation that ran, by stage, without those right after an update.
        update_s: what an update costs, by stage: its own length and what the action after it takes longer than others
            of its kind, since it waits for the new weights.
        noise: standard deviation of the operations' lengths over their means, the median of all.
    """

    micro_batches_per_s: float
    utilization: float
    took_s: dict[Op, tuple[float, ...]]
    update_s: tuple[float, ...]
    noise: float


@dataclass(frozen=True)
class _Stage:
    """What one stage shows."""

    wall_s: float
    busy_s: float
    took_s: dict[Op, list[float]]
    update_s: float


def read(events: Sequence[Event], case: Case, first: int, last: int) -> Reading:
    """Read the windows from the end of update ``first`` to the end of update ``last`` of each stage.

    Args:
        events: those of each stage in the order in which they ran.
        case: what ran.
        first, last: numbers of updates.
    """
    rows: list[list[tuple[Action, Event]]] = [[] for _ in range(case.stages)]
    for event in events:
        rows[event.stage].append((Action.parse(event.action), event))
    stages = [_read_stage(row, stage, first, last) for stage, row in enumerate(rows)]
    micro_batches = (last - first) * case.accumulation
    ops = [op for op in (Op.F, Op.B, Op.I, Op.W) if stages[0].took_s[op]]
    spread = [
        statistics.pstdev(one.took_s[op]) / statistics.mean(one.took_s[op])
        for one in stages
        for op in ops
        if statistics.mean(one.took_s[op])
    ]
    return Reading(
        micro_batches_per_s=micro_batches / statistics.mean(one.wall_s for one in stages),
        utilization=statistics.mean(one.busy_s / one.wall_s for one in stages),
        took_s={op: tuple(statistics.mean(one.took_s[op]) for one in stages) for op in ops},
        update_s=tuple(one.update_s for one in stages),
        noise=statistics.median(spread),
    )


def _read_stage(row: Sequence[tuple[Action, Event]], stage: int, first: int, last: int) -> _Stage:
    place = {action: at for at, (action, _) in enumerate(row)}
    begin, end = (place[Action(stage, Op.U, number)] for number in (first, last))
    lengths = [event.end_s - event.start_s for _, event in row]
    inside = range(begin + 1, end + 1)
    usual: dict[Op, list[float]] = defaultdict(list)
    late: dict[Op, list[float]] = defaultdict(list)
    for at in inside:
        after_update = row[at - 1][0].op is Op.U
        (late if after_update else usual)[row[at][0].op].append(lengths[at])
    for op in late.keys() - usual.keys():  # each of them follows an update, and nothing tells what it takes by itself
        usual[op] = late.pop(op)
    waits = [length - statistics.mean(usual[op]) for op, found in late.items() for length in found]
    own = statistics.mean(usual.pop(Op.U))
    return _Stage(
        wall_s=row[end][1].end_s - row[begin][1].end_s,
        busy_s=sum(lengths[at] for at in inside),
        took_s=usual,
        update_s=own + max(0.0, statistics.mean(waits) if waits else 0.0),
    )


def step_costs(reading: Reading, hop_s: float) -> StepCosts:
    """What a searched schedule is fitted to, from a run with split backwards; milliseconds."""
    forward, input_grad, weight_grad = (
        tuple(seconds * 1e3 for seconds in reading.took_s[op]) for op in (Op.F, Op.I, Op.W)
    )
    return StepCosts(forward, input_grad, weight_grad, hop=hop_s * 1e3)


def predict(case: Case, reading: Reading, link: Link, windows: int) -> float:
    """Micro-batches/s that the simulator gives for the lengths of operations in this run, and for what lay between
    actions in a run of 1F1B."""

    def with_gap(seconds: Sequence[float]) -> tuple[float, ...]:
        return tuple(one + link.between_s for one in seconds)

    took, split = reading.took_s, case.family.split
    costs: dict[str, Any] = {
        "forward_s": with_gap(took[Op.F]),
        "input_grad_s": with_gap(took[Op.I] if split else took[Op.B]),
        "weight_grad_s": with_gap(took[Op.W]) if split else (0.0,),
        "update_s": with_gap(reading.update_s),
    }
    return simulate(
        case.family,
        case.shape,
        Costs(**costs, hop_s=max(0.0, link.hop_s - link.between_s), noise=reading.noise),
        windows=2 * case.warm_up + windows,
        lookahead=False,
    ).micro_batches_per_s
