"""Cutting a batch into micro-batches along dimension 0, and putting outputs together again.

The same convention as ``torch.distributed.pipelining``: ``torch.Tensor.tensor_split``, so that a batch that does not
divide evenly gives micro-batches whose sizes differ by one; values that are not tensors go to every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def split(value: Any, count: int, what: str) -> list[Any]:
    """Cut ``value`` (a tensor, or nested tuples, lists and dicts of tensors) into ``count`` parts.

    Raises:
        ValueError: a tensor has fewer rows than there are micro-batches.
    """
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] < count:
            shape = tuple(value.shape)
            raise ValueError(f"{what} has shape {shape}: dimension 0 cannot be cut into {count} micro-batches")
        return list(value.tensor_split(count))
    if isinstance(value, (tuple, list)):
        columns = [split(item, count, f"{what}[{at}]") for at, item in enumerate(value)]
        return [type(value)(column[part] for column in columns) for part in range(count)]
    if isinstance(value, dict):
        parts = {key: split(item, count, f"{what}[{key!r}]") for key, item in value.items()}
        return [{key: part[at] for key, part in parts.items()} for at in range(count)]
    return [value] * count


def merge(outputs: Sequence[Any]) -> Any:
    """Concatenate what the micro-batches returned along dimension 0; scalars are stacked."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.stack(list(outputs)) if first.dim() == 0 else torch.cat(list(outputs))
    if isinstance(first, (tuple, list)):
        return type(first)(merge(column) for column in zip(*outputs, strict=True))
    if isinstance(first, dict):
        return {key: merge([output[key] for output in outputs]) for key in first}
    return list(outputs)


def on_device(value: Any, device: torch.device) -> Any:
    """``value`` with its CPU tensors on a GPU, copied without waiting; on the CPU ``value`` itself.

    Tensors that are on the GPU already may be of another stream's memory: it stays theirs until the current stream is
    through with them.
    """
    if device.type == "cpu":
        return value
    if isinstance(value, Tensor):
        if value.device.type == "cpu":
            return value.to(device, non_blocking=True)
        if value.device.type == "cuda":
            value.record_stream(torch.cuda.current_stream(value.device))
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: on_device(item, device) for key, item in value.items()}
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in ``value``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def on_gpu(value: Any) -> bool:
    """Whether any tensor in ``value`` is on a GPU."""
    return any(tensor.is_cuda for tensor in tensors(value))
