"""What a stage sends to the next one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paci_rt.transport.base import Message
from paci_rt.transport.structure import FORWARD_ONLY, take_apart


def forward_message(output: Any, stage_index: int, requires_grad: tuple[bool, ...] | None) -> Message:
    """The tensors of a module's output, cut off autograd's graph, and what they are part of.

    Args:
        output: of the module of stage ``stage_index``.
        requires_grad: for each tensor whether its gradient is wanted; None where no backward follows.
    """
    tensors, structure = take_apart(output, stage_index)
    if requires_grad is None:
        requires_grad = (False,) * len(tensors)
        structure = FORWARD_ONLY if structure is None else replace(structure, forward_only=True)
    return Message(tuple(tensor.detach().contiguous() for tensor in tensors), requires_grad, structure)
