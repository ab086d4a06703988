"""How many bytes a forward leaves behind for its backward, read off autograd's graph without touching it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

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
    for piece in pieces:
        if not has_storage(piece):
            continue
        at = piece.untyped_storage().data_ptr()
        shares[at] = shares.get(at, 0) + piece.nbytes
    return shares


def _only_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors with a storage, which a wrapper such as a quantised weight has not."""
    return (value for value in values if has_storage(value))


def has_storage(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with memory of its own."""
    return isinstance(value, Tensor) and type(value).__torch_dispatch__ is _PLAIN


def _saved_tensors(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    for node in graph_nodes(outputs):
        for saved in _saved_by(node):
            yield from _held(saved)


def graph_nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs of ``outputs``."""
    pending: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


def checkpoints(outputs: Iterable[Tensor]) -> bool:
    """Whether a part of the graphs of ``outputs`` will be computed again in the backward (activation checkpointing)."""
    for node in graph_nodes(outputs):
        if "checkpoint" in type(node).__name__.lower():
            return True
        for saved in _saved_by(node):
            hook = getattr(saved, "unpack_hook", None)
            if getattr(hook, "__module__", None) == "torch.utils.checkpoint":
                return True
    return False


@lru_cache(maxsize=4096)
def _names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _saved_by(node: Any) -> Iterator[Any]:
    """What a node has saved, as it lies there: looking at it runs no hook, so nothing is computed or fetched."""
    for name in _names(type(node)):  # type: ignore[arg-type]
        value = getattr(node, name)
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _held(saved: Any) -> Iterator[Tensor]:
    """The tensors that a saved value keeps alive; with hooks, those among what the hook made of it."""
    try:
        value = saved.data
    except (RuntimeError, AttributeError):
        return  # nothing was saved
    if isinstance(value, (tuple, list)):
        yield from _only_tensors(value)
    elif isinstance(value, Tensor):
        yield value
