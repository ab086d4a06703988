"""From a profile to a plan: where to cut the model, how many micro-batches make an update, which schedule to run.

Every combination of schedule, policy, accumulation and chunks is a candidate, with no slack and, where messages take
time, with as much by stage as hides some or all of it (:mod:`paci_rt.schedules.slack`). For each, an exact dynamic
program (:mod:`paci_rt.planner.partition`) cuts the model so that the slowest stage is as fast as possible within the
memory of each device; the simulator then says how fast the pipeline would run. Where a device has several stages, what
counts is their sum: a few partitions (:mod:`paci_rt.planner.rank_cuts`) are simulated, and the best of them is kept.
Candidates that break a limit come back with the reason. Memory counts what a stage keeps: weights, optimizer state, one
accumulator, further weight versions, activations in flight and stashes. The workspace of a kernel and the process
itself come on top.

Searched schedules (``zb-1p``, ``zb-2p``, ``paci-v``) are fitted to the stages of the partition, see
:func:`paci_rt.planner.stage_costs.step_costs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paci_rt import schedules as families
from paci_rt.planner.arguments import check_choices, check_limit, memory_limits, need_list
from paci_rt.planner.candidate import AS_FAST, MEMORY, OVERHEAD, Candidate, Limits, mib
from paci_rt.planner.evaluate import Evaluator
from paci_rt.planner.profile import Profile
from paci_rt.planner.stage_costs import device_speeds_of
from paci_rt.planner.token_overhead import OverheadTable, packaged
from paci_rt.schedules import policies as consistency
from paci_rt.schedules.slack import check_slack, slack_by_stage
from paci_rt.wording import shown

MEASURED = "measured"
"""In place of a limit of delay: schedules whose token overhead was measured, or others near them, compete by it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, and what else there was.

    Attributes:
        candidates: the plan itself first, then all others that were simulated and fit, best first, then those that
            break a limit, the nearest miss first. Left out are those that, by :meth:`Evaluator.at_most`, cannot come
            near a simulated one of the same schedule and policy.
        limits, device_speeds: what was asked for, by device.
        without_slack: the plan on the same stages in the strict order, for what its slack gives and takes; None where
            it has none.

    Example:
        >>> from paci_rt.planner import BlockProfile, Profile, plan
        >>> block = BlockProfile(
        ...     name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
        ...     parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
        ... )
        >>> found = plan(Profile(blocks=(block,) * 4), stages=2, accumulations=[4], schedules=["paci", "1f1b"])
        >>> [one.schedule for one in found.best_of_each()]
        ['paci', '1f1b']
    """

    candidates: tuple[Candidate, ...]
    limits: Limits
    device_speeds: tuple[float, ...]
    without_slack: Candidate | None = None

    @property
    def chosen(self) -> Candidate:
        """The plan."""
        return self.candidates[0]

    def best_of_each(self) -> list[Candidate]:
        """One candidate per schedule, in order: the best that fits, else the nearest miss."""
        found: dict[str, Candidate] = {}
        for one in self.candidates:
            found.setdefault(one.schedule, one)
        return list(found.values())

    def to_json(self) -> dict[str, Any]:
        """Keys ``partition accumulation slack predicted schedule policy chunks step_costs without_slack runners_up``;
        ``without_slack`` is what was predicted for the strict order on the same stages, None where that is the plan."""
        chosen = self.chosen.to_json()
        del chosen["rejected"], chosen["needs_bytes"]
        strict = None if self.without_slack is None else self.without_slack.to_json()["predicted"]
        return {**chosen, "without_slack": strict, "runners_up": [one.to_json() for one in self.candidates[1:]]}


def plan(
    profile: Profile,
    *,
    stages: int,
    accumulations: Sequence[int],
    memory_limit_bytes: float | Sequence[float] | None = None,
    drift_limit: int | None = None,
    delay_limit: int | str | None = MEASURED,
    lookahead: bool | None = None,
    device_speeds: Sequence[float] | None = None,
    schedules: Sequence[str] | None = None,
    policies: Sequence[str] | None = None,
    slack: families.Slack | Sequence[int] | str = families.AUTO,
    chunks: Sequence[int] = (2,),
    optimizer: str = "adamw",
    overheads: OverheadTable | None = None,
) -> Plan:
    """Choose partition, schedule, policy, accumulation and slack for the shortest time to a loss within the limits.

    That is the highest throughput over token overhead (:mod:`paci_rt.planner.token_overhead`). Overheads are over
    1F1B-flush with the same update; what other updates cost or gain is not weighed. Among candidates within ``AS_FAST``
    of the best, the one that needs the least memory is taken, then the one with the least delay, then the least drift,
    then the fewest micro-batches an update, then the least slack.

    Args:
        profile: its micro-batch is the plan's.
        stages: devices, one process each.
        accumulations: micro-batches an update, to choose from.
        memory_limit_bytes: of every device, or of each.
        drift_limit, delay_limit: largest allowed, in updates; None is no limit. ``"measured"`` is every delay near one
            whose token overhead was measured; with a number or None others run too, and are ranked by throughput alone.
        lookahead: whether early forwards look ahead, for schedules and policies that can; None as the schedule does.
        device_speeds: of each device, 1 being the one that was profiled.
        schedules, policies: names to choose from; all by default.
        slack: of schedules that take any: ``"auto"`` chooses; a number, or one per stage, is used as it is.
        chunks: stages per device to choose from, for schedules that take chunks.
        optimizer: a name of ``paci-rt train``, for the token overhead. Memory is that of the profile's.
        overheads: measured by the user; of the kinds that it has, it stands in place of the package's table.

    Raises:
        ValueError: a value that cannot be; or nothing fits, then with the least memory that any candidate needs.

    Example:
        >>> from paci_rt.planner import BlockProfile, Profile, plan
        >>> block = BlockProfile(
        ...     name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
        ...     parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
        ... )
        >>> found = plan(Profile(blocks=(block,) * 4), stages=2, accumulations=[2, 4], schedules=["paci", "1f1b"])
        >>> found.chosen.schedule, found.chosen.partition, found.chosen.predicted.utilization
        ('paci', (2, 2), 1.0)
    """
    check_choices(profile, stages, accumulations, chunks)
    for name, given_names in (("schedules", schedules), ("policies", policies)):
        if given_names is not None:
            need_list(name, given_names, str)
    given = None if isinstance(slack, str) and slack == families.AUTO else check_slack(slack, stages)
    measured = isinstance(delay_limit, str)
    if measured and delay_limit != MEASURED:
        raise ValueError(f"delay limit is {shown(delay_limit)}: give a number of updates, at least 0, or {MEASURED!r}")
    for name, limit in (("delay limit", None if measured else delay_limit), ("drift limit", drift_limit)):
        check_limit(name, limit)
    table = packaged() if overheads is None else packaged().overridden_by(overheads)
    speeds = device_speeds_of(device_speeds, stages)
    limits = Limits(
        memory_bytes=memory_limits(memory_limit_bytes, stages),
        drift=drift_limit,
        delay=None if isinstance(delay_limit, str) else delay_limit,
        measured=measured,
    )
    limited = memory_limit_bytes is not None and lookahead is None
    groups = _groups(schedules, policies, accumulations, given, chunks, lookahead, both=limited)
    evaluator = Evaluator(profile=profile, speeds=speeds, limits=limits, overheads=table, optimizer=optimizer)
    return _choose(groups, evaluator, choose_slack=given is None)


def _choose(groups: Iterable[list[Candidate]], evaluator: Evaluator, *, choose_slack: bool) -> Plan:
    """Evaluate all candidates and rank them.

    Raises:
        ValueError: none fits.
    """
    fitting, rejected = [], []
    for group in groups:
        fit, misses = _evaluate(group, evaluator, choose_slack=choose_slack)
        fitting += fit
        rejected += misses
    if not fitting:
        raise ValueError(_nothing_fits(rejected))
    rejected.sort(key=lambda one: one.severity)
    ranked = _ranked(fitting)
    strict = None
    if ranked[0].slack:  # also where it is below 0
        family = families.get(ranked[0].schedule)
        strict = evaluator.simulate(replace(ranked[0], slack=0, predicted=None), family)
    candidates = (*ranked, *rejected)
    return Plan(candidates=candidates, limits=evaluator.limits, device_speeds=evaluator.speeds, without_slack=strict)


def _groups(
    schedules: Sequence[str] | None,
    policies: Sequence[str] | None,
    accumulations: Sequence[int],
    slack: families.Slack | None,
    chunks: Sequence[int],
    lookahead: bool | None,
    *,
    both: bool,
) -> Iterator[list[Candidate]]:
    """Candidates by schedule and policy; each group competes within itself first. ``both``: what can look ahead is
    there without it too, since look-ahead takes memory."""
    chosen = [families.get(name) for name in (families.FAMILIES if schedules is None else schedules)]
    for name in policies or ():
        consistency.resolve(families.get("paci"), families.Shape(num_stages=1, accumulation=1), name)
    found = False
    for family in dict.fromkeys(family.name for family in chosen):
        takes = families.get(family)
        for policy in takes.policies:
            if policies is not None and policy not in policies:
                continue
            found = True
            ahead = lookahead is not False and consistency.looks_ahead(takes, policy, None)
            for looks in (True, False) if ahead and both else (ahead,):
                yield [
                    Candidate(
                        schedule=family,
                        policy=policy,
                        accumulation=count,
                        lookahead=looks,
                        slack=slack if slack is not None and takes.takes_slack else 0,
                        chunks=pieces,
                    )
                    for count, pieces in itertools.product(
                        _accumulations(takes, accumulations),
                        dict.fromkeys(chunks) if takes.takes_chunks else (takes.chunks,),
                    )
                ]
    if not found:
        raise ValueError(
            f"none of {', '.join(family.name for family in chosen)} can run under {' or '.join(policies or ())}: "
            "name other schedules or other policies"
        )


def _accumulations(family: families.ScheduleFamily, accumulations: Sequence[int]) -> list[int]:
    """Those to choose from; a schedule that updates after every backward only has 1, and keeps one other to say so."""
    counts = list(dict.fromkeys(accumulations))
    if family.one_micro_batch_windows:
        return [1] if 1 in counts else counts[:1]
    return counts


def _evaluate(
    group: list[Candidate], evaluator: Evaluator, *, choose_slack: bool
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates of one schedule and policy that were simulated and fit, and those that break a limit."""
    family = families.get(group[0].schedule)
    prepared = []
    for one in group:
        if family.takes_activation_limit:
            prepared += evaluator.with_limits(one, family)
        elif choose_slack and family.takes_slack:
            prepared += evaluator.with_slack(one, family)
        else:
            prepared += evaluator.with_cuts(one, family)
    fitting: list[Candidate] = []
    rejected = [one for one in prepared if one.rejected is not None]
    bounds = [(_bound(evaluator, one, family), one) for one in prepared if one.rejected is None]
    best = 0.0
    for bound, one in sorted(bounds, key=lambda pair: -pair[0]):
        if bound < (1 - AS_FAST) * best:
            break
        simulated = evaluator.simulate(one, family)
        if simulated.rejected is not None:
            rejected.append(simulated)
            continue
        fitting.append(simulated)
        assert simulated.predicted is not None
        best = max(best, simulated.predicted.progress_per_s)
    return _one_cut_each(fitting, rejected)


def _one_cut_each(fitting: list[Candidate], rejected: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Of candidates that differ in their partition alone, the best that fits, or else the nearest miss."""
    found: dict[Candidate, Candidate] = {}
    for one in (*_ranked(fitting), *sorted(rejected, key=lambda one: one.severity)):
        options = replace(
            one, partition=None, step_costs=None, predicted=None, rejected=None, needs_bytes=None, severity=(0, 0.0)
        )
        found.setdefault(options, one)
    kept = set(map(id, found.values()))
    return [one for one in fitting if id(one) in kept], [one for one in rejected if id(one) in kept]


def _bound(evaluator: Evaluator, one: Candidate, family: families.ScheduleFamily) -> float:
    """Progress per second that ``one`` cannot exceed."""
    return evaluator.at_most(one, family) / evaluator.overhead_of(one, family).factor


def _speed(one: Candidate) -> float:
    assert one.predicted is not None
    return one.predicted.progress_per_s


def _ranked(fitting: list[Candidate]) -> list[Candidate]:
    """The chosen one, then the others by progress. Equally fast ones are ordered as :func:`plan` says."""

    def preference(one: Candidate) -> tuple[float, ...]:
        assert one.predicted is not None
        found = one.predicted
        slack = sum(slack_by_stage(one.slack, len(found.peak_memory_bytes)))
        guessed = float(not found.overhead.known)
        return guessed, max(found.peak_memory_bytes), found.delay, found.drift, one.accumulation, slack

    ranked: list[Candidate] = []
    left = sorted(fitting, key=lambda one: (-_speed(one), preference(one)))
    while left:
        equal = [one for one in left if _speed(one) >= (1 - AS_FAST) * _speed(left[0])]
        first = min(equal, key=preference)
        ranked.append(first)
        left.remove(first)
    return ranked


def _nothing_fits(rejected: list[Candidate]) -> str:
    """The nearest miss in memory if there is one; else the least drift or delay, or the first reason of all."""
    nearest = min(rejected, key=lambda one: one.severity)
    if nearest.severity[0] == MEMORY:
        assert nearest.needs_bytes is not None
        return (
            f"no schedule fits into the memory: the least that any needs is {mib(nearest.needs_bytes)} on the fullest "
            f"device, by {nearest.label} ({nearest.rejected}); raise the memory limit, use more stages, or profile "
            "smaller micro-batches"
        )
    why = nearest.rejected or ""
    remedy = "; a higher delay limit, or none, lets it run" if why.startswith("delay") else ""
    if nearest.severity[0] == OVERHEAD:
        remedy = "; measure it with paci-rt calibrate, or give a delay limit, or none, to run it all the same"
    return f"no schedule fits: the nearest is {nearest.label} ({nearest.rejected}){remedy}"
