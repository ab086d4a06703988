"""Modulo scheduling of a V: when the actions of one micro-batch start, on a period that repeats for ever.

Rank ``r`` of ``P`` holds pieces ``r`` and ``2P-1-r``. A micro-batch meets every rank four times, in four sweeps: F of
the first pieces down the ranks, F of the second ones up, I of the second ones down, I of the first ones up again.
Their starts modulo the period must leave room for each other on every rank, and for two W in what is left
(modulo scheduling: Rau, Iterative Modulo Scheduling, MICRO-27, 1994). What a micro-batch waits between two of its
actions is what makes its activations live longer than they need to.

Waits only arise between neighbouring ranks. So the search goes rank by rank, from the last one, where both sweeps
turn, to the first, and keeps the best so many states (a beam). On each rank it tries all cyclic orders of the four
actions and all places of the two W; in each of those, one action starts as soon as it can and the others as near to
that as the order lets them.

All times are integers, so that every machine finds the same.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

A, B, C, D = range(4)  # F of the rank's first piece, F of its second, I of its second, I of its first
_PERMS = [(A, *rest) for rest in itertools.permutations((B, C, D))]
ORDERS: Ints = np.array([perm for perm in _PERMS for _ in range(16)])
"""[96, 4]: the four actions in cyclic order."""
GAPS: Ints = np.array([gaps for _ in _PERMS for gaps in itertools.product(range(4), repeat=2)])
"""[96, 2]: after which place of the order W of the first piece comes, and W of the second."""
_PLACE: Ints = np.argsort(ORDERS, axis=1)
_SPARE = 24  # how many times as many states are looked at as are kept, because many have the same places
_MIX = 0x9E3779B97F4A7C15 - 2**64
_LATER = np.array([False, True, False, True])  # seen from the inner rank: b and d follow it, a and c go before it


class Times(NamedTuple):
    """Ticks of every piece's F, I and W, and of a message between two ranks."""

    forward: Ints
    input_grad: Ints
    weight_grad: Ints
    hop: int

    @property
    def ranks(self) -> int:
        return len(self.forward) // 2

    def work(self) -> Ints:
        """Ticks that a micro-batch takes on each rank."""
        whole = self.forward + self.input_grad + self.weight_grad
        return np.asarray(whole[: self.ranks] + whole[: self.ranks - 1 : -1])

    def lengths(self, rank: int) -> Ints:
        """Of the four actions of ``rank``."""
        other = len(self.forward) - 1 - rank
        return np.array(
            (self.forward[rank], self.forward[other], self.input_grad[other], self.input_grad[rank]), dtype=np.int64
        )

    def room(self, rank: int) -> Ints:
        """[96, 4]: from the start of the i-th action of each order to the earliest start of the next."""
        weights = self.weight_grad[rank], self.weight_grad[len(self.forward) - 1 - rank]
        room = self.lengths(rank)[ORDERS]
        for column, weight in enumerate(weights):
            room[np.arange(len(room)), GAPS[:, column]] += weight
        return np.asarray(room)


class Timetables(NamedTuple):
    """Complete timetables, one a row: those whose activations live shortest first.

    Attributes:
        order [n, P]: which of ``ORDERS`` each rank has.
        start [n, P, 4]: where in the period its four actions start, in the order A, B, C, D.
        spans [n, P, 3]: true times from A to B, from B to C and from C to D.
    """

    order: Ints
    start: Ints
    spans: Ints

    def behind(self, period: int) -> Ints:
        """[n, P, 4]: how many micro-batches A is ahead of each action of the same round, from A on in cyclic order."""
        since = np.concatenate((np.zeros_like(self.spans[..., :1]), np.cumsum(self.spans, axis=2)), axis=2)
        return np.asarray((since - (self.start - self.start[..., :1]) % period) // period)

    def in_flight(self, period: int) -> Ints:
        """[n]: pieces of micro-batches between their F and their I on the fullest rank."""
        behind = self.behind(period)
        before = behind[..., D] + behind[..., C] - behind[..., B]
        change = np.where(ORDERS <= B, 1, -1).cumsum(axis=1).max(axis=1)
        return np.asarray((before + change[self.order]).max(axis=1))


class _States(NamedTuple):
    """States of the beam: rows of the same length.

    Attributes:
        order, start [n], [n, 4]: place of the actions of the present rank.
        spans [n, 2]: time from A to B and from C to D.
        link [n]: what lies between this rank and the one inside: from B there to B here, and from C here to C there.
        held [n]: the longest that the two pieces of any rank so far live together, without what is still to come.
        parent [n]: row in the beam of the rank inside.
    """

    order: Ints
    start: Ints
    spans: Ints
    link: Ints
    held: Ints
    parent: Ints

    def take(self, rows: Ints) -> _States:
        return _States(*(column[rows] for column in self))


def timetables(times: Times, period: int, width: int) -> Timetables:
    """Timetables of ``period`` ticks, at most ``width``.

    Args:
        times: of the pieces; every F and I takes at least one tick.
        period: at least the most work of a rank.
        width: states that are kept at each rank.
    """
    beams = [_best(_innermost(times, period), width, period)]
    for rank in range(times.ranks - 2, -1, -1):
        beams.append(_outward(beams[-1], times, rank, period, width))
    final = beams[-1]
    middle = (final.start[:, C] - final.start[:, B]) % period  # from B to C
    row = np.lexsort((np.arange(len(middle)), middle, final.held + 2 * middle))
    middle, orders, starts, spans = middle[row], [], [], []
    for beam in reversed(beams):  # back to the innermost rank
        here = beam.take(row)
        orders.append(here.order)
        starts.append(here.start)
        spans.append(np.stack((here.spans[:, 0], middle, here.spans[:, 1]), axis=1))
        middle, row = middle + here.link, here.parent
    return Timetables(np.stack(orders, axis=1), np.stack(starts, axis=1), np.stack(spans, axis=1))


def _best(states: _States, width: int, period: int) -> _States:
    """The ``width`` states with the least held; of those at the same places only one."""
    states = _shortest(states, _SPARE * width)
    rows = np.lexsort((np.arange(len(states.held)), states.spans.sum(axis=1), states.held))
    places = (states.start[rows, 1:] - states.start[rows, :1]) % period
    key = (places[:, 0] * _MIX + places[:, 1]) * _MIX + places[:, 2]  # wraps around, the same everywhere
    _, first = np.unique(key, return_index=True)
    return states.take(rows[np.sort(first)[:width]])


def _shortest(states: _States, count: int) -> _States:
    """At least the ``count`` states with the least held."""
    if len(states.held) <= count:
        return states
    return states.take(np.flatnonzero(states.held <= np.partition(states.held, count - 1)[count - 1]))


def _innermost(times: Times, period: int) -> _States:
    """The last rank: all orders, with what is idle in one gap or halved between two."""
    rank = times.ranks - 1
    room = times.room(rank)
    idle = period - int(times.work()[rank])
    parts = [
        np.eye(4, dtype=np.int64)[i] * (idle // 2) + np.eye(4, dtype=np.int64)[j] * (idle - idle // 2)
        for i in range(4)
        for j in range(i, 4)
    ]
    spread = np.array(parts if idle else parts[:1])  # [10, 4]
    wide = room[None, :, :3] + spread[:, None, :3]
    places = np.concatenate((np.zeros((*wide.shape[:2], 1), dtype=np.int64), np.cumsum(wide, axis=2)), axis=2)
    start = np.take_along_axis(places, np.broadcast_to(_PLACE, places.shape), axis=2).reshape(-1, 4)
    spans = np.stack((start[:, B] - start[:, A], start[:, D] - start[:, C]), axis=1) % period
    order = np.tile(np.arange(len(ORDERS)), len(spread))
    none = np.zeros(len(start), dtype=np.int64)
    return _States(order, start, spans, none, spans.sum(axis=1), none)


def _outward(beam: _States, times: Times, rank: int, period: int, width: int) -> _States:
    """The best that can be made of the states of ``rank + 1`` on ``rank``."""
    other, hop = len(times.forward) - 1 - rank, times.hop
    # From the start of an action to that of the next in its sweep: A here to there, B there to here, and so on.
    step = hop + np.array(
        (times.forward[rank], times.forward[other - 1], times.input_grad[other], times.input_grad[rank + 1])
    )
    ready = (beam.start + np.where(_LATER, step, -step)) % period
    found = []
    for anchor in range(4):
        parent, order, start = _placed(ready, times.room(rank), anchor, period)
        took = step + np.where(_LATER, start - ready[parent], ready[parent] - start) % period
        spans = beam.spans[parent] + took[:, ::2] + took[:, 1::2]
        link = took[:, B] + took[:, C]
        held = np.maximum(beam.held[parent] + 2 * link, spans.sum(axis=1))
        found.append(_shortest(_States(order, start, spans, link, held, parent), _SPARE * width))
    return _best(_States(*(np.concatenate(columns) for columns in zip(*found, strict=True))), width, period)


def _placed(ready: Ints, room: Ints, anchor: int, period: int) -> tuple[Ints, Ints, Ints]:
    """The four actions in every order, where that at place ``anchor`` of it does not wait.

    Args:
        ready [n, 4]: when they could be at the earliest (b, d) or at the latest (a, c).
        room [96, 4]: see :meth:`Times.room`.

    Returns:
        Row of ``ready``, order, and starts [., 4] of those that are possible.
    """
    turn = [(anchor + i) % 4 for i in range(4)]
    letters = ORDERS[:, turn]
    later, gap = _LATER[letters], room[:, turn]
    idle = period - room.sum(axis=1)
    base = ready[:, letters[:, 0]]
    at = [np.zeros_like(base)]
    low = np.zeros(len(room), dtype=np.int64)
    for i in (1, 2, 3):
        low = low + gap[:, i - 1]
        wish = (ready[:, letters[:, i]] - base) % period
        late = np.where((wish >= low) & (wish <= low + idle), wish, low)
        early = np.where((wish >= low) & (wish <= low + idle), wish, low + idle)
        at.append(np.where(later[:, i], late, early))
    for _ in range(2):
        for i in (2, 3):
            at[i] = np.where(later[:, i], np.maximum(at[i], at[i - 1] + gap[:, i - 1]), at[i])
        for i in (2, 1):
            at[i] = np.where(later[:, i], at[i], np.minimum(at[i], at[i + 1] - gap[:, i]))
    fits = at[3] + gap[:, 3] <= period
    for i in (1, 2, 3):
        fits &= at[i] >= at[i - 1] + gap[:, i - 1]
    row, order = np.nonzero(fits)
    places = np.stack([(base + one)[row, order] for one in at], axis=1)
    start = np.empty_like(places)
    np.put_along_axis(start, letters[order], places, axis=1)
    return row, order, start
