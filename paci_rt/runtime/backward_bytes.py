"""How many bytes a backward takes beside what its forward has saved, read off autograd's graph before it runs.

Autograd works from node to node: it holds the gradients of what a node has made while the node makes those of what it
was given. So what it takes is that of its largest node. Gradients as large as a weight are among those: of parameters
that no stand-in of ours takes, and on the CPU of matrices whose product cannot be added to the sum in one pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from paci_rt.optim.accumulator import merged_is_exact
from paci_rt.runtime.activation_bytes import graph_nodes

_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Unsqueeze", "Squeeze", "Alias")
_SAME_MEMORY = {f"{name}Backward{number}" for name in _VIEWS for number in (0, 1)}
"""Nodes whose gradients are views of each other. (That of a slice is not: it is as large as what was sliced.)"""


def backward_bytes(outputs: Iterable[Tensor], matrices: Collection[int], lookups: Collection[int]) -> int:
    """Bytes of the gradients of the largest node in the graphs of ``outputs``.

    Args:
        matrices: ``id`` of the weights whose gradients split layers compute.
        lookups: ``id`` of those whose gradients come in rows.
    """
    return max((_of(node, matrices, lookups) for node in graph_nodes(outputs)), default=0)


def _of(node: Any, matrices: Collection[int], lookups: Collection[int]) -> int:
    if hasattr(node, "variable"):
        return 0  # a parameter's own, which takes what others have made
    total = sum(_bytes(one) for one in node._input_metadata)
    if type(node).__name__ in _SAME_MEMORY:
        return total
    for parent, number in node.next_functions:
        if parent is None:
            continue
        param = getattr(parent, "variable", None)
        if param is None:
            total += _bytes(parent._input_metadata[number])
        elif id(param) in matrices:
            total += _product_bytes(param, prod(node._input_metadata[0].shape[:-1]))
        elif id(param) not in lookups:
            total += param.nbytes
    return total


def _product_bytes(weight: Tensor, rows: int) -> int:
    """Of the gradient of a matrix before it is added to the sum; 0 where it is added as it is computed."""
    if weight.device.type != "cpu":
        return 0
    merged = weight.dtype is torch.float32 and merged_is_exact(
        weight.shape[0], rows, weight.shape[1], torch.get_num_threads()
    )
    return 0 if merged else weight.nbytes


def _bytes(one: Any) -> int:
    return int(prod(one.shape)) * int(one.dtype.itemsize)
