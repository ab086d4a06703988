"""Ways to run a model: each is cut for its own memory needs, bounded from above, and simulated if that is worth it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from paci_rt import policies, schedules
from paci_rt.action import OPS, Op, decode_fields
from paci_rt.partition import Matrix, best_partition
from paci_rt.profile_file import Profile
from paci_rt.schedules import ScheduleFamily, Shape, Slack, StepCosts
from paci_rt.schedules.slack import Loops, slack_text
from paci_rt.simulate import Costs, check_shape, simulate
from paci_rt.stage_costs import Spans, loops, stage_costs, step_costs


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep to; infinite or None where there is no limit.

    Attributes:
        memory_bytes: by device.
        drift, delay: largest that any micro-batch may have, in updates (see ``paci_rt.policies``).
        bare_delay: in place of ``delay`` where early forwards do not look ahead.
    """

    memory_bytes: tuple[float, ...]
    drift: int | None = None
    delay: int | None = None
    bare_delay: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the simulator says, in the steady state.

    Attributes:
        micro_batches_per_s: throughput.
        utilization: mean share of time that devices are busy.
        peak_memory_bytes: weights, optimizer state, accumulator, weight versions, activations and stashes, by device.
        drift, delay: largest of any micro-batch, in updates.
    """

    micro_batches_per_s: float
    utilization: float
    peak_memory_bytes: tuple[int, ...]
    drift: int
    delay: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the model.

    Attributes:
        schedule, policy: names. accumulation: micro-batches an update. slack, chunks: as in ``schedules.Shape``.
        lookahead: early forwards look ahead (``paci_rt.lookahead``).
        partition: middle blocks of each stage, None where no cut keeps the limits.
        step_costs: what a searched schedule was fitted to, in seconds; None for the others.
        predicted: None where it was not simulated.
        rejected: which limit it breaks and by how much, or why it cannot be; None where it fits.
        needs_bytes: where memory is what it breaks: the smallest limit for every device that it could do with, in
            bytes, if all limits were raised in proportion: that of the device named in ``rejected``.
        severity: how far it is from fitting, for sorting.
    """

    schedule: str
    policy: str
    accumulation: int
    lookahead: bool = False
    slack: Slack = 0
    chunks: int = 1
    partition: tuple[int, ...] | None = None
    step_costs: StepCosts | None = None
    predicted: Prediction | None = None
    rejected: str | None = None
    needs_bytes: float | None = None
    severity: tuple[int, float] = (0, 0.0)

    def shape(self, ranks: int) -> Shape:
        """Its integers on ``ranks`` devices."""
        costs = self.step_costs or StepCosts()
        return Shape(
            num_stages=ranks * self.chunks,
            accumulation=self.accumulation,
            slack=self.slack,
            chunks=self.chunks,
            costs=costs,
        )

    def recomputing(self, ranks: int) -> tuple[bool, ...]:
        """Which of its stages run their forwards twice."""
        family, shape = schedules.get(self.schedule), self.shape(ranks)
        by_rank = [policies.recomputes(self.policy, family, shape, rank) for rank in range(ranks)]
        return tuple(by_rank[shape.rank_of(stage)] for stage in range(shape.num_stages))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self)
        del values["severity"]
        if self.step_costs is not None:
            names = ("forward_s", "input_grad_s", "weight_grad_s", "hop_s", "stash_share")
            values["step_costs"] = dict(zip(names, self.step_costs, strict=True))
        return values

    @property
    def label(self) -> str:
        """The options that make it, in words."""
        parts = [f"{self.schedule} with accumulation {self.accumulation}", f"policy {self.policy}"]
        parts += ["look-ahead"] if self.lookahead else []
        parts += [f"slack {slack_text(self.slack)}"] if self.slack else []
        parts += [f"{self.chunks} chunks"] if self.chunks > 1 else []
        return ", ".join(parts)


MEMORY, VERSIONS, SHAPE = 1, 2, 3  # severities
FITTING_ROUNDS = 3


@dataclass(kw_only=True)
class Evaluator:
    """Partitions, bounds and simulations of candidates for one profile on given devices.

    Attributes:
        speeds: of each device, 1 being the one that was profiled.
        limits: what to keep to.
    """

    profile: Profile
    speeds: tuple[float, ...]
    limits: Limits

    def __post_init__(self) -> None:
        self._partitions: dict[Any, tuple[int, ...] | None] = {}

    @property
    def ranks(self) -> int:
        return len(self.speeds)

    def prepare(self, one: Candidate, family: ScheduleFamily) -> Candidate:
        """``one`` with its partition, or with the reason why it is rejected.

        A searched schedule gets the partition that no memory limit narrows down: :meth:`simulate` sees to the limits.
        """
        shape = one.shape(self.ranks)
        if shape.num_stages > self.profile.middle:
            why = f"{one.chunks} chunks on {self.ranks} devices need {shape.num_stages} blocks"
            return replace(one, rejected=f"{why}, the model has {self.profile.middle}", severity=(SHAPE, 0.0))
        try:
            check_shape(family, shape)
            policies.resolve(family, shape, one.policy)
        except ValueError as error:
            return replace(one, rejected=str(error), severity=(SHAPE, 0.0))
        broken = self._versions_broken(one, family, shape)
        if broken is not None:
            return broken
        if family.takes_costs:
            return replace(one, partition=self._partition(one, None))
        keeps = [self._keeps(one, family, shape, rank) for rank in range(self.ranks)]
        partition = self._partition(one, keeps if one.chunks == 1 else None)
        return self._too_large(one, keeps) if partition is None else replace(one, partition=partition)

    def with_slack(self, one: Candidate, family: ScheduleFamily) -> list[Candidate]:
        """``one``, which has no slack, and with as much as may pay: see :meth:`Loops.choices`, and :meth:`prepare`.

        Slack depends on where the model is cut, and where it can be cut on the memory that slack takes, so the choices
        of a few cuts are collected.
        """
        found, cuts = {one.slack: self.prepare(one, family)}, set[tuple[int, ...]]()
        todo = list(found.values())
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

    def at_most(self, one: Candidate, family: ScheduleFamily) -> float:
        """Micro-batches a second that ``one`` cannot exceed, whatever the details of its schedule.

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
        by_rank = [float((one.accumulation * work + update)[rank :: self.ranks].sum()) for rank in range(self.ranks)]
        window_s = max(by_rank)
        if family.flush and one.chunks == 1:
            gone = forward + input_grad + (0.0 if family.split else weight_grad)
            gap = np.concatenate(([0.0], np.cumsum(gone)[:-1] + update[0]))
            fillers = update + (one.accumulation * weight_grad if family.split else 0.0)
            busy = one.accumulation * work + update - fillers
            window_s = max(window_s, float((busy + np.maximum(fillers, gap)).max()))
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
        copies = [fixed + self._extra(one, family, shape, rank) for rank in range(self.ranks)]
        peak = tuple(
            math.floor(copies[rank] * float(weights[rank :: self.ranks].sum()) + run.peak_activation_bytes[rank])
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
            ),
        )
        over = [need / limit for need, limit in zip(peak, self.limits.memory_bytes, strict=True)]
        rank = int(np.argmax(over))
        return found if over[rank] <= 1 else self._over_memory(found, rank, peak[rank])

    def _fitted(self, one: Candidate, family: ScheduleFamily) -> Candidate:
        """``one`` with a searched schedule that is fitted to its partition, and a partition in which it keeps within
        the memory: they depend on each other, so a few rounds may pass."""
        spans = Spans(profile=self.profile, stages=self.ranks)
        for _ in range(FITTING_ROUNDS):
            one = replace(one, step_costs=step_costs(self._costs(one), one.recomputing(self.ranks)))
            keeps = [self._keeps(one, family, one.shape(self.ranks), rank) for rank in range(self.ranks)]
            needs = self._needs(one, spans, keeps)
            if all(need <= limit for need, limit in zip(needs, self.limits.memory_bytes, strict=True)):
                break
            partition = self._partition(one, keeps)
            if partition is None:
                return self._too_large(one, keeps)
            if partition == one.partition:
                break
            one = replace(one, partition=partition)
        return one

    # --- what a rank keeps ---

    def _extra(self, one: Candidate, family: ScheduleFamily, shape: Shape, rank: int) -> int:
        """Copies of its weights that ``rank`` holds besides the current ones."""
        copies = policies.copies_held(one.policy, family, shape, rank, one.lookahead)
        if self.profile.has_masters and copies and (one.lookahead or one.policy == "predict"):
            copies -= 1  # masters bring the weights back
        return copies

    def _keeps(self, one: Candidate, family: ScheduleFamily, shape: Shape, rank: int) -> _Keeps:
        if family.split and one.chunks == 1:
            moments = _moments(family, shape, rank)
        else:
            moments = ((family.in_flight_bound(shape, rank), 0),)
        recompute = policies.recomputes(one.policy, family, shape, rank)
        return _Keeps(self._extra(one, family, shape, rank), moments, recompute)

    def _memory(self, spans: Spans, keeps: _Keeps, stage: int) -> Matrix:
        """``[i, j]``: peak bytes of ``stage`` with middle blocks ``i ... j - 1``."""
        weights = spans.total("parameter_bytes", stage)
        activations, stashes = spans.total("activation_bytes", stage), spans.total("stash_bytes", stage)
        kept, during = activations, np.zeros_like(activations)
        if keeps.recompute:
            kept = np.broadcast_to(spans.arriving(stage), activations.shape)
            during = np.maximum(activations - kept, 0.0)
        held = [forwards * kept + stashed * stashes for forwards, stashed in keeps.moments]
        fixed = 1 + self.profile.state_bytes_per_parameter_byte + keeps.extra
        return np.asarray(fixed * weights + np.maximum.reduce(held) + during)

    def _needs(self, one: Candidate, spans: Spans, keeps: list[_Keeps]) -> list[float]:
        """Peak bytes of each device."""
        assert one.partition is not None
        ends = np.cumsum((0, *one.partition))
        return [
            float(self._memory(spans, keeps[stage], stage)[ends[stage], ends[stage + 1]]) for stage in range(self.ranks)
        ]

    # --- where to cut ---

    def _partition(self, one: Candidate, keeps: list[_Keeps] | None) -> tuple[int, ...] | None:
        """The best cut within the memory limits, or without any where ``keeps`` is None. So it is with several chunks a
        device, since what a stage may take depends on the other stages of its device: their limits are left to the
        simulation."""
        if not any(map(math.isfinite, self.limits.memory_bytes)):
            keeps = None
        stages, again = self.ranks * one.chunks, one.recomputing(self.ranks)
        key = (stages, again, None if keeps is None else tuple(keeps))
        if key not in self._partitions:
            spans = Spans(profile=self.profile, stages=stages)
            times = self._time_of(spans, again=again)

            def cost_of(stage: int) -> Matrix:
                if keeps is None:
                    return times(stage)
                fits = self._memory(spans, keeps[stage], stage) <= self.limits.memory_bytes[stage]
                return np.where(fits, times(stage), np.inf)

            self._partitions[key] = best_partition(cost_of, stages, self.profile.middle)
        return self._partitions[key]

    def _time_of(self, spans: Spans, *, again: tuple[bool, ...]) -> Callable[[int], Matrix]:
        """Seconds of one micro-batch on each stage, by what it holds; ``again``: whether its forward runs twice."""
        allowed = spans.allowed()

        def time_of(stage: int) -> Matrix:
            seconds = spans.total("compute_s", stage)
            if again[stage]:
                seconds = seconds + spans.total("forward_s", stage)
            return np.where(allowed, seconds / self.speeds[stage % self.ranks], np.inf)

        return time_of

    def _loops(self, one: Candidate, family: ScheduleFamily) -> Loops:
        return loops(self._costs(one), one.recomputing(self.ranks), split=family.split)

    def _costs(self, one: Candidate) -> Costs:
        assert one.partition is not None
        return stage_costs(self.profile, one.partition, device_speeds=self.speeds)

    # --- why not ---

    def _versions_broken(self, one: Candidate, family: ScheduleFamily, shape: Shape) -> Candidate | None:
        found = [policies.bounds(one.policy, family, shape, rank) for rank in range(self.ranks)]
        for what, values, limit in (
            ("drift", [drift for drift, _ in found], self.limits.drift),
            ("delay", [delay for _, delay in found], self.limits.delay if one.lookahead else self.limits.bare_delay),
        ):
            if limit is not None and max(values) > limit:
                why = f"{what} {max(values)}, {max(values) - limit} over the limit of {limit}"
                if what == "delay" and self.limits.delay != self.limits.bare_delay and not one.lookahead:
                    why += " without look-ahead"
                return replace(one, rejected=why, severity=(VERSIONS, max(values) - limit))
        return None

    def _too_large(self, one: Candidate, keeps: list[_Keeps]) -> Candidate:
        """Rejected for memory, with what it would need at least: the cut whose fullest device, as a share of its
        limit, is the least full."""
        spans = Spans(profile=self.profile, stages=self.ranks)
        allowed = spans.allowed()

        def share_of(stage: int) -> Matrix:
            needed = self._memory(spans, keeps[stage], stage) / self.limits.memory_bytes[stage]
            return np.where(allowed, needed, np.inf)

        partition = best_partition(share_of, self.ranks, self.profile.middle)
        needs = self._needs(replace(one, partition=partition), spans, keeps)
        one = replace(one, partition=None, step_costs=None)
        shares = [need / limit for need, limit in zip(needs, self.limits.memory_bytes, strict=True)]
        rank = int(np.argmax(shares))
        return self._over_memory(one, rank, needs[rank])

    def _over_memory(self, one: Candidate, rank: int, need: float) -> Candidate:
        limit = self.limits.memory_bytes[rank]
        why = f"needs {mib(need)} on device {rank}, {mib(need - limit)} over its limit"
        return replace(one, rejected=why, needs_bytes=need, severity=(MEMORY, need / limit))


@dataclass(frozen=True)
class _Keeps:
    """What a rank keeps: copies of its weights besides the current ones, and micro-batches between F and backward and
    between I and W at the moments when both together are most."""

    extra: int
    moments: tuple[tuple[int, int], ...]
    recompute: bool


def _moments(family: ScheduleFamily, shape: Shape, rank: int) -> tuple[tuple[int, int], ...]:
    """Forwards in flight and stashes of one rank at the moments that no other exceeds in both."""
    windows = 1 if family.flush else 2 + -(-family.in_flight_bound(shape, rank) // shape.accumulation)
    op = decode_fields(family.stream(shape, rank, windows))[1]
    codes = {one: OPS.index(one) for one in (Op.F, Op.B, Op.I, Op.W)}
    halves = (op == codes[Op.I]).astype(np.int64)
    forwards = np.cumsum((op == codes[Op.F]).astype(np.int64) - (op == codes[Op.B]) - halves)
    stashes = np.cumsum(halves - (op == codes[Op.W]))
    return _undominated(forwards, stashes)


def _undominated(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for pair in sorted(set(zip(first.tolist(), second.tolist(), strict=True)), reverse=True):
        if not found or pair[1] > found[-1][1]:
            found.append(pair)
    return tuple(found)


def _windows(family: ScheduleFamily, shape: Shape) -> int:
    """Windows to simulate: two in the steady state, and of an asynchronous schedule as many micro-batches as pass the
    whole pipeline twice."""
    if family.flush:
        return 3
    ahead = max(family.in_flight_bound(shape, rank) for rank in range(shape.ranks))
    filling = -(-ahead // shape.accumulation)
    return 2 * filling + max(2, -(-2 * shape.num_stages // shape.accumulation))


def mib(value_bytes: float) -> str:
    """``1,234.5 MiB``."""
    return f"{value_bytes / 2**20:,.1f} MiB"
