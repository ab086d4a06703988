"""Whether any order of stages in a V keeps a period and a limit: exactly, by going through all of them.

For a given period, what a rank's place in the order says is a set of differences between the starts of its four
actions (A, B, C, D: F of its first piece, F and I of its second, I of its first). All ranks inside it matter to it by
the longest walks from A or C to B or D only: four numbers, of which smaller is never worse. So it is enough to keep,
from the last rank to the first, the quadruples that no other beats in all four.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from paci_rt.schedules.modulo import GAPS, ORDERS, A, B, C, D, Times

Floats = npt.NDArray[np.float64]
_NEVER = -np.inf


def _places(limit: float, stash: float) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Which of ``ORDERS``, and how many micro-batches each action is behind A: all that hold at most ``limit``."""
    found = []
    for number, order in enumerate(ORDERS.tolist()):
        place = {letter: at for at, letter in enumerate(order)}
        most = int(limit) + 1
        for b, c, d in itertools.product(range(most + 1), repeat=3):
            if not b <= c + 1 or not c <= d + 1:
                continue
            held = float(d + c - b)
            for letter, gap in ((D, GAPS[number, 0]), (C, GAPS[number, 1])):
                held += stash * (place[letter] > gap)
            peak, pieces, in_flight = held, d + c - b, d + c - b
            for at, letter in enumerate(order):
                change = 1 if letter in (A, B) else -1
                in_flight += change
                held += 1 if change == 1 else stash - 1
                pieces, peak = max(pieces, in_flight), max(peak, held)
                held -= stash * sum(gap == at for gap in GAPS[number].tolist())
            if pieces <= limit + 1e-6 and peak <= limit + stash + 1e-6:
                found.append((number, (0, b, c, d)))
    return found


def _rings(times: Times, rank: int, places: list, period: int) -> Floats:
    """[n, 4, 4]: for each place the least from the start of one action to that of another."""
    room = times.room(rank)
    rings = np.zeros((len(places), 4, 4))
    for row, (number, behind) in enumerate(places):
        order = ORDERS[number].tolist()
        start = np.concatenate(([0], np.cumsum(room[number])[:3]))
        for i, j in itertools.product(range(4), repeat=2):
            one, other = order[i], order[j]
            wraps = j <= i
            if i != j:
                ticks = start[j] - start[i] + (int(room[number].sum()) if wraps else 0)
                rings[row, one, other] = ticks + (behind[other] - behind[one] - wraps) * period
    return np.unique(rings, axis=0)


def _closed(edges: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Longest walks, and whether none of them gains for ever."""
    edges = edges.copy()
    for k in range(4):
        np.maximum(edges, edges[:, :, k, None] + edges[:, k, None, :], out=edges)
    return edges, (np.diagonal(edges, axis1=1, axis2=2) <= 1e-9).all(axis=1)


def _least(quadruples: Floats) -> Floats:
    """Those that no other beats or equals in all four."""
    kept: list[Floats] = []
    left = np.unique(quadruples, axis=0)
    left = left[np.argsort(left.sum(axis=1), kind="stable")]
    while len(left):
        first = left[0]
        kept.append(first)
        left = left[(left < first).any(axis=1)]
    return np.array(kept).reshape(-1, 4)


def possible(times: Times, period: int, limit: float, stash: float) -> bool:
    """Whether an order keeps ``period`` ticks and ``limit`` pieces (and a stash beside them) on every rank."""
    if period < int(times.work().max()):
        return False
    ranks, places = times.ranks, _places(limit, stash)
    forward, input_grad = times.forward.tolist(), times.input_grad.tolist()
    inner = np.array([[forward[ranks - 1], _NEVER, _NEVER, input_grad[ranks]]], dtype=np.float64)
    for rank in range(ranks - 1, -1, -1):
        rings, other = _rings(times, rank, places, period), 2 * ranks - 1 - rank
        if rank == 0:
            rings[:, B, C] = np.maximum(rings[:, B, C], forward[other])
        found = []
        for walks in inner:
            edges = rings.copy()
            for at, (one, to) in enumerate(((A, B), (A, D), (C, B), (C, D))):
                edges[:, one, to] = np.maximum(edges[:, one, to], walks[at])
            closed, fine = _closed(edges)
            found.append(closed[fine][:, [A, A, C, C], [B, D, B, D]])
        best = _least(np.concatenate(found))
        if not len(best):
            return False
        if rank:
            down = np.array([forward[rank - 1], forward[rank - 1], input_grad[other + 1], input_grad[other + 1]])
            up = np.array([forward[other], input_grad[rank], forward[other], input_grad[rank]])
            inner = best + down + up + 2 * times.hop
    return True


def shortest(times: Times, limit: float, stash: float, upper: int, closer_than: float = 1e-4) -> int:
    """The shortest period, to a share of it, given one that is possible."""
    low = int(times.work().max())
    if possible(times, low, limit, stash):
        return low
    while upper - low > closer_than * low:
        middle = (low + upper) // 2
        low, upper = (low, middle) if possible(times, middle, limit, stash) else (middle, upper)
    return upper
