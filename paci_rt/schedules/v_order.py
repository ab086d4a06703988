"""An order that repeats for ever, of stages in a V: what every rank does in a round, and what it holds.

Rank ``r`` of ``P`` holds pieces ``r`` and ``2P-1-r``. In a round it runs F, I and W of each of them once, starting with
F of piece ``r``. Round ``t`` runs that for micro-batch ``t``, and every other action for an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from paci_rt.schedules.cycle_time import Waits
from paci_rt.schedules.modulo import GAPS, ORDERS, A, B, C, D, Times, Timetables


class Entry(NamedTuple):
    """One action of a round.

    Attributes:
        op: ``F``, ``I`` or ``W``.
        piece: stage.
        behind: in round ``t`` it works on micro-batch ``t - behind``.
    """

    op: str
    piece: int
    behind: int


@dataclass(frozen=True)
class VOrder:
    """The round of every rank.

    Attributes:
        rounds: entries by rank, in the order in which they run.

    Example:
        One rank with both pieces; the second micro-batch starts when the first is done:

        >>> from paci_rt.schedules.v_order import Entry, VOrder
        >>> letters = ("F", 0), ("F", 1), ("I", 1), ("W", 1), ("I", 0), ("W", 0)
        >>> order = VOrder((tuple(Entry(op, piece, 0) for op, piece in letters),))
        >>> order.in_flight(0), order.early(0), order.text(0)
        (2, 0, '0F 1F 1I 1W 0I 0W')
    """

    rounds: tuple[tuple[Entry, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.rounds)

    def text(self, rank: int) -> str:
        """The round of ``rank`` for people: ``7I-5`` is I of stage 7 for the micro-batch five before the round's."""
        return " ".join(f"{piece}{op}" + (f"-{behind}" if behind else "") for op, piece, behind in self.rounds[rank])

    @cached_property
    def _behind(self) -> dict[tuple[str, int], int]:
        return {(op, piece): behind for entries in self.rounds for op, piece, behind in entries}

    def _held(self, rank: int, forward: float, stash: float) -> float:
        """The most that ``rank`` holds after any action: so much per piece between F and I, and between I and W."""
        behind, pieces = self._behind, {entry.piece for entry in self.rounds[rank]}
        held = sum(forward * (behind["I", one] - behind["F", one]) for one in pieces)
        held += sum(stash * (behind["W", one] - behind["I", one]) for one in pieces)
        most = held
        for entry in self.rounds[rank]:
            held += {"F": forward, "I": stash - forward, "W": -stash}[entry.op]
            most = max(most, held)
        return most

    def in_flight(self, rank: int) -> int:
        """Most pieces of micro-batches between their F and their I on ``rank``."""
        return int(self._held(rank, 1, 0))

    def held(self, rank: int, stash: float) -> float:
        """The same, with ``stash`` for each between its I and its W."""
        return self._held(rank, 1.0, stash)

    def peak(self) -> int:
        """:meth:`in_flight` of the fullest rank."""
        return max(map(self.in_flight, range(self.ranks)))

    def early(self, piece: int) -> int:
        """How many W of ``piece`` come between an F and the W of the same micro-batch: so many gradients enter its sum
        meanwhile, and ``ceil(early / a)`` updates come between an F and the update that its gradient enters."""
        rank = min(piece, 2 * self.ranks - 1 - piece)
        places = [(op, one) for op, one, _ in self.rounds[rank]]
        later = places.index(("W", piece)) > places.index(("F", piece))
        behind = self._behind
        return behind["W", piece] - behind["F", piece] - (0 if later else 1)

    def ties(self) -> bool:
        """Whether the last stage is done with a micro-batch before the first is, on the rank that has both: then the
        gradient of a weight tied between them is complete when the first stage updates it."""
        at = {op + str(piece): number for number, (op, piece, _) in enumerate(self.rounds[0])}
        first, last = (("W", piece) for piece in (0, 2 * self.ranks - 1))
        return (self._behind[last], at[f"W{last[1]}"]) < (self._behind[first], at["W0"])

    def most_behind(self, rank: int) -> int:
        """Rounds after which the last action of a micro-batch has run."""
        return max(entry.behind for entry in self.rounds[rank])

    def waits(self, times: Times, capacity: int | None = None) -> Waits:
        """Who waits for whom; nodes are the entries of rank 0, then of rank 1, and so on.

        Args:
            times: of the pieces.
            capacity: messages that fit into a channel before a send waits; None where it never does.
        """
        found = list(self._waits(times, capacity))
        return Waits(*np.array(found, dtype=np.int64).T)

    def _waits(self, times: Times, capacity: int | None) -> Iterator[tuple[int, int, int, int]]:
        ticks = {"F": times.forward.tolist(), "I": times.input_grad.tolist(), "W": times.weight_grad.tolist()}
        node: dict[tuple[str, int], int] = {}
        for entries in self.rounds:
            first = len(node)
            for op, piece, _ in entries:
                node[op, piece] = len(node)
            for at, (op, piece, _) in enumerate(entries):
                wraps = at + 1 == len(entries)
                yield first + at, first if wraps else first + at + 1, ticks[op][piece], int(wraps)
        pieces, behind = 2 * self.ranks, self._behind
        chain = [(("F", one), ("F", one + 1)) for one in range(pieces - 1)]
        chain += [(("I", one), ("I", one - 1)) for one in range(pieces - 1, 0, -1)]
        chain += [(("F", one), ("I", one)) for one in range(pieces)] + [
            (("I", one), ("W", one)) for one in range(pieces)
        ]
        for sender, receiver in chain:
            op, piece = sender
            far = sender[1] != receiver[1] and piece + receiver[1] != pieces - 1
            rounds = behind[receiver] - behind[sender]
            yield node[sender], node[receiver], ticks[op][piece] + (times.hop if far else 0), rounds
            if far and capacity is not None:  # the send, right after its action, needs the message so many before gone
                yield node[receiver], node[sender], -ticks[op][piece], capacity - rounds


def one_after_another(ranks: int) -> VOrder:
    """The order that holds the least: a rank begins a micro-batch when it is done with the one before."""
    letters = ("F", False), ("F", True), ("I", True), ("W", True), ("I", False), ("W", False)
    pieces = [{False: rank, True: 2 * ranks - 1 - rank} for rank in range(ranks)]
    return VOrder(tuple(tuple(Entry(op, both[later], 0) for op, later in letters) for both in pieces))


def order_of(found: Timetables, row: int, period: int) -> VOrder:
    """The order that a timetable follows."""
    ranks, behind = found.order.shape[1], found.behind(period)[row].tolist()
    rounds = []
    for rank in range(ranks):
        number, other = found.order[row, rank], 2 * ranks - 1 - rank
        names = {A: ("F", rank), B: ("F", other), C: ("I", other), D: ("I", rank)}
        place = {letter: at for at, letter in enumerate(ORDERS[number].tolist())}
        entries: list[Entry] = []
        for letter, at in place.items():
            entries.append(Entry(*names[letter], behind[rank][letter]))
            late = [
                Entry("W", names[half][1], behind[rank][half] + (place[half] > at))
                for half, gap in ((D, GAPS[number, 0]), (C, GAPS[number, 1]))
                if gap == at
            ]
            entries += sorted(late, key=lambda entry: (-entry.behind, -entry.piece))
        rounds.append(tuple(entries))
    return VOrder(tuple(rounds))
