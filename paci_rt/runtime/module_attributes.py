"""Plain attributes of modules that a forward binds anew, such as counters, and how a second run finds the first's.

Which ones a forward changes is seen in the first forward of every step. What changes inside an object that stays the
same, such as a list that grows, is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()
_TORCHS = frozenset(nn.Module().__dict__) | {"forward"}


class Attributes:
    """Of the modules of one stage; remembers which of them forwards change."""

    def __init__(self) -> None:
        self._changing: dict[tuple[int, str], nn.Module] = {}
        self._look = True

    def begin(self) -> None:
        """A step begins: look at its first forward."""
        self._look = True

    def take(self, modules: Sequence[nn.Module]) -> Snapshot:
        """What they are before a forward."""
        whole = [dict(module.__dict__) for module in modules] if self._look else None
        values = [(module, name, module.__dict__.get(name, _ABSENT)) for (_, name), module in self._changing.items()]
        return Snapshot(values, modules, whole)

    def after(self, taken: Snapshot) -> bool:
        """The forward is over; whether it has changed any that had not changed before.

        Args:
            taken: before it; completed.
        """
        if taken.whole is None:
            return False
        self._look, found = False, False
        for module, before in zip(taken.modules, taken.whole, strict=True):
            now = module.__dict__
            names = [name for name, value in now.items() if before.get(name, _ABSENT) is not value]
            names += [name for name in before if name not in now]
            for name in names:
                key = id(module), name
                if name not in _TORCHS and key not in self._changing:
                    self._changing[key] = module
                    taken.values.append((module, name, before.get(name, _ABSENT)))
                    found = True
        taken.whole = None
        return found


class Snapshot:
    """What attributes were before a forward.

    Attributes:
        values: modules, names, and values; ``modules``, ``whole``: all attributes, where the forward is looked at.
    """

    __slots__ = ("modules", "values", "whole")

    def __init__(
        self,
        values: list[tuple[nn.Module, str, Any]],
        modules: Sequence[nn.Module],
        whole: list[dict[str, Any]] | None,
    ) -> None:
        self.values, self.modules, self.whole = values, modules, whole

    @contextmanager
    def back(self) -> Iterator[None]:
        """Within it, the attributes are what they were; what is bound meanwhile is dropped."""
        now = [(module, name, module.__dict__.get(name, _ABSENT)) for module, name, _ in self.values]
        _put(self.values)
        try:
            yield
        finally:
            _put(now)


def _put(values: list[tuple[nn.Module, str, Any]]) -> None:
    for module, name, value in values:
        if value is _ABSENT:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value


__all__ = ["Attributes", "Snapshot"]
