"""Other ways to look ahead than paci_rt's own, to be measured beside it.

Each is a subclass that stands in for :class:`paci_rt.lookahead.LookAhead` while a pipeline is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch import Tensor

from paci_rt.lookahead import LookAhead
from paci_rt.versions import AheadWeights


class _Every(LookAhead):
    """Makes the weights ahead anew for every ``k``-th forward, and after each update; other forwards reuse them."""

    k: int

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._made: list[Tensor] = []
        self._uses, self._updates = 0, 0

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        if self._made and updates == self._updates and micro_batches and self._uses % self.k:
            groups = self._bound.groups
            true = [group.weight.clone() for group in groups]
            for group, made in zip(groups, self._made, strict=True):
                group.weight.copy_(made)
            yield
            for group, weight in zip(groups, true, strict=True):
                group.weight.copy_(weight)
            self._uses += 1
            return
        with super().ahead(updates, micro_batches):
            self._made = [group.weight.clone() for group in self._bound.groups]
            self._uses, self._updates = 1, updates
            yield


class EverySecond(_Every):
    """Half of the passes."""

    k = 2


class EveryFourth(_Every):
    """A quarter of the passes."""

    k = 4


class _OwnSums(LookAhead):
    """Puts other sums in place of the accumulators' for the time of a look-ahead."""

    def sums(self, flat: Tensor, known: tuple[bool, ...], number: int, micro_batches: int) -> Tensor:
        """What stands in for ``flat``, the sums of flat group ``number`` over ``micro_batches`` of the window."""
        raise NotImplementedError

    def _replaced(self, number: int, micro_batches: int, before: bool) -> tuple[Tensor, tuple[bool, ...]]:
        flat, known = type(self._bound.accumulators[number]).sums(self._bound.accumulators[number], before=before)
        return (flat if before else self.sums(flat, known, number, micro_batches)), known

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        accumulators = self._bound.accumulators
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
    """Leaves out the gradient of the last backward, so that the pass could run beside it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._older: list[tuple[int, Tensor]] = []

    def backward_begins(self, micro_batches: int) -> None:
        """``micro_batches`` of the window are in the sums, and one more is about to be."""
        before = micro_batches == 0
        sums = [accumulator.sums(before=before)[0] for accumulator in self._bound.accumulators]
        self._older = [(micro_batches or self._accumulation, flat.clone()) for flat in sums]

    def sums(self, flat: Tensor, known: tuple[bool, ...], number: int, micro_batches: int) -> Tensor:
        count, older = self._older[number]
        return older * (micro_batches / count)


class _OneOlderWeights(AheadWeights):
    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        if isinstance(self._look_ahead, OneOlder):
            self._look_ahead.backward_begins(self._micro_batches)
        return super().for_backward(at_forward, current)


class Blended(_OwnSums):
    """Takes the mean of past gradients for those of the window that are still missing."""

    def sums(self, flat: Tensor, known: tuple[bool, ...], number: int, micro_batches: int) -> Tensor:
        group, state = self._bound.groups[number], self._bound._states[number]
        blended, missing = flat.clone(), self._accumulation - micro_batches
        for position, steps in enumerate(self._bound.optimizer.updates_of(state)):
            if known[position] and steps:
                beta1 = float(state.param_group["betas"][0])
                mean = group.view(state.flat["exp_avg"], position) / (1 - beta1**steps)
                view = group.view(blended, position)
                view.add_(mean, alpha=missing * self._share).mul_(micro_batches / self._accumulation)
        return blended


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
        true = [group.weight.clone() for group in self._bound.groups]
        with super().ahead(updates, micro_batches), torch.no_grad():
            for group, weight in zip(self._bound.groups, true, strict=True):
                group.weight.copy_(weight + self.SHARE ** (updates - 1) * (group.weight - weight))
            yield


VARIANTS: dict[str, type[LookAhead]] = {
    "every 2nd": EverySecond,
    "every 4th": EveryFourth,
    "one older": OneOlder,
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
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r} of look-ahead: choose from {', '.join(VARIANTS)}")
    with (
        mock.patch("paci_rt.versions.LookAhead", VARIANTS[name]),
        mock.patch("paci_rt.versions.AheadWeights", _OneOlderWeights),
    ):
        yield
