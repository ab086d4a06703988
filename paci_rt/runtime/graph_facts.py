"""What a stage has learnt of the graphs that its forwards make: how many bytes they keep, and that some checkpoint.

Micro-batches may differ: layers are dropped, branches depend on data, a module changes its mode. What decides about
gradients is therefore looked at in every forward. Only bytes, which take a walk over the graph, are remembered, by the
kind of the graph: shapes of the inputs, number of nodes, split layers used, and which outputs take part in autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paci_rt.runtime.trees import tensors

ALWAYS = 32
"""So many walks are made in any case; of more forwards one in ``ONE_IN``."""
ONE_IN = 64
MOST = 1024
"""Kinds of graphs that are remembered at the same time."""


@dataclass(slots=True)
class _Kind:
    saved_bytes: int
    seen: int = 1


class GraphFacts:
    """Remembers what graphs keep.

    A kind is measured at its 1st, 2nd, 4th, 8th, ... forward, since sizes may depend on data where nothing else does;
    what counts is the largest measurement. Where new kinds come too often for a walk each, they count as much as the
    largest of all kinds.

    Attributes:
        overlooked: there was such a kind.
    """

    def __init__(self) -> None:
        self.overlooked = False
        self._kinds: dict[Hashable, _Kind] = {}
        self._forwards = self._walks = self._largest = 0

    def saved_bytes(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], graph: Hashable, measure: Callable[[], int]
    ) -> int:
        """Bytes that the present forward keeps.

        Args:
            args, kwargs: that it was given.
            graph: what is known of its graph.
            measure: walks over it.
        """
        kind = signature(args, kwargs), graph
        self._forwards += 1
        known = self._kinds.get(kind)
        if known is not None:
            known.seen += 1
            if known.seen & (known.seen - 1):  # no power of two
                return known.saved_bytes
        if self._walks >= ALWAYS + self._forwards // ONE_IN:
            if known is not None:
                return known.saved_bytes
            self.overlooked = True
            return self._largest
        self._walks += 1
        size = measure()
        self._largest = max(self._largest, size)
        if known is None:
            if len(self._kinds) >= MOST:
                self._kinds.clear()
            self._kinds[kind] = _Kind(size)
            return size
        known.saved_bytes = max(known.saved_bytes, size)
        return known.saved_bytes


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shapes and dtypes of what a forward is given."""
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        (value,) = args
        return value.shape, value.dtype, value.requires_grad
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    return tuple(
        (tuple(value.shape), value.dtype, value.requires_grad)
        if isinstance(value, Tensor)
        else (type(value), *(signature((tensor,), {}) for tensor in tensors(value)))
        for value in values
    )
