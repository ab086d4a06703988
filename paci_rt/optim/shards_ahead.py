"""Look-ahead where replicas share out the optimizer's state (ZeRO-1).

A replica's weights ahead follow from its own gradients and from state that lies with all replicas. So each sends the
others their parts of its sums, gets back what their state makes of them, and ends with the bits that whole state would
have given it. Sums of the window before are those of all replicas already: there weights alone travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from paci_rt.errors import DisagreementError
from paci_rt.optim.fused_state import FusedState
from paci_rt.optim.shards import Shards
from paci_rt.transport.replicas import Range

Positions = Sequence[int] | None
"""Of parameters in a flat group; None is all of them."""


class Steps(Protocol):
    """What is asked of an optimizer, :class:`paci_rt.optim.fused.FusedOptimizer`."""

    def ahead(
        self,
        state: FusedState,
        grad_sum: Tensor,
        known: Sequence[bool],
        divisor: float,
        repeats: int,
        kept: Tensor | None,
        *,
        among: Positions = None,
        into: Tensor | None = None,
    ) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class AheadCall:
    """What weights ahead are made of; all replicas make theirs at the same place of the schedule.

    Attributes:
        sums: for each flat group its fp32 sums, and which parameters have one.
        kept: for each flat group its weights as they are, flat, in its dtype.
        divisor, repeats: as for :meth:`paci_rt.optim.fused.FusedOptimizer.ahead`.
        reduced: the own parts of the sums are those of all replicas.
        wanted: False where this replica stays at the present weights, and only helps the others.
        known: for each replica which parameters of all groups have a sum there; None where it wants no weights. The
            thread fills it in.
    """

    sums: list[tuple[Tensor, tuple[bool, ...]]]
    kept: Sequence[Tensor]
    divisor: float
    repeats: int
    reduced: bool
    wanted: bool
    known: list[list[bool] | None] = field(default_factory=list)


class ShardsAhead:
    """One stage's.

    Args:
        optimizer: the stage's.
        states: its state of the own part of each flat group.
        shards: the parts of all replicas.

    Attributes:
        nbytes: of scratch buffers, which have the sums and the weights of one part of another replica.
    """

    def __init__(self, optimizer: Steps, states: Sequence[FusedState], shards: Shards) -> None:
        self._optimizer, self._states, self._shards = optimizer, states, shards
        self._starts = [0]
        for state in states:
            self._starts.append(self._starts[-1] + len(state.group.params))
        sizes: dict[torch.dtype, int] = {}
        for group in shards.groups if shards.replicas.size > 1 else ():
            sizes[group.dtype] = max(sizes.get(group.dtype, 0), group.numel)
        self._grads = torch.zeros(max(sizes.values(), default=0))
        self._made = {dtype: torch.zeros(size, dtype=dtype) for dtype, size in sizes.items()}
        self.nbytes = self._grads.nbytes + sum(made.nbytes for made in self._made.values())

    def make(self, call: AheadCall, parts: Sequence[Positions], *, first: bool) -> None:
        """Put the weights of one bucket ahead; in the thread of the replicas.

        Args:
            parts: the bucket's positions in each flat group.
            first: it is the first bucket of this call.

        Raises:
            DisagreementError: the replicas look ahead by other numbers.
        """
        if first:
            self._tell(call)
        replicas = self._shards.replicas
        for number, among in enumerate(parts):
            ranges = self._shards.ranges(number, among)
            if not call.reduced:
                for to, source in replicas.rounds:
                    self._trade(call, number, among, ranges, to, source)
            if call.wanted:
                self._step_own(call, number, among)
            if call.reduced:
                replicas.share(self._shards.groups[number].whole.weight, ranges)

    def _tell(self, call: AheadCall) -> None:
        """Learn which gradients the others know, and make sure that all look as far ahead."""
        divisor = int(torch.tensor(call.divisor, dtype=torch.float64).view(torch.int64))
        flags = [flag for _, known in call.sums for flag in known]
        head = [divisor, call.repeats, int(call.reduced), int(call.wanted), *flags]
        told = self._shards.replicas.exchange(torch.tensor(head, dtype=torch.int64))
        if any(not torch.equal(one[:3], told[0][:3]) for one in told):
            raise DisagreementError(
                "the replicas disagree about how far a forward looks ahead: let all of them make the same calls of "
                "step() and drain(), and load the same state into their schedulers and scalers"
            )
        call.known.extend(one[4:].bool().tolist() if int(one[3]) else None for one in told)

    def _trade(
        self, call: AheadCall, number: int, among: Positions, ranges: list[list[Range]], to: int, source: int
    ) -> None:
        """Have replica ``to`` make its part of this one's weights ahead, and make the own part of ``source``'s."""
        replicas, shard = self._shards.replicas, self._shards.groups[number]
        weight, here, known = shard.whole.weight, ranges[replicas.rank], call.known[source]
        grads, made = self._grads[: shard.numel], self._made[shard.dtype][: shard.numel]
        own = [(start - shard.part[0], end - shard.part[0]) for start, end in here] if known is not None else []
        theirs = ranges[to] if call.wanted else []
        replicas.swap(_cut(call.sums[number][0], theirs), to, _cut(grads, own), source)
        if known is not None:
            for copy, true in zip(_cut(made, own), _cut(weight, here), strict=True):
                copy.copy_(true)
            flags = known[self._starts[number] : self._starts[number + 1]]
            state = self._states[number]
            # What the step would keep of fp32 weights nobody needs: it goes where the sums were.
            kept = grads if state.master is None else None
            self._optimizer.ahead(state, grads, flags, call.divisor, call.repeats, kept, among=among, into=made)
        replicas.swap(_cut(made, own), source, _cut(weight, theirs), to)

    def _step_own(self, call: AheadCall, number: int, among: Positions) -> None:
        state, shard = self._states[number], self._shards.groups[number]
        grad_sum, known = call.sums[number]
        kept = shard.of(call.kept[number]) if state.master is None else None
        self._optimizer.ahead(state, shard.of(grad_sum), known, call.divisor, call.repeats, kept, among=among)


def _cut(flat: Tensor, ranges: Sequence[Range]) -> Iterator[Tensor]:
    return (flat[start:end] for start, end in ranges)
