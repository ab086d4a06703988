"""What a micro-batch leaves behind between its forward and its backward."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from paci_rt.runtime.modes import Mode
from paci_rt.runtime.recompute import Again
from paci_rt.runtime.split_backward import SplitUse

# In newer versions of torch a backward can start from a gradient edge, which keeps the graph but not the output's
# memory. Without the token, which is newer still, an edge does not keep the node of a Python function, such as a split
# layer's.
_EDGES_AS_ROOTS = (
    "GradientEdge" in str(inspect.signature(torch.autograd.backward)) and "ownership_token" in GradientEdge._fields
)


@dataclass(slots=True)
class Graph:
    """Where a backward starts."""

    roots: tuple[Any, ...]
    which: tuple[int, ...]  # positions of the outputs that the roots belong to
    used: list[SplitUse]  # linear layers, in the order of their uses


@dataclass(slots=True)
class InFlight:
    """What one micro-batch leaves behind between its forward and its backward.

    Attributes:
        kept_bytes, full_bytes: of activations that stay alive until the backward, and in it; see
            :meth:`PipelineStage.kept_bytes`.
        shares: of the caller's batch, by storage.
        mode: that it was begun under.
    """

    inputs: tuple[Tensor, ...]
    held: Graph | Again
    kept_bytes: int
    full_bytes: int
    shares: dict[int, int]
    mode: Mode


def graph_of(outputs: tuple[Tensor, ...], used: list[SplitUse]) -> Graph:
    """Where a backward of the ``outputs`` that take part in autograd starts."""
    if len(outputs) == 1 and outputs[0].requires_grad:
        return Graph((_root(outputs[0]),), (0,), used)
    which = tuple([at for at, tensor in enumerate(outputs) if tensor.requires_grad])
    return Graph(tuple([_root(outputs[at]) for at in which]), which, used)


def _root(tensor: Tensor) -> Any:
    # An edge holds the graph without the output, whose memory is free once it has been sent.
    return get_gradient_edge(tensor) if _EDGES_AS_ROOTS else tensor


def first_gradient(root: Any, value: float) -> Tensor:
    """What a backward from the loss at ``root`` begins with, in place of 1."""
    if isinstance(root, Tensor):
        return torch.full_like(root, value)
    loss = root.node._input_metadata[root.output_nr]
    return torch.full(loss.shape, value, dtype=loss.dtype, device=loss.device)
