"""What a played schedule says: throughput, bubbles, memory, and which versions of the weights were used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from paci_rt.action import OPS, Codes, Op, decode, decode_fields
from paci_rt.schedules import policies
from paci_rt.schedules.slack import Slack
from paci_rt.simulate.costs import Floats
from paci_rt.simulate.timeline import Work
from paci_rt.trace import Event

_F, _B, _I, _W, _U = (OPS.index(op) for op in (Op.F, Op.B, Op.I, Op.W, Op.U))

Histogram = dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The outcome of :func:`paci_rt.simulate.simulate`.

    Attributes:
        schedule, policy: names. lookahead: whether early forwards look ahead.
        ranks, stages, placement, windows, accumulation, slack: what was played; ``stages`` counts those of all ranks.
        makespan_s: from the start to the end of the last action.
        bubble_rate: ``(C - work) / C``. Of a flushed schedule ``C`` is, per window, the longest that any rank takes
            from the start of its first F to the end of its last B or W, and ``work`` the mean over ranks of their F, B,
            I and W; both are summed over the windows. An asynchronous schedule counts as one window, with the updates
            inside it as work. Not the makespan: the next window's start overlaps this one's end.
        steady_utilization: mean over ranks of busy time over elapsed time in the steady part, which on each rank
            lasts from the end of one update to the end of another. Flush schedules: from that of the first window to
            that of the last, so whole periods with their bubble and update; with one window, the longest that any
            rank takes from its first start to its last end. Asynchronous ones: the windows that are left without those
            in which the pipeline fills and drains (``ceil((in-flight bound - 1) / a)`` at either end, the first window
            at least). A run too short to have any counts whole.
        micro_batches_per_s: in the steady part of the rank that takes longest.
        steady_windows: windows in the steady part; 0 where the run was too short and counts whole.
        peak_activations: forwards whose B or I has not run, by rank; of all its chunks together.
        peak_stashes: micro-batches between their I and their W, by rank.
        peak_activation_bytes: activations and stashes together, by rank. Under ``recompute`` a micro-batch holds its
            ``input_bytes``, and its ``activation_bytes`` while its B or I runs.
        weight_versions: whole versions of its weights that a rank holds, the current one among them.
        extra_weight_bytes: what versions besides the current one take, by rank; one scratch copy for ``predict``
            and look-ahead where forwards are early, which fp32 masters make unnecessary.
        drift: micro-batches by drift, by rank: version at the backward minus version at the forward.
        delay: micro-batches by delay, by rank: version that the gradient is applied to minus version at the forward.
        max_drift: largest of all.
        busy_s: seconds of compute and updates, by rank, in the whole run.
        window_end_s: when the last rank had updated, by window.
        events: every action, by start time and stage, if they were asked for; ``version`` is that of the weights used
            (W: those of its I; U: the one that is stepped).

    Example:
        1F1B with 4 stages, 8 micro-batches and unit times: of 33 units of time, 9 are bubble.

        >>> from paci_rt import schedules
        >>> from paci_rt.simulate import Costs, simulate
        >>> unit = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
        >>> result = simulate(schedules.get("1f1b"), schedules.Shape(num_stages=4, accumulation=8), unit)
        >>> result.makespan_s, round(result.bubble_rate, 4), result.peak_activations
        (33.0, 0.2727, {0: 4, 1: 3, 2: 2, 3: 1})
    """

    schedule: str
    policy: str
    lookahead: bool
    ranks: int
    stages: int
    placement: str | None
    windows: int
    accumulation: int
    slack: Slack
    makespan_s: float
    bubble_rate: float
    steady_utilization: float
    micro_batches_per_s: float
    steady_windows: int
    peak_activations: dict[int, int]
    peak_stashes: dict[int, int]
    peak_activation_bytes: dict[int, float]
    weight_versions: dict[int, int]
    extra_weight_bytes: dict[int, float]
    drift: dict[int, Histogram]
    delay: dict[int, Histogram]
    max_drift: int
    max_delay: int
    busy_s: dict[int, float]
    window_end_s: tuple[float, ...]
    events: list[Event] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values without the events; what goes by rank comes as a list."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "events"}
        return {
            name: [value[rank] for rank in range(self.ranks)]
            if isinstance(value, dict)
            else list(value)
            if isinstance(value, tuple)
            else value
            for name, value in values.items()
        }


@dataclass
class _Rank:
    """One rank's stream, as parallel arrays, and what was found in it."""

    stage: Codes
    op: Codes
    index: Codes
    start: Floats
    end: Floats
    duration: Floats


def measure(work: Work, *, keep_events: bool) -> Simulation:
    """Sum up a schedule that was played to its end."""
    shape, family, ranks = work.shape, work.family, range(work.shape.ranks)
    spans = _Spans(work)
    peaks, versions, busy, makespan = [], [], [], 0.0
    events: list[Event] = []
    for rank in ranks:
        span = work.span(rank)
        row = _Rank(*decode_fields(work.streams[rank]), work.start[span], work.end(rank), work.duration[span])
        used = _versions(work, rank, row)
        spans.add(rank, row)
        peaks.append(_peaks(work, row))
        versions.append(used)
        busy.append(float(row.duration.sum()))
        makespan = max(makespan, float(row.end[-1]) if len(row.end) else 0.0)
        if keep_events:
            events += _events(work.streams[rank], row, used.of_action(row, shape.accumulation))
        used.forget()
    events.sort(key=lambda event: (event.start_s, event.stage))
    utilization, per_s, steady_windows = spans.steady()
    held = [policies.versions_held(work.policy, family, shape, rank) for rank in ranks]
    weight_bytes = work.costs.per_stage("weight_bytes", shape.num_stages)
    of_rank = [float(weight_bytes[list(shape.stages_of(rank))].sum()) for rank in ranks]
    copies = [policies.copies_held(work.policy, family, shape, rank, work.lookahead) for rank in ranks]
    return Simulation(
        schedule=family.name,
        policy=work.policy,
        lookahead=work.lookahead,
        ranks=shape.ranks,
        placement=shape.placement,
        stages=shape.num_stages,
        windows=work.windows,
        accumulation=shape.accumulation,
        slack=shape.slack,
        makespan_s=makespan,
        bubble_rate=spans.bubble_rate(),
        steady_utilization=utilization,
        micro_batches_per_s=per_s,
        steady_windows=steady_windows,
        peak_activations={rank: peaks[rank][0] for rank in ranks},
        peak_stashes={rank: peaks[rank][1] for rank in ranks},
        peak_activation_bytes={rank: peaks[rank][2] for rank in ranks},
        weight_versions=dict(enumerate(held)),
        extra_weight_bytes={rank: copies[rank] * of_rank[rank] for rank in ranks},
        drift={rank: versions[rank].drift for rank in ranks},
        delay={rank: versions[rank].delay for rank in ranks},
        max_drift=max(max(used.drift) for used in versions),
        max_delay=max(max(used.delay) for used in versions),
        busy_s=dict(enumerate(busy)),
        window_end_s=tuple(spans.update_end.max(axis=0).tolist()),
        events=events,
    )


# ------------------------------------------------------------------------------------------------------------ memory


def _peaks(work: Work, row: _Rank) -> tuple[int, int, float]:
    """Peak activations, stashes, and bytes of both, of one rank."""
    forward, backward = row.op == _F, (row.op == _B) | (row.op == _I)
    halves, weight_grad = row.op == _I, row.op == _W
    activations = np.cumsum(forward.astype(np.int64) - backward)
    stashes = np.cumsum(halves.astype(np.int64) - weight_grad)

    def at(name: str) -> Floats:
        return np.asarray(work.costs.per_stage(name, work.shape.num_stages)[row.stage])

    whole, stash = at("activation_bytes"), at("stash_bytes")
    kept = np.where(work.recomputes(row.stage), at("input_bytes"), whole)
    held = np.cumsum(kept * forward - kept * backward + stash * halves - stash * weight_grad)
    # While a backward runs, its micro-batch's activations are all there, and nothing of it is freed.
    during = np.concatenate(([0.0], held[:-1])) + np.maximum(whole - kept, 0.0) * backward
    most = float(max(held.max(initial=0.0), during.max(initial=0.0)))
    return int(activations.max(initial=0)), int(stashes.max(initial=0)), most


# ---------------------------------------------------------------------------------------------------------- versions


class _Versions:
    """Which version of its weights each forward and backward of a rank used, and histograms of their differences."""

    def __init__(self, chunks: int, micro_batches: int) -> None:
        self.forward = np.zeros((chunks, micro_batches), dtype=np.int64)
        self.backward = np.zeros((chunks, micro_batches), dtype=np.int64)
        self.chunk: Codes = np.zeros(0, dtype=np.int64)
        self.drift: Histogram = {}
        self.delay: Histogram = {}

    def of_action(self, row: _Rank, accumulation: int) -> Codes:
        """Version that each action used."""
        m = np.where(row.op == _U, 0, row.index)
        used = np.where(row.op == _F, self.forward[self.chunk, m], self.backward[self.chunk, m])
        return np.where(row.op == _U, row.index, used)

    def forget(self) -> None:
        """Keep the histograms only."""
        del self.forward, self.backward, self.chunk


def _versions(work: Work, rank: int, row: _Rank) -> _Versions:
    shape, found = work.shape, _Versions(work.shape.chunks, work.micro_batches)
    found.chunk = shape.places.chunk_of(row.stage)
    window = np.arange(work.micro_batches) // shape.accumulation
    for chunk in range(shape.chunks):
        mine = found.chunk == chunk
        op, index = row.op[mine], row.index[mine]
        current = np.cumsum(op == _U)  # updates so far
        forward, backward = op == _F, (op == _B) | (op == _I)
        m = index[forward]
        found.forward[chunk, m] = forward_versions(work.policy, window[m], current[forward])
        m = index[backward]
        at_forward = found.forward[chunk, m]
        found.backward[chunk, m] = policies.backward_version(work.policy, at_forward, current[backward])
    found.drift = _histogram(found.backward - found.forward)
    found.delay = _histogram(window - found.forward)
    return found


def forward_versions(policy: str, window: Codes, current: Codes) -> Codes:
    """:func:`paci_rt.schedules.policies.forward_version` for arrays, in a pipeline that was empty before window 0."""
    return np.maximum(window - 1, 0) if policy == "2bw" else current


def _histogram(values: Codes) -> Histogram:
    least = int(values.min())
    counts = np.bincount((values - least).ravel())
    return {least + value: int(count) for value, count in enumerate(counts) if count}


# -------------------------------------------------------------------------------------------------------------- time


class _Spans:
    """Where the windows of each rank start and end."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.flush = work.family.flush
        self.ranks = work.shape.ranks
        self.update_end = np.zeros((self.ranks, work.windows))
        self.busy_at_update = np.zeros((self.ranks, work.windows))  # busy time up to then
        periods = work.windows if self.flush else 1
        self.length, self.compute = np.zeros((self.ranks, periods)), np.zeros((self.ranks, periods))
        self.whole = np.zeros((self.ranks, 2))  # first start, last end
        self.busy = np.zeros(self.ranks)

    def add(self, rank: int, row: _Rank) -> None:
        """Take in one rank."""
        update, busy = row.op == _U, np.cumsum(row.duration)
        if not len(row.op):
            return
        # Of several assignments to one place the last one stays: a rank has updated when all its stages have.
        self.update_end[rank, row.index[update]] = row.end[update]
        self.busy_at_update[rank, row.index[update]] = busy[update]
        self.whole[rank], self.busy[rank] = (row.start[0], row.end[-1]), busy[-1]
        compute = np.flatnonzero(~update)
        if self.flush:
            window = row.index[compute] // self.work.shape.accumulation
            first, last = np.zeros(self.work.windows), np.zeros(self.work.windows)
            first[window[::-1]] = row.start[compute][::-1]
            last[window] = row.end[compute]
            self.length[rank] = last - first
            self.compute[rank] = np.bincount(window, weights=row.duration[compute], minlength=self.work.windows)
        else:
            self.length[rank] = row.end[compute[-1]] - row.start[compute[0]]
            self.compute[rank] = busy[compute[-1]]

    def bubble_rate(self) -> float:
        """See ``Simulation.bubble_rate``."""
        longest = float(self.length.max(axis=0).sum())
        return (longest - float(self.compute.mean(axis=0).sum())) / longest if longest else 0.0

    def steady(self) -> tuple[float, float, int]:
        """Utilisation, micro-batches per second and windows of the steady part."""
        shape, family, windows = self.work.shape, self.work.family, self.work.windows
        ahead = max(family.in_flight_bound(shape, rank) for rank in range(self.ranks)) - 1
        left_out = 0 if self.flush else -(-ahead // shape.accumulation)
        first, end = max(1, left_out), windows - left_out
        if end > first:
            elapsed = self.update_end[:, end - 1] - self.update_end[:, first - 1]
            busy = self.busy_at_update[:, end - 1] - self.busy_at_update[:, first - 1]
            counted = end - first
        else:
            elapsed = np.full(self.ranks, float((self.whole[:, 1] - self.whole[:, 0]).max()))
            if not self.flush:
                elapsed[:] = self.whole[:, 1].max()
            busy, counted = self.busy, 0
        longest_s = float(elapsed.max())
        if not longest_s:
            return 0.0, 0.0, counted
        utilization = float(np.divide(busy, elapsed, out=np.zeros_like(busy), where=elapsed > 0).mean())
        return min(1.0, utilization), (counted or windows) * shape.accumulation / longest_s, counted


def _events(stream: Codes, row: _Rank, versions: npt.NDArray[np.int64]) -> Sequence[Event]:
    times = zip(decode(stream), row.start.tolist(), row.end.tolist(), versions.tolist(), strict=True)
    return [Event(action.stage, str(action), start, end, version) for action, start, end, version in times]
