"""When each action of a schedule starts, given what it takes: the clockwork behind :mod:`paci_rt.simulate`.

Two ways to play the same streams: one action after the other, and one action of every rank that has something to do at
a time, with array operations. Both do the same arithmetic on the same numbers, so the timelines are equal to the bit.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from paci_rt.action import OPS, Codes, Op, decode, decode_fields
from paci_rt.errors import ScheduleError
from paci_rt.schedules import policies
from paci_rt.schedules.base import ScheduleFamily, Shape
from paci_rt.simulate.costs import Costs, Floats

RANKS_FOR_ARRAYS = 24
"""From this many ranks on it is quicker to advance all of them with array operations than one by one."""

_F, _B, _I, _W, _U = (OPS.index(op) for op in (Op.F, Op.B, Op.I, Op.W, Op.U))
_KIND = np.full(len(OPS), -1)  # F, then B or I, then W: rows of the table of own places
_KIND[[_F, _B, _I, _W]] = 0, 1, 1, 2


class Work:
    """A schedule ready to be played: for each action its duration, what it waits for and what its end sets off.

    Messages lie in one table of arrival times, NaN until they are sent: forward outputs by sending stage and
    micro-batch, then gradients likewise, then three cells for "nothing sent", "nothing to wait for" and "never".
    All streams lie behind one another; those of rank ``r`` at ``offsets[r] ... offsets[r + 1] - 1``. One more cell at
    the end, which can never run, stands for "at the end" to the last rank.
    """

    def __init__(
        self, family: ScheduleFamily, shape: Shape, costs: Costs, windows: int, policy: str, lookahead: bool
    ) -> None:
        self.family, self.shape, self.costs, self.windows, self.policy = family, shape, costs, windows, policy
        self.lookahead = lookahead
        self.micro_batches = windows * shape.accumulation
        self.streams: list[Codes] = [family.stream(shape, rank, windows) for rank in range(shape.ranks)]
        self.offsets = np.concatenate(([0], np.cumsum([len(stream) for stream in self.streams])))
        cells = 2 * shape.num_stages * self.micro_batches
        self.nothing, self.ready, self.never = cells, cells + 1, cells + 2
        kind = np.int32 if cells + 3 < 2**31 else np.int64
        count = int(self.offsets[-1])
        self.need = np.full(count + 1, self.never, dtype=kind)
        self.out = np.full(count + 1, self.nothing, dtype=kind)
        self.duration = np.zeros(count + 1)
        self.start = np.zeros(count + 1)
        self.arrival = np.full(cells + 3, np.nan)
        self.arrival[self.ready] = 0.0
        sizes = costs.per_stage("message_bytes", shape.num_stages)
        # Gradients have the size of the output they belong to, which is that of the stage before.
        backwards = np.concatenate(([0.0], sizes[:-1]))
        self.channel_of, keeps = self._channels()
        self.transfer_s = np.where(keeps, 0.0, np.concatenate((sizes, backwards)) / costs.bandwidth_bytes_per_s)
        self.hop_s = np.where(keeps, 0.0, costs.hop_s)
        self.times = self._times()
        for rank in range(shape.ranks):
            self._add(rank)

    def end(self, rank: int) -> Floats:
        """When each action of ``rank`` ended, in the order of its stream."""
        return self.start[self.span(rank)] + self.duration[self.span(rank)]

    def span(self, rank: int) -> slice:
        """Where the stream of ``rank`` lies."""
        return slice(int(self.offsets[rank]), int(self.offsets[rank + 1]))

    def stuck(self, at: Codes) -> Codes:
        """The next action of every rank that has not reached its end, where ``at`` says how far each has got."""
        left = zip(self.streams, self.offsets, self.offsets[1:], at, strict=False)
        return np.array([stream[here - first] for stream, first, end, here in left if here < end], dtype=np.int64)

    def _channels(self) -> tuple[Codes, npt.NDArray[np.bool_]]:
        """For the forwards of every stage, then for its gradients: their channel, and whether they stay on their rank.

        There is one channel for the forwards and one for the gradients from each rank to each of its neighbours.
        """
        shape = self.shape
        stages = np.arange(shape.num_stages)
        sender = np.tile(shape.rank_of(stages), 2)
        neighbours = np.concatenate((np.minimum(stages + 1, shape.num_stages - 1), np.maximum(stages - 1, 0)))
        receiver = shape.rank_of(neighbours)
        kind = np.repeat((0, 1), shape.num_stages)
        _, channel = np.unique((kind * shape.ranks + sender) * shape.ranks + receiver, return_inverse=True)
        return channel, sender == receiver

    def _times(self) -> Floats:
        """Seconds by operation and stage."""
        forward, input_grad, weight_grad, update = (
            self.costs.per_stage(name, self.shape.num_stages)
            for name in ("forward_s", "input_grad_s", "weight_grad_s", "update_s")
        )
        again = np.where(self.recomputes(np.arange(self.shape.num_stages)), forward, 0.0)
        times = np.zeros((len(OPS), self.shape.num_stages))
        times[_F], times[_I], times[_W], times[_U] = forward, again + input_grad, weight_grad, update
        times[_B] = again + input_grad + weight_grad
        return times

    def recomputes(self, stages: Codes) -> npt.NDArray[np.bool_]:
        """Which of ``stages`` run their forwards again."""
        ranks = range(self.shape.ranks)
        by_rank = [policies.recomputes(self.policy, self.family, self.shape, rank) for rank in ranks]
        found: npt.NDArray[np.bool_] = np.array(by_rank)[self.shape.rank_of(stages)]
        return found

    def _add(self, rank: int) -> None:
        stream, span, (stages, m) = self.streams[rank], self.span(rank), (self.shape.num_stages, self.micro_batches)
        stage, op, index = decode_fields(stream)
        forward, backward, update = op == _F, (op == _B) | (op == _I), op == _U
        limit = np.where(update, self.windows, m)
        bad = (self.shape.rank_of(stage) != rank) | (stage >= stages) | (index >= limit) | ~(update | (_KIND[op] >= 0))
        self._refuse(rank, bad, "does not belong there")
        need, out, duration = self.need[span], self.out[span], self.duration[span]
        need[:] = self.ready
        for mask, before, offset in (
            (forward & (stage > 0), stage - 1, 0),
            (backward & (stage < stages - 1), stage + 1, stages),
        ):
            need[mask] = (before[mask] + offset) * m + index[mask]
        for mask, offset in ((forward & (stage < stages - 1), 0), (backward & (stage > 0), stages)):
            out[mask] = (stage[mask] + offset) * m + index[mask]
        need[self._out_of_order(rank, stage, op, index)] = self.never
        predicted = np.zeros(len(stream))
        if self.lookahead or self.policy == "predict":
            predict_s = self.costs.per_stage("predict_s", stages)[stage]
            updated = sum(np.cumsum(update & (stage == one)) * (stage == one) for one in self.shape.stages_of(rank))
            late = forward & (index // self.shape.accumulation > updated)
            predicted[late] = predict_s[late]
        factors = np.array(self.costs.micro_batch_factors)
        duration[:] = predicted + self.times[op, stage] * np.where(update, 1.0, factors[index % len(factors)])
        if self.costs.noise:
            # Drawn by rank, in the order of its stream, so that it does not matter how the timeline is computed.
            sigma = math.sqrt(math.log1p(self.costs.noise**2))
            normal = np.random.default_rng((self.costs.seed, rank)).standard_normal(len(duration))
            duration *= np.exp(sigma * normal - sigma**2 / 2)

    def _out_of_order(self, rank: int, stage: Codes, op: Codes, index: Codes) -> npt.NDArray[np.bool_]:
        """Actions before which their own rank has not done all that they need: F before B or I, I before W, all
        backwards of a window before its U."""
        place = np.arange(len(op))
        kind, chunk, update = _KIND[op], self.shape.places.chunk_of(stage), op == _U
        places = np.full((3, self.shape.chunks, self.micro_batches), len(op))
        updates = np.full((self.shape.chunks, self.windows), len(op))
        places[kind[~update], chunk[~update], index[~update]] = place[~update]
        updates[chunk[update], index[update]] = place[update]
        found = places[kind, chunk, np.where(update, 0, index)]
        found[update] = updates[chunk[update], index[update]]
        self._refuse(rank, found != place, "runs twice")
        last = 2 if np.any(kind == 2) else 1
        window_end = places[last].reshape(self.shape.chunks, self.windows, self.shape.accumulation).max(axis=2)
        needed = np.full(len(op), -1)
        for at in (1, 2):
            mask = kind == at
            needed[mask] = places[at - 1][chunk[mask], index[mask]]
        needed[update] = window_end[chunk[update], index[update]]
        return needed > place

    def _refuse(self, rank: int, bad: npt.NDArray[np.bool_], why: str) -> None:
        if bad.any():
            action = decode(self.streams[rank][np.flatnonzero(bad)[:1]])[0]
            raise ScheduleError(f"schedule {self.family.name}: action {action} in the stream of rank {rank} {why}")


def play(work: Work) -> Codes:
    """Fill ``work.start``; returns the actions that nothing gets past, at most one per rank, none if all ran."""
    return (play_one_by_one if len(work.streams) < RANKS_FOR_ARRAYS else play_all_at_once)(work)


def play_one_by_one(work: Work) -> Codes:
    """Let every rank run as far as it gets, in turns, until none gets any further."""
    need, out, duration = work.need.tolist(), work.out.tolist(), work.duration.tolist()
    arrival, start = work.arrival.tolist(), work.start.tolist()
    transfer_s, channel_of = work.transfer_s.tolist(), work.channel_of.tolist()
    channel_free = [0.0] * (1 + max(channel_of))
    at, stop = work.offsets[:-1].tolist(), work.offsets[1:].tolist()
    free = [0.0] * len(at)
    m, hop_s, nothing = work.micro_batches, work.hop_s.tolist(), work.nothing
    progressed = True
    while progressed:
        progressed = False
        for rank, end in enumerate(stop):
            now, here = free[rank], at[rank]
            while here < end:
                arrived = arrival[need[here]]
                if arrived != arrived:  # NaN: still to be sent
                    break
                begin = now if now > arrived else arrived
                start[here] = begin
                now = begin + duration[here]
                cell = out[here]
                if cell != nothing:
                    lane = cell // m
                    channel = channel_of[lane]
                    sent = channel_free[channel]
                    sent = (now if now > sent else sent) + transfer_s[lane]
                    channel_free[channel] = sent
                    arrival[cell] = sent + hop_s[lane]
                here += 1
            progressed |= here > at[rank]
            free[rank], at[rank] = now, here
    work.start[:] = start
    return work.stuck(np.array(at))


def play_all_at_once(work: Work) -> Codes:
    """In every turn run one action of each rank whose next one can run."""
    need, out, duration, arrival, start = work.need, work.out, work.duration, work.arrival, work.start
    ranks, m, channels = len(work.streams), work.micro_batches, 1 + int(work.channel_of.max())
    # A turn may write the cell for "nothing sent", whose lane comes last: its channel is always free.
    transfer_s, channel_of = np.append(work.transfer_s, 0.0), np.append(work.channel_of, channels)
    hop_s = np.append(work.hop_s, 0.0)
    instant = not transfer_s.any()  # then no message ever waits for the one before
    channel_free = np.zeros(channels + 1)
    at, stop = work.offsets[:-1].copy(), work.offsets[1:]
    free = np.zeros(ranks)
    next_need = need[at]
    next_need[at == stop] = work.never
    while True:
        arrived = arrival[next_need]
        go = np.flatnonzero(arrived == arrived)  # all that is not NaN
        if not len(go):
            return work.stuck(at)
        here = at[go]
        begin = np.maximum(free[go], arrived[go])
        start[here] = begin
        begin += duration[here]
        free[go] = begin
        cell = out[here]
        if instant:
            arrival[cell] = begin + hop_s[cell // m]
        else:
            lane = cell // m
            channel = channel_of[lane]
            sent = np.maximum(begin, channel_free[channel]) + transfer_s[lane]
            channel_free[channel] = sent
            channel_free[-1] = 0.0
            arrival[cell] = sent + hop_s[lane]
        here += 1
        at[go] = here
        next_need[go] = np.where(here < stop[go], need[here], work.never)
