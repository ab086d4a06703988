"""Other ways to look ahead than paci_rt's own, to be measured beside it.

Each of ``VARIANTS`` is a subclass that stands in for :class:`paci_rt.weights.lookahead.LookAhead` while a pipeline is
built; ``SHARED`` is paci_rt's own, which makes weights ahead less often.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.weights.lookahead import AheadWeights, LookAhead

Known = tuple[bool, ...]


def shares_pass(accumulation: int, early: int) -> bool:
    """Whether a stage's first early forward knows at most 3/8 of a window of ``accumulation`` gradients, but at least
    one of them, where ``early`` forwards run ahead of its backwards."""
    known = accumulation - early
    return known >= 1 and 8 * known <= 3 * accumulation


class _SharingWeights(AheadWeights):
    """Weights ahead serve until four times as many gradients are known, where the first of a window knows few: what
    paci_rt did before."""

    @staticmethod
    def shares(accumulation: int, early: int, overlap: int) -> bool:
        return overlap > 0 or shares_pass(accumulation, early)


class _Told(LookAhead):
    """Is told of each backward before it begins, of which paci_rt's own need not know."""

    def backward_begins(self, micro_batches: int) -> None:
        """``micro_batches`` of the window are in the sums, and one more is about to be."""


class _TellingWeights(AheadWeights):
    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        if isinstance(self._look_ahead, _Told):
            self._look_ahead.backward_begins(self._micro_batches)
        return super().for_backward(at_forward, current)


class _Every(LookAhead):
    """Makes new weights ahead for every ``k``-th forward, after each update, and where more updates or fewer are
    to come than the last time; other forwards reuse them."""

    k: int

    def __init__(self, bound: StageOptimizer, **options: Any) -> None:
        super().__init__(bound, **options)
        self._made: list[Tensor] = []
        self._uses, self._updates = 0, 0

    def window_ends(self) -> None:
        self._made = []
        super().window_ends()

    def restart(self) -> None:
        self._made = []
        super().restart()

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        if self._made and updates == self._updates and self._uses % self.k:
            with self._reused():
                yield
            return
        with super().ahead(updates, micro_batches):
            self._made = [group.weight.clone() for group in self._optimizer.groups]
            self._uses, self._updates = 1, updates
            yield

    @contextmanager
    def _reused(self) -> Iterator[None]:
        start = time.perf_counter()
        weights = [group.weight for group in self._optimizer.groups]
        true = [weight.clone() for weight in weights]
        for weight, made in zip(weights, self._made, strict=True):
            weight.copy_(made)
        self.seconds += time.perf_counter() - start
        try:
            yield
        finally:
            start = time.perf_counter()
            for weight, old in zip(weights, true, strict=True):
                weight.copy_(old)
            self._uses += 1
            self.forwards += 1
            self.seconds += time.perf_counter() - start


class EverySecond(_Every):
    """Half of the passes."""

    k = 2


class EveryFourth(_Every):
    """A quarter of the passes."""

    k = 4


class Once(_Every):
    """One pass per window: all early forwards run at the weights that the first of them made."""

    k = 2**62


class _OwnSums(_Told, ABC):
    """Puts other sums in place of the accumulators' for the time of a look-ahead.

    While the window has no gradient, the window before stands in for it, as in paci_rt itself.
    """

    @abstractmethod
    def sums(self, flat: Tensor, known: Known, number: int, micro_batches: int) -> tuple[Tensor, Known]:
        """What stands in for ``flat`` and ``known``, the sums of flat group ``number`` over ``micro_batches`` of the
        window, at least one, and which parameters have one."""

    def _replaced(self, number: int, micro_batches: int, before: bool) -> tuple[Tensor, Known]:
        accumulator = self._optimizer.accumulators[number]
        flat, known = type(accumulator).sums(accumulator, before=before)
        return (flat, known) if before else self.sums(flat, known, number, micro_batches)

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        accumulators = self._optimizer.accumulators
        for number, accumulator in enumerate(accumulators):
            accumulator.sums = (  # type: ignore[method-assign]
                lambda *, before=False, number=number: self._replaced(number, micro_batches, before)
            )
        try:
            with super().ahead(updates, micro_batches):
                yield
        finally:
            for accumulator in accumulators:
                del accumulator.sums


class OneOlder(_OwnSums):
    """Leaves out the gradient of the last backward, so that the pass could run beside it.

    Right after an update, which had to wait for that gradient, there is nothing to leave out.
    """

    def __init__(self, bound: StageOptimizer, **options: Any) -> None:
        super().__init__(bound, **options)
        self._older: list[tuple[int, Tensor, Known]] = []

    def backward_begins(self, micro_batches: int) -> None:
        self._older = []
        for accumulator in self._optimizer.accumulators:
            flat, known = accumulator.sums(before=micro_batches == 0)
            self._older.append((micro_batches or self._accumulation, flat.clone(), known))

    def sums(self, flat: Tensor, known: Known, number: int, micro_batches: int) -> tuple[Tensor, Known]:
        count, older, older_known = self._older[number]
        return older * (micro_batches / count), older_known


class HalfNewest(_OwnSums):
    """Takes half of the newest gradient and half of the mean of those known: the noise of early forwards, one beside
    the other, nearly cancels. It needs the sums before the last backward, which paci_rt does not keep."""

    def __init__(self, bound: StageOptimizer, **options: Any) -> None:
        super().__init__(bound, **options)
        self._older: list[Tensor] = []

    def backward_begins(self, micro_batches: int) -> None:
        self._older = []
        for group, accumulator in zip(self._optimizer.groups, self._optimizer.accumulators, strict=True):
            flat, known = accumulator.sums()
            self._older.append(flat.clone())
            for position, has_sum in enumerate(known):
                if not has_sum:  # other parts hold anything
                    group.view(self._older[-1], position).zero_()

    def sums(self, flat: Tensor, known: Known, number: int, micro_batches: int) -> tuple[Tensor, Known]:
        if micro_batches == 1:
            return flat, known
        return 0.5 * flat + 0.5 * micro_batches * (flat - self._older[number]), known


class Blended(_OwnSums):
    """Takes the mean of past gradients, as AdamW's first moment has it, for those of the window that are missing."""

    def sums(self, flat: Tensor, known: Known, number: int, micro_batches: int) -> tuple[Tensor, Known]:
        group, state = self._optimizer.groups[number], self._optimizer._states[number]
        blended, missing = flat.clone(), self._accumulation - micro_batches
        for position, steps in enumerate(state.updates()):
            if known[position] and steps:
                beta1 = float(state.param_group["betas"][0])
                mean = group.view(state.flat["exp_avg"], position) / (1 - beta1**steps)
                view = group.view(blended, position)
                view.add_(mean, alpha=missing * self._share).mul_(micro_batches / self._accumulation)
        return blended, known


class MomentumFirst(LookAhead):
    """As long as the window has no gradient, momentum alone has to do, and not the window before."""

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        if micro_batches == 0:
            self.restart()
        with super().ahead(updates, micro_batches):
            yield


class Damped(LookAhead):
    """Goes only a part of the way where several updates come before the backward: 0.7 to the power of those beyond
    the first."""

    SHARE = 0.7

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        true = [group.weight.clone() for group in self._optimizer.groups]
        with super().ahead(updates, micro_batches):
            for group, weight in zip(self._optimizer.groups, true, strict=True):
                group.weight.copy_(weight.lerp(group.weight, self.SHARE ** (updates - 1)))
            yield


SHARED = "shared"
VARIANTS: dict[str, type[LookAhead]] = {
    "every 2nd": EverySecond,
    "every 4th": EveryFourth,
    "once": Once,
    "one older": OneOlder,
    "half newest": HalfNewest,
    "blended": Blended,
    "momentum first": MomentumFirst,
    "damped": Damped,
}


@contextmanager
def replaced(name: str) -> Iterator[None]:
    """Within it, pipelines that are built look ahead in the way called ``name``.

    Raises:
        ValueError: no variant has that name.
    """
    if name == SHARED:
        with mock.patch("paci_rt.runtime.assemble.AheadWeights", _SharingWeights):
            yield
        return
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r} of look-ahead: choose from {', '.join((SHARED, *VARIANTS))}")
    with (
        mock.patch("paci_rt.weights.lookahead.LookAhead", VARIANTS[name]),
        mock.patch("paci_rt.runtime.assemble.AheadWeights", _TellingWeights),
    ):
        yield
