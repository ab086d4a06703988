"""What updates take: stage costs measured here, played by the simulator for the schedule of each method."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

import paci_rt
from paci_rt import schedules
from paci_rt.action import Action, Op
from paci_rt.planner import load_profile, plan, stage_costs
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import Event
from staleness.case import METHODS, Method
from staleness.overhead import updates_to
from staleness.report import Table
from staleness.run import make_optimizer
from staleness.tasks import make_task

WINDOWS, LEFT_OUT = 6, 2  # measured, and run before to warm up


def measure_costs(task_name: str, *, layers: int | None, stages: int, accumulation: int) -> Costs:
    """Seconds of F, I, W, U and of a look-ahead, by stage, one thread, each the median over ``WINDOWS`` windows.

    No hop: what links cost is another question (``benchmarks/comm_overlap.py``).
    """
    split = _medians(_trace(task_name, layers, stages, accumulation, Method(schedule="zb-h1")), accumulation)
    ahead = _medians(_trace(task_name, layers, stages, accumulation, Method(lookahead=True)), accumulation)

    def of(op: Op) -> tuple[float, ...]:
        return tuple(split[op, False, stage] for stage in range(stages))

    extra = []
    for stage in range(stages):
        early, timely = ahead.get((Op.F, True, stage)), ahead.get((Op.F, False, stage))
        base = split[Op.F, False, stage] if timely is None else timely
        extra.append(0.0 if early is None else max(0.0, early - base))
    return Costs(
        forward_s=of(Op.F),
        input_grad_s=of(Op.I),
        weight_grad_s=of(Op.W),
        update_s=of(Op.U),
        predict_s=tuple(extra),
    )


def profiled_costs(path: str, stages: int, accumulation: int) -> Costs:
    """Costs of a profile's stages, cut as the planner cuts them for PACI without limits.

    Raises:
        ValueError: the file is not a profile, or has too few blocks.
    """
    profile = load_profile(path)
    chosen = plan(profile, stages=stages, accumulations=[accumulation], schedules=["paci"], slack=0).chosen
    assert chosen.partition is not None
    return stage_costs(profile, chosen.partition)


def _trace(task_name: str, layers: int | None, stages: int, accumulation: int, method: Method) -> list[Event]:
    task = make_task(task_name, layers=layers)
    torch.set_num_threads(1)
    pipeline = paci_rt.LocalPipeline(
        task.build(stages, seed=0),
        schedule=method.schedule,
        lookahead=method.lookahead,
        n_microbatches=accumulation,
        loss_fn=task.loss,
        optimizer=lambda named: make_optimizer(task, method, 1e-3, named),
        trace=True,
    )
    for update in range(LEFT_OUT + WINDOWS):
        x, y = task.batch(update, 0)
        pipeline.step(x, target=y, return_outputs=False)
        if update + 1 == LEFT_OUT:
            pipeline.events.clear()
    return list(pipeline.events)


def _medians(events: list[Event], accumulation: int) -> dict[tuple[Op, bool, int], float]:
    """Median seconds by operation, whether it is a forward that runs early, and stage."""
    found: dict[tuple[Op, bool, int], list[float]] = defaultdict(list)
    for event in events:
        action = Action.parse(event.action)
        early = action.op is Op.F and action.index // accumulation > event.version
        found[action.op, early, event.stage].append(event.end_s - event.start_s)
    return {key: statistics.median(times) for key, times in found.items()}


@dataclass(kw_only=True)
class Clock:
    """Seconds from the start of training to the end of each update, by schedule.

    Args:
        costs: of every stage.
        stages, accumulation: of the pipeline.
        updates: as far as anybody will ask.
    """

    costs: Costs
    stages: int
    accumulation: int
    updates: int
    _ends: dict[tuple[str, bool], list[float]] = field(default_factory=dict)

    def seconds(self, schedule: str, updates: float, *, lookahead: bool = False) -> float:
        """When ``updates`` updates of every stage are done, on straight lines between whole ones."""
        ends = self._ends.get((schedule, lookahead))
        if ends is None:
            ends = self._ends[schedule, lookahead] = self._play(schedule, lookahead)
        whole = int(updates)
        before, after = (0.0, *ends)[whole], (0.0, *ends)[min(whole + 1, len(ends))]
        return before + (updates - whole) * (after - before)

    def _play(self, schedule: str, lookahead: bool) -> list[float]:
        family = schedules.get(schedule)
        costs = self.costs
        step = schedules.StepCosts()
        if family.takes_costs:
            step = schedules.StepCosts(costs.forward_s, costs.input_grad_s, costs.weight_grad_s)
        shape = schedules.Shape(num_stages=self.stages, accumulation=self.accumulation, costs=step)
        return list(simulate(family, shape, costs, windows=self.updates, lookahead=lookahead).window_end_s)


@dataclass(frozen=True, kw_only=True)
class TimeRow:
    """How many times as fast a method gets down to each threshold as a flush schedule does.

    Attributes:
        throughput: updates per second over the flush schedule's.
        speedups: early, middle, late; mean over the seeds.
        short: whether a run never came down to a threshold, so that its speedups are upper bounds.
    """

    study: str
    method: str
    over: str
    throughput: float
    speedups: tuple[float, ...]
    short: bool

    @property
    def cells(self) -> list[str]:
        """As in the table."""
        sign = "< " if self.short else ""
        speedups = [f"{sign}{speedup:.2f}" for speedup in self.speedups]
        return [self.study, self.method, self.over, f"{self.throughput:.2f}", *speedups]

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "method": self.method,
            "over": self.over,
            "throughput_ratio": self.throughput,
            "time_to_accuracy_ratio": list(self.speedups),
            "upper_bounds": self.short,
        }


FLUSH_SCHEDULES = ("1f1b", "zb-h1", "zb-2p")


def time_rows(table: Table, costs: Costs, accumulation: int) -> list[TimeRow]:
    """PACI without look-ahead, with it, and as it was, over each of FLUSH_SCHEDULES: all make the same updates."""
    study, flush = table.study, table.row("flush")
    clock = Clock(costs=costs, stages=study.stages, accumulation=accumulation, updates=study.updates)
    rows: list[TimeRow] = []
    for method in ("paci", "look-ahead", "look-ahead shared"):
        mine = table.row(method, accumulation)
        if flush is None or mine is None:
            continue
        lookahead = METHODS[method].lookahead
        end_s = clock.seconds("paci", study.updates, lookahead=lookahead)
        for schedule in FLUSH_SCHEDULES:
            speedups = []
            for overhead in mine.overheads:
                ratios = []
                for run in flush.runs:
                    needed = updates_to(run.curve, overhead.threshold)
                    if needed is None or run.case.seed not in overhead.ratios:
                        continue
                    own = min(float(study.updates), needed * overhead.ratios[run.case.seed])
                    ratios.append(clock.seconds(schedule, needed) / clock.seconds("paci", own, lookahead=lookahead))
                speedups.append(statistics.fmean(ratios) if ratios else math.nan)
            rows.append(
                TimeRow(
                    study=study.name,
                    method=method,
                    over=schedule,
                    throughput=clock.seconds(schedule, study.updates) / end_s,
                    speedups=tuple(speedups),
                    short=any(overhead.short for overhead in mine.overheads),
                )
            )
    return rows
