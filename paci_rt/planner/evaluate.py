"""Ways to run a model: each is cut for its own memory needs, bounded from above, and simulated if that is worth it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paci_rt.planner.candidate import AS_FAST, MEMORY, OVERHEAD, SHAPE, VERSIONS, Candidate, Limits, Prediction, mib
from paci_rt.planner.frontier import limits_to_try
from paci_rt.planner.memory import Keeps, copies_beside, needs, peak_bytes, what_is_kept
from paci_rt.planner.partition import best_partition
from paci_rt.planner.profile import Profile
from paci_rt.planner.rank_cuts import cuts_by_rank
from paci_rt.planner.stage_costs import Spans, loops, stage_costs, step_costs
from paci_rt.planner.token_overhead import OverheadTable, TokenOverhead, packaged
from paci_rt.schedules import ScheduleFamily, Shape, Slack, policies, v_search
from paci_rt.schedules.base import check_shape
from paci_rt.schedules.slack import Loops
from paci_rt.simulate import Costs, Simulation, simulate
from paci_rt.simulate.costs import Floats

FITTING_ROUNDS = 3
FEWER = 4
"""So many limits of forwards in flight, about, are tried where memory is short."""
EXACT = 1e-4
"""As a share: how exactly the search for an order knows its period."""


@dataclass(kw_only=True)
class Evaluator:
    """Partitions, bounds and simulations of candidates for one profile on given devices.

    Attributes:
        speeds: of each device, 1 being the one that was profiled.
        limits: what to keep to.
        overheads, optimizer: by which a late gradient's cost in tokens is known.
    """

    profile: Profile
    speeds: tuple[float, ...]
    limits: Limits
    overheads: OverheadTable = field(default_factory=packaged)
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        self._partitions: dict[Any, tuple[int, ...] | None] = {}
        self._cuts: dict[Any, list[tuple[int, ...]]] = {}

    @property
    def ranks(self) -> int:
        return len(self.speeds)

    def prepare(self, one: Candidate, family: ScheduleFamily) -> Candidate:
        """``one`` with its partition, or with the reason why it is rejected.

        A searched schedule gets the partition that no memory limit narrows down, and several stages a device the one
        that is best for stages, see :meth:`with_cuts`: :meth:`simulate` sees to the limits.
        """
        shape = one.shape(self.ranks)
        if shape.num_stages > self.profile.middle:
            why = f"{one.chunks} chunks on {self.ranks} devices need {shape.num_stages} blocks"
            return replace(one, rejected=f"{why}, the model has {self.profile.middle}", severity=(SHAPE, 0.0))
        unfitted = family.takes_activation_limit and one.step_costs is None  # then nothing is known of its order
        broken = self._broken(one, family, shape, order_known=not unfitted)
        if broken is not None:
            return broken
        if family.takes_costs:
            return replace(one, partition=self._partition(one, None))
        keeps = [what_is_kept(self.profile, one, family, shape, rank) for rank in range(self.ranks)]
        partition = self._partition(one, keeps if one.chunks == 1 else None)
        return self._too_large(one, keeps) if partition is None else replace(one, partition=partition)

    def with_slack(self, one: Candidate, family: ScheduleFamily) -> list[Candidate]:
        """``one``, which has no slack, and with as much as may pay: see :meth:`Loops.choices`, and :meth:`prepare`.

        Slack depends on where the model is cut, and where it can be cut on the memory that slack takes, so the choices
        of a few cuts are collected.
        """
        found, cuts = {one.slack: self.prepare(one, family)}, set[tuple[int, ...]]()
        if any(map(math.isfinite, self.limits.memory_bytes)):
            for fewer in fewer_in_flight(self.ranks):
                found[fewer] = self.prepare(replace(one, slack=fewer), family)
        todo = [found[one.slack]]
        while todo and len(cuts) < FITTING_ROUNDS:
            cut = todo.pop(0)
            if cut.partition is None or cut.partition in cuts:
                continue  # what does not fit without slack does not with it
            cuts.add(cut.partition)
            for slack in self._loops(cut, family).choices():
                if slack not in found:
                    found[slack] = self.prepare(replace(one, slack=slack), family)
                    todo.append(found[slack])
        return list(found.values())

    def with_limits(self, one: Candidate, family: ScheduleFamily) -> list[Candidate]:
        """``one`` on the best of its partitions, fitted to that, without a limit of activations and with some: see
        :meth:`prepare`."""
        one = replace(self.best_cut(one, family), predicted=None)
        if one.step_costs is None:
            return [one]
        one = replace(one, rejected=None, needs_bytes=None, severity=(0, 0.0))  # a limit may help
        assert one.step_costs is not None
        limits = limits_to_try(self.ranks, one.step_costs)
        found = [replace(one, activation_limit=limit) for limit in limits]
        return [self._broken(each, family, each.shape(self.ranks)) or each for each in found]

    def best_cut(self, one: Candidate, family: ScheduleFamily) -> Candidate:
        """``one`` on the best of its partitions, simulated: the one with the least memory of those that are about as
        fast as the fastest. Where none fits, the nearest miss."""
        try:
            cuts = self.with_cuts(one, family)
            if family.takes_costs and one.step_costs is None:
                cuts = [cut if cut.rejected else self._to_its_stages(cut) for cut in cuts]
            found = [cut if cut.rejected else self.simulate(cut, family) for cut in cuts]
        except ValueError as error:
            return replace(one, rejected=str(error), severity=(SHAPE, 0.0))
        fitting = [(cut, cut.predicted) for cut in found if cut.rejected is None and cut.predicted is not None]
        if not fitting:
            return min(found, key=lambda cut: cut.severity)
        fastest = max(predicted.micro_batches_per_s for _, predicted in fitting)
        equal = [pair for pair in fitting if pair[1].micro_batches_per_s >= (1 - AS_FAST) * fastest]
        return min(equal, key=lambda pair: max(pair[1].peak_memory_bytes))[0]

    def _to_its_stages(self, one: Candidate) -> Candidate:
        return replace(one, step_costs=step_costs(self._costs(one), one.recomputing(self.ranks)))

    def with_cuts(self, one: Candidate, family: ScheduleFamily) -> list[Candidate]:
        """``one`` on the partitions that may be best, where a device has several stages: see :meth:`prepare`.

        Raises:
            ValueError: no order can be fitted to them.
        """
        one = self.prepare(one, family)
        if one.partition is None or one.chunks == 1:
            return [one]
        key = (one.accumulation, one.policy, one.schedule, one.chunks, one.lookahead)
        if key not in self._cuts:
            self._cuts[key] = cuts_by_rank(
                self.profile,
                one,
                family,
                speeds=self.speeds,
                limits_bytes=self.limits.memory_bytes,
                by_stage=one.partition,
            )
        return [replace(one, partition=cut) for cut in self._cuts[key]]

    def _broken(
        self, one: Candidate, family: ScheduleFamily, shape: Shape, *, order_known: bool = True
    ) -> Candidate | None:
        """``one`` with what its shape or its order breaks; None where it breaks nothing."""
        try:
            check_shape(family, shape)
            if order_known:
                policies.resolve(family, shape, one.policy)
        except ValueError as error:
            return replace(one, rejected=str(error), severity=(SHAPE, 0.0))
        return self._versions_broken(one, family, shape) if order_known else None

    def at_most(self, one: Candidate, family: ScheduleFamily) -> float:
        """Micro-batches per second that ``one`` cannot exceed, whatever the details of its schedule.

        No device works faster than without pauses. A flush adds that a stage has nothing but its W and U to do while
        the last gradient goes on to the first stage and the next window's first micro-batch comes from there; without
        flushes neighbours wait for each other's messages.
        """
        assert one.partition is not None
        costs, stages = self._costs(one), self.ranks * one.chunks
        forward, input_grad, weight_grad, update = (
            costs.per_stage(name, stages) for name in ("forward_s", "input_grad_s", "weight_grad_s", "update_s")
        )
        input_grad = input_grad + np.where(one.recomputing(self.ranks), forward, 0.0)
        work = forward + input_grad + weight_grad
        shape, window = one.shape(self.ranks), one.accumulation * work + update
        by_rank = [float(window[list(shape.stages_of(rank))].sum()) for rank in range(self.ranks)]
        window_s = max(by_rank)
        if family.flush and one.chunks == 1:
            gone = forward + input_grad + (0.0 if family.split else weight_grad)
            gap = np.concatenate(([0.0], np.cumsum(gone)[:-1] + update[0]))
            fillers = update + (one.accumulation * weight_grad if family.split else 0.0)
            busy = one.accumulation * work + update - fillers
            window_s = max(window_s, float((busy + np.maximum(fillers, gap)).max()))
        elif family.takes_activation_limit:
            period_s = v_search.find(self.ranks, shape.costs, one.activation_limit).period
            window_s = max(window_s, one.accumulation * period_s * (1 - EXACT))
        elif not family.flush:
            window_s = max(window_s, one.accumulation * self._loops(one, family).period(one.slack))
        return one.accumulation / window_s if window_s else math.inf

    def simulate(self, one: Candidate, family: ScheduleFamily) -> Candidate:
        """``one`` with its prediction, or rejected where its peak memory breaks a limit after all."""
        if family.takes_costs:
            one = self._fitted(one, family)
            if one.rejected is not None:
                return one
        shape, costs = one.shape(self.ranks), self._costs(one)
        run = simulate(
            family, shape, costs, windows=_windows(family, shape), policy=one.policy, lookahead=one.lookahead
        )
        weights = costs.per_stage("weight_bytes", shape.num_stages)
        fixed = 1 + self.profile.state_bytes_per_parameter_byte
        copies = [fixed + copies_beside(self.profile, one, family, shape, rank) for rank in range(self.ranks)]
        peak = tuple(
            math.floor(
                copies[rank] * float(weights[list(shape.stages_of(rank))].sum()) + run.peak_activation_bytes[rank]
            )
            for rank in range(self.ranks)
        )
        found = replace(
            one,
            predicted=Prediction(
                micro_batches_per_s=run.micro_batches_per_s,
                utilization=run.steady_utilization,
                peak_memory_bytes=peak,
                drift=run.max_drift,
                delay=run.max_delay,
                overhead=self.overhead_of(one, family),
                mean_delay=mean_delay(run),
                activations=max(run.peak_activations.values()) / shape.chunks,
            ),
        )
        over = [need / limit for need, limit in zip(peak, self.limits.memory_bytes, strict=True)]
        rank = int(np.argmax(over))
        return found if over[rank] <= 1 else self._over_memory(found, rank, peak[rank])

    def _fitted(self, one: Candidate, family: ScheduleFamily) -> Candidate:
        """``one`` with a searched schedule fitted to its partition, and a partition that keeps within the memory.

        The two depend on each other, so this takes a few rounds. With several stages a device the partition stays as
        it is.
        """
        if one.chunks > 1:
            return one if one.step_costs else self._to_its_stages(one)
        spans = Spans(profile=self.profile, stages=self.ranks)
        for _ in range(FITTING_ROUNDS):
            one = self._to_its_stages(one)
            shape = one.shape(self.ranks)
            keeps = [what_is_kept(self.profile, one, family, shape, rank) for rank in range(self.ranks)]
            assert one.partition is not None
            needed = needs(spans, keeps, one.partition)
            if all(need <= limit for need, limit in zip(needed, self.limits.memory_bytes, strict=True)):
                break
            partition = self._partition(one, keeps)
            if partition is None:
                return self._too_large(one, keeps)
            if partition == one.partition:
                break
            one = replace(one, partition=partition)
        return one

    # --- where to cut ---

    def _partition(self, one: Candidate, keeps: list[Keeps] | None) -> tuple[int, ...] | None:
        """The best cut within the memory limits, or without limits where ``keeps`` is None.

        With several chunks per device ``keeps`` is None: see :meth:`with_cuts`.
        """
        if not any(map(math.isfinite, self.limits.memory_bytes)):
            keeps = None
        stages, again = self.ranks * one.chunks, one.recomputing(self.ranks)
        shape = one.shape(self.ranks)
        key = (stages, shape.placement, again, None if keeps is None else tuple(keeps))
        if key not in self._partitions:
            spans = Spans(profile=self.profile, stages=stages)
            times = self._time_of(spans, again=again, rank_of=shape.rank_of)

            def cost_of(stage: int) -> Floats:
                if keeps is None:
                    return times(stage)
                fits = peak_bytes(spans, keeps[stage], stage) <= self.limits.memory_bytes[stage]
                return np.where(fits, times(stage), np.inf)

            self._partitions[key] = best_partition(cost_of, stages, self.profile.middle)
        return self._partitions[key]

    def _time_of(
        self, spans: Spans, *, again: tuple[bool, ...], rank_of: Callable[[int], int]
    ) -> Callable[[int], Floats]:
        """Seconds of one micro-batch on each stage, by what it holds; ``again``: whether its forward runs twice."""
        allowed = spans.allowed()

        def time_of(stage: int) -> Floats:
            seconds = spans.total("compute_s", stage)
            if again[stage]:
                seconds = seconds + spans.total("forward_s", stage)
            return np.where(allowed, seconds / self.speeds[rank_of(stage)], np.inf)

        return time_of

    def _loops(self, one: Candidate, family: ScheduleFamily) -> Loops:
        return loops(self._costs(one), one.recomputing(self.ranks), split=family.split)

    def _costs(self, one: Candidate) -> Costs:
        assert one.partition is not None
        placement = one.shape(self.ranks).placement
        return stage_costs(self.profile, one.partition, device_speeds=self.speeds, placement=placement)

    # --- why not ---

    def _versions_broken(self, one: Candidate, family: ScheduleFamily, shape: Shape) -> Candidate | None:
        found = [policies.bounds(one.policy, family, shape, rank) for rank in range(self.ranks)]
        for what, values, limit in (
            ("drift", [drift for drift, _ in found], self.limits.drift),
            ("delay", [delay for _, delay in found], self.limits.delay),
        ):
            if limit is not None and max(values) > limit:
                why = f"{what} {max(values)}, {max(values) - limit} over the limit of {limit}"
                return replace(one, rejected=why, severity=(VERSIONS, max(values) - limit))
        overhead = self.overhead_of(one, family)
        if overhead.known and overhead.f is None:
            return replace(one, rejected=f"token overhead: {overhead.basis}", severity=(OVERHEAD, 0.0))
        if self.limits.measured and not overhead.known:
            return replace(one, rejected=f"token overhead: {overhead.basis}", severity=(OVERHEAD, 1.0))
        return None

    def overhead_of(self, one: Candidate, family: ScheduleFamily) -> TokenOverhead:
        """What ``one``, whose order is known, needs in tokens, as far as that was measured."""
        if family.flush:
            return self.overheads.of(optimizer=self.optimizer, policy=one.policy, lookahead=False, delay=0, share=0.0)
        shape = one.shape(self.ranks)
        return self.overheads.of(
            optimizer=self.optimizer,
            policy=one.policy,
            lookahead=one.lookahead,
            delay=max(policies.bounds(one.policy, family, shape, rank)[1] for rank in range(self.ranks)),
            share=early_share(one.policy, family, shape),
        )

    def _too_large(self, one: Candidate, keeps: list[Keeps]) -> Candidate:
        """Rejected for memory, with what it would need at least: the cut whose fullest device, as a share of its
        limit, is the least full."""
        spans = Spans(profile=self.profile, stages=self.ranks)
        allowed = spans.allowed()

        def share_of(stage: int) -> Floats:
            needed = peak_bytes(spans, keeps[stage], stage) / self.limits.memory_bytes[stage]
            return np.where(allowed, needed, np.inf)

        partition = best_partition(share_of, self.ranks, self.profile.middle)
        assert partition is not None
        needed = needs(spans, keeps, partition)
        one = replace(one, partition=None, step_costs=None)
        shares = [need / limit for need, limit in zip(needed, self.limits.memory_bytes, strict=True)]
        rank = int(np.argmax(shares))
        return self._over_memory(one, rank, needed[rank])

    def _over_memory(self, one: Candidate, rank: int, need: float) -> Candidate:
        limit = self.limits.memory_bytes[rank]
        why = f"needs {mib(need)} on device {rank}, {mib(need - limit)} over its limit"
        return replace(one, rejected=why, needs_bytes=need, severity=(MEMORY, need / limit))


def fewer_in_flight(stages: int) -> list[Slack]:
    """Slack below 0: no stage runs more than some number of forwards ahead, or each half as many."""
    ahead = [stages - 1 - stage for stage in range(stages)]
    most = range(stages - 2, -1, -max(1, (stages - 1) // FEWER))
    wanted = [[min(count, cap) for count in ahead] for cap in most] + [[-(-count // 2) for count in ahead]]
    return list(dict.fromkeys(tuple(mine - count for mine, count in zip(one, ahead, strict=True)) for one in wanted))


def early_share(policy: str, family: ScheduleFamily, shape: Shape) -> float:
    """Forwards that run an update early, as a mean over the stages: their mean delay, in updates."""
    if policy == "2bw":
        return 1.0
    early = [
        policies.early_forwards(family, shape, rank, stage)
        for rank in range(shape.ranks)
        for stage in shape.stages_of(rank)
    ]
    return sum(early) / (shape.num_stages * shape.accumulation)


def mean_delay(run: Simulation) -> float:
    """Delay of all micro-batches, in updates, mean over the ranks."""
    means = [sum(late * count for late, count in one.items()) / sum(one.values()) for one in run.delay.values()]
    return sum(means) / len(means)


def _windows(family: ScheduleFamily, shape: Shape) -> int:
    """Windows to simulate: two in the steady state, and of an asynchronous schedule as many micro-batches as pass the
    whole pipeline twice."""
    if family.flush:
        return 3
    ahead = max(family.in_flight_bound(shape, rank) for rank in range(shape.ranks))
    filling = -(-ahead // shape.accumulation)
    return 2 * filling + max(2, -(-2 * shape.num_stages // shape.accumulation))
