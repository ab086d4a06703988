"""How many bytes a forward leaves behind for its backward, read off autograd's graph without touching it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

_PLAIN = torch._C._disabled_torch_dispatch_impl


def saved_bytes(
    outputs: Iterable[Tensor],
    also: Iterable[Tensor],
    parameters: Iterable[Tensor],
    shares: Mapping[int, int] = MappingProxyType({}),
) -> int:
    """Bytes of the distinct storages that the graphs of ``outputs`` have saved, and of the tensors in ``also``.

    Storages of ``parameters`` do not count, and of those in ``shares`` no more than their share. Looking at the graph,
    rather than hooking into what is saved, leaves autograd's check for tensors modified in place as it is.
    """
    return distinct_bytes((*also, *_saved_tensors(outputs)), ignoring=parameters, shares=shares)


def distinct_bytes(
    values: Iterable[Any], *, ignoring: Iterable[Tensor] = (), shares: Mapping[int, int] = MappingProxyType({})
) -> int:
    """Bytes of the distinct storages of the tensors among ``values``, without those of the tensors in ``ignoring``.

    Args:
        shares: the most that counts of some storages, see :func:`shares_of`.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in _only_tensors(ignoring)}
    storages: dict[int, int] = {}
    for value in _only_tensors(values):
        storage = value.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = min(shares.get(storage.data_ptr(), storage.nbytes()), storage.nbytes())
    return sum(storages.values())


def shares_of(pieces: Iterable[Any]) -> dict[int, int]:
    """Bytes of the tensors among ``pieces``, by storage: they are views of a batch of which others have views too."""
    shares: dict[int, int] = {}
    for piece in _only_tensors(pieces):
        at = piece.untyped_storage().data_ptr()
        shares[at] = shares.get(at, 0) + piece.nbytes
    return shares


def _only_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors with a storage, which a wrapper such as a quantised weight has not."""
    return (value for value in values if isinstance(value, Tensor) and type(value).__torch_dispatch__ is _PLAIN)


def _saved_tensors(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    pending: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                yield from _tensors(node, name)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


def _tensors(node: Any, name: str) -> list[Tensor]:
    try:
        value = getattr(node, name)
    except (RuntimeError, AttributeError):
        return []  # modified in place since: the backward will say so
    values = value if isinstance(value, (tuple, list)) else (value,)
    return list(_only_tensors(values))
