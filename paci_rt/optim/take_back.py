"""Updates that may have to be taken back: what weights and optimizer state were before them.

A stage that updates on its own may learn later that the window does not count. Taking it back is exact: the state from
before is copied back, and updates made since are made again from their sums, with the options that they had.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from paci_rt.optim.accumulator import Window


class Restorable(Protocol):
    """What is asked of a stage's optimizer."""

    optimizer: torch.optim.Optimizer | None

    def snapshot(self, memory: Any = None) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...
    def apply(self, windows: dict[int, Window], divisor: float) -> None: ...


@dataclass(kw_only=True)
class _Update:
    """One that may be taken back.

    Attributes:
        before: weights and state that it began with.
        sums: what it took, by flat group; None while nothing older may be taken back.
        options: of the optimizer's groups at that time.
    """

    window: int
    before: Any
    sums: dict[int, Window] | None
    divisor: float
    options: list[dict[str, Any]]


class UpdateHistory:
    """The updates of a stage that may still be taken back, oldest first.

    Args:
        optimizer: the stage's.
    """

    def __init__(self, optimizer: Restorable) -> None:
        self._optimizer = optimizer
        self._kept: list[_Update] = []
        self._free: list[Any] = []  # memory of snapshots
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def windows(self) -> list[int]:
        """Windows whose updates may still be taken back."""
        return [one.window for one in self._kept]

    def keep(self, window: int, sums: Mapping[int, Window], divisor: float) -> None:
        """The update of ``window`` is about to be made, of ``sums / divisor``."""
        before = self._optimizer.snapshot(self._free.pop() if self._free else None)
        copies = None
        if self._kept:
            copies = {number: Window(one.sums.clone(), one.positions) for number, one in sums.items()}
        optimizer = self._optimizer.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self._kept.append(_Update(window=window, before=before, sums=copies, divisor=divisor, options=options))
        self._measure()

    def settle(self, windows: int) -> None:
        """Updates of the first ``windows`` windows will stay."""
        while self._kept and self._kept[0].window < windows:
            self._free.append(self._kept.pop(0).before)

    def take_back(self, bad: Collection[int]) -> int:
        """Take back those of the windows ``bad`` that may be; the number of them."""
        first = next((at for at, one in enumerate(self._kept) if one.window in bad), None)
        if first is None:
            return 0
        again, self._kept = self._kept[first:], self._kept[:first]
        self._optimizer.restore(again[0].before)
        count = 0
        for one in again:
            self._free.append(one.before)
            if one.window in bad:
                count += 1
                continue
            assert one.sums is not None
            self._again(one)
        return count

    def clear(self) -> None:
        """All updates will stay, or weights and state were replaced."""
        self.settle(2**62)

    def _again(self, one: _Update) -> None:
        assert one.sums is not None
        optimizer = self._optimizer.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        now = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        before = self._optimizer.snapshot(self._free.pop())
        sums = {number: Window(window.sums.clone(), window.positions) for number, window in one.sums.items()}
        for group, options in zip(groups, one.options, strict=True):
            group.update(options)
        try:
            self._optimizer.apply(sums, one.divisor)
        finally:
            for group, options in zip(groups, now, strict=True):
                group.update(options)
        self._kept.append(
            _Update(window=one.window, before=before, sums=one.sums, divisor=one.divisor, options=one.options)
        )

    def _measure(self) -> None:
        held = [one.before for one in self._kept] + self._free
        sums = [window.sums for one in self._kept if one.sums is not None for window in one.sums.values()]
        self.nbytes = max(self.nbytes, sum(tensor.nbytes for tensor in tensors_in([*held, sums])))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []
