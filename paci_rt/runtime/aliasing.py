"""Whose memory is whose: what a stage hands on must not change when its weights do, or when the caller writes."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from paci_rt.runtime.activation_bytes import has_storage
from paci_rt.runtime.modes import modules_of
from paci_rt.transport.payload import plain


class OwnMemory:
    """The memory of everything that a module keeps: parameters, buffers, and tensors that are plain attributes.

    A stage may return such a tensor, or a view of it. Within one process the next stage would then see every later
    change, and between processes it would not: what is handed on is a copy.

    Args:
        module: the stage's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._first = next(module.parameters(), None)
        self._at: int | None = None  # where that was when the storages below were looked up
        self._registered: frozenset[int] | None = None
        self._attributes: frozenset[int] | None = None

    def look_again(self, module: nn.Module) -> None:
        """A new step: the stage may have another module now, or the module keep other tensors."""
        self._module, self._first = module, next(module.parameters(), None)
        self._registered = self._attributes = None

    def apart(self, tensor: Tensor, given: Container[int] = (), received: Iterable[Tensor] = ()) -> Tensor:
        """A detached tensor of memory that is nobody else's: a copy where it is the module's.

        Args:
            tensor: what a forward returned.
            given: storages that belong to the caller; a tensor there is copied too.
            received: so are those in the memory of one of these.
        """
        detached = tensor.detach()
        if (
            tensor.layout is not torch.strided
            or tensor.is_meta
            or (type(tensor) is not Tensor and not has_storage(tensor))
        ):
            return detached
        at = tensor.untyped_storage().data_ptr()
        if at in given or self._has(at, tensor.grad_fn is None):
            return detached.clone()
        for other in received:
            if other.untyped_storage().data_ptr() == at:
                return detached.clone()
        return detached

    def ready(self, tensor: Tensor, given: Container[int] = (), received: Iterable[Tensor] = ()) -> Tensor:
        """:meth:`apart`, with its elements in a row and nothing put off, so that it can travel."""
        return plain(self.apart(tensor, given, received))

    def _has(self, storage: int, leaf: bool) -> bool:
        at = None if self._first is None else self._first.data_ptr()  # weight versions move all parameters together
        if self._registered is None or at != self._at:
            modules = modules_of([self._module])
            self._at = at
            self._registered = _storages([*one._parameters.values(), *one._buffers.values()] for one in modules)
        if storage in self._registered:
            return True
        if not leaf:  # made by an operation
            return False
        if self._attributes is None:
            self._attributes = _storages(one.__dict__.values() for one in modules_of([self._module]))
        return storage in self._attributes


def _storages(kept: Iterable[Iterable[object]]) -> frozenset[int]:
    return frozenset(
        value.untyped_storage().data_ptr()
        for values in kept
        for value in values
        if has_storage(value) and value.layout is torch.strided and not value.is_meta
    )
