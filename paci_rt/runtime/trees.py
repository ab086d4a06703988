"""Tensors in nested containers: tuples, lists, dicts, and whatever else ``torch.utils._pytree`` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_FLAT = (Tensor, torch.nn.Parameter, int, float, bool, str, type(None))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in ``value``, in the order in which ``torch.utils._pytree`` lists them."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) is tuple and len(value) == 1 and type(value[0]) is Tensor:
        return [value[0]]
    if type(value) in (tuple, list) and not any(type(item) not in _FLAT for item in value):
        return [item for item in value if isinstance(item, Tensor)]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def on_gpu(value: Any) -> bool:
    """Whether any tensor in ``value`` is on a GPU."""
    return any(tensor.is_cuda for tensor in tensors(value))


def on_device(value: Any, device: torch.device) -> Any:
    """``value`` with its CPU tensors on a GPU, copied without waiting; on the CPU ``value`` itself.

    Tensors that are on the GPU already may be of another stream's memory: it stays theirs until the current stream is
    through with them.
    """
    if device.type == "cpu":
        return value

    def there(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor.to(device, non_blocking=True)
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    return map_tensors(there, value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` of each of its tensors in its place."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    return pytree.tree_map_only(Tensor, function, value)


def name_of(value: Any, leaf: Any, what: str) -> str:
    """Where in ``value``, called ``what``, the object ``leaf`` is; for error messages."""
    try:
        for path, found in pytree.tree_flatten_with_path(value, is_leaf=lambda node: node is leaf)[0]:
            if found is leaf:
                where = str(pytree.keystr(path))
                return what + (where if len(where) <= 200 else f"{where[:100]} ... {where[-100:]}")
    except ValueError:  # a container that cannot name its parts
        pass
    return what
