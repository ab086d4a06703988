"""A stage's sealed sums over all of its replicas: they travel while the front buffer fills, and the update waits.

Each replica adds up its share of a flat buffer, in the order of the replicas, counts squares and what is not finite in
it, and tells the others. So norms, and decisions by them, have the same bits everywhere too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from paci_rt.errors import DisagreementError
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.update_stream import Buckets
from paci_rt.optim.verdict import Sealed
from paci_rt.transport.replicas import Pending, Range, ReplicaGroup, shares


class Summed(Protocol):
    """What is asked of a stage's optimizer."""

    groups: list[FlatGroup]
    accumulators: list[GradAccumulator]
    learned: Buckets | None


@dataclass(kw_only=True)
class _Found:
    """What all replicas know of a window.

    Attributes:
        touched: for each flat group which parameters got a gradient on any replica.
        flagged: a replica raised a flag of its own.
        alike: all have learned the same parts in which updates can be waited for.
        squares: of the sum of each parameter, by flat group; nonfinite: infinite and NaN elements of each.
    """

    touched: list[tuple[bool, ...]]
    flagged: bool
    alike: bool
    squares: list[Tensor]
    nonfinite: list[Tensor]


class ReplicaSums:
    """One stage's.

    Args:
        optimizer: of the stage on this replica.
        group: all of them.
        stage: its index.
        sharded: leave to each replica its own part of the sums alone.

    Attributes:
        parts: for each flat group the part that each replica adds up.
        flagged: in the last window some replica's :meth:`begin` was given a flag.
        buckets: parts in which its update can be waited for on all replicas; None where they know no common ones, as
            where each asks other experts.
        reduce_s, waited_s: seconds that sums took, and seconds of them that the stage waited.
    """

    def __init__(self, optimizer: Summed, group: ReplicaGroup, *, stage: int, sharded: bool) -> None:
        self.group, self.sharded = group, sharded
        self._optimizer, self._stage = optimizer, stage
        self.parts = [shares(one.numel, group.size) for one in optimizer.groups]
        self._layout = _layout_digest(optimizer.groups)
        self._pending: Pending[_Found] | None = None
        self._found: _Found | None = None
        self.flagged = False
        self.buckets: Buckets | None = None
        self.reduce_s = self.waited_s = 0.0

    @property
    def begun(self) -> bool:
        """Whether a window is sealed whose update has not come."""
        return self._pending is not None or self._found is not None

    def begin(self, window: int, *, flag: bool = False, scale: float = 1.0) -> None:
        """All gradients of ``window`` are in: seal it, and let its sums travel.

        Args:
            flag: something that all replicas are to know.
            scale: of the losses, which must be that of all replicas.
        """
        own: list[Tensor] = []
        for accumulator in self._optimizer.accumulators:
            touched = accumulator.sums()[1]
            filling = accumulator.state == "filling"
            own.append(torch.tensor([filling and one for one in touched], dtype=torch.uint8))
            if not filling:  # others may have a gradient
                accumulator.front(0)[0].zero_()
            accumulator.seal()
        for group in self._optimizer.groups:
            group.check_views()
        flats = [accumulator.finished_flat() for accumulator in self._optimizer.accumulators]
        action = f"{self._stage}U{window}"
        self.buckets = self._optimizer.learned
        parts = 0 if self.buckets is None else self.buckets.digest
        scale_bits = int(torch.tensor(scale, dtype=torch.float64).view(torch.int64))
        head = torch.tensor([self._layout, window, scale_bits, int(flag), parts], dtype=torch.int64)
        self._pending = self.group.submit(action, lambda: self._travel(head, own, flats))

    def finish(self) -> Sealed:
        """The sums over all replicas, once they are there.

        Raises:
            TransferTimeoutError, PeerLostError: a replica did not come in time, or is gone.
            DisagreementError: the replicas have other parameters, or are at other windows.
        """
        assert self._pending is not None, "an update came before its window was sealed"
        begin = perf_counter()
        pending, self._pending = self._pending, None
        found = pending.wait()
        self.waited_s += perf_counter() - begin
        self.reduce_s += pending.seconds
        self._found, self.flagged = found, found.flagged
        if not found.alike:
            self.buckets = None
        live = []
        for number, (accumulator, touched) in enumerate(zip(self._optimizer.accumulators, found.touched, strict=True)):
            accumulator.agreed = touched
            if any(touched):
                live.append(number)
            else:
                accumulator.consume()
                accumulator.release()
        squares = math.fsum(float(one) for number in live for one in found.squares[number].tolist())
        wrong = sum(int(found.nonfinite[number].sum()) for number in live)
        return Sealed(live, math.nan if wrong else squares, wrong)

    def forget(self) -> None:
        """The update has been made, or dropped."""
        self._found = None

    def norms(self, order: dict[str, int]) -> Tensor:
        """2-norms [n], fp32, of the sums of a window's parameters, in the order of the module's."""
        found = [(order.get(name, len(order)), float(square)) for name, square, _ in self._measured()]
        return torch.tensor([square**0.5 for _, square in sorted(found, key=lambda pair: pair[0])])

    def first_nonfinite(self, order: Sequence[str]) -> tuple[str, int]:
        """The first parameter in ``order`` whose sum is not finite, and how many elements of all are not."""
        wrong = {name: count for name, _, count in self._measured() if count}
        return next((name for name in order if name in wrong), next(iter(wrong), "")), sum(wrong.values())

    def _measured(self) -> list[tuple[str, float, int]]:
        assert self._found is not None
        return [
            (group.names[position], float(squares[position]), int(wrong[position]))
            for group, squares, wrong, touched in zip(
                self._optimizer.groups, self._found.squares, self._found.nonfinite, self._found.touched, strict=True
            )
            for position in range(len(group.names))
            if touched[position]
        ]

    # --- in the thread ---

    def _travel(self, head: Tensor, own: list[Tensor], flats: list[Tensor]) -> _Found:
        heads = self.group.exchange(head)
        self._check(heads)
        touched = [torch.stack(self.group.exchange(one)).amax(0) for one in own]
        measured: list[Tensor] = []
        for group, flat, parts in zip(self._optimizer.groups, flats, self.parts, strict=True):
            self.group.sum_up(flat, parts, whole=not self.sharded)
            measured.append(self._measure(group, flat, parts[self.group.rank]))
        told = [self.group.exchange(one) for one in measured]
        # In the order of the replicas, so that all have the same bits.
        totals = [sum(one[1:], one[0].clone()) for one in told]
        return _Found(
            touched=[tuple(bool(flag) for flag in one.tolist()) for one in touched],
            flagged=any(int(one[3]) for one in heads),
            alike=len({int(one[4]) for one in heads}) == 1,
            squares=[one[0] for one in totals],
            nonfinite=[one[1] for one in totals],
        )

    def _check(self, heads: Sequence[Tensor]) -> None:
        for at, what in enumerate(("parameters that are trained", "a window", "the loss scale")):
            values = [int(head[at]) for head in heads]
            if len(set(values)) == 1:
                continue
            said = ""
            if at == 1:
                said = ": " + ", ".join(f"replica {number} at {value}" for number, value in enumerate(values))
            raise DisagreementError(
                f"the replicas of stage {self._stage} disagree about {what}{said}: let all replicas make the same "
                "calls of step() and drain(), freeze, replace or convert parameters on all of them alike, and load the "
                "same state into their scalers"
            )

    def _measure(self, group: FlatGroup, flat: Tensor, part: Range) -> Tensor:
        """Squares and elements that are not finite of each parameter's piece in the own part, fp64 [2, parameters]."""
        found = torch.zeros(2, len(group.names), dtype=torch.float64)
        for position, (start, end) in enumerate(pieces(group, part)):
            if start == end:
                continue
            piece = flat[start:end]
            if piece.is_complex():
                piece = torch.view_as_real(piece)
            norm = float(torch.linalg.vector_norm(piece, dtype=torch.float64))
            found[0, position] = norm * norm
            if not math.isfinite(norm):
                found[1, position] = int((~piece.isfinite()).sum())
        return found


def pieces(group: FlatGroup, part: Range) -> list[Range]:
    """Where the parameters of a flat group lie in a part of its buffers: starts and ends in the whole buffer."""
    found = []
    for offset, numel in zip(group.offsets, group.numels, strict=True):
        start, end = max(part[0], offset), min(part[1], offset + numel)
        found.append((start, end) if start < end else (part[0], part[0]))
    return found


def _layout_digest(groups: Sequence[FlatGroup]) -> int:
    """A number that replicas with the same parameters, in the same order, have in common."""
    text = [(one.names, [tuple(param.shape) for param in one.params], str(one.dtype), one.numel) for one in groups]
    return int.from_bytes(hashlib.sha256(repr(text).encode()).digest()[:7], "little")
