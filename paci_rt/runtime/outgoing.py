"""What a stage sends to the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from paci_rt.transport.base import Message
from paci_rt.transport.structure import FORWARD_ONLY, take_apart


def forward_message(output: Any, stage_index: int, ready: Callable[[Tensor], Tensor], *, training: bool) -> Message:
    """The tensors of a module's output, made ready to travel, and what they are part of.

    Args:
        output: of the module of stage ``stage_index``.
        ready: from a tensor of the output to one that can travel: cut off autograd's graph, in memory of its own.
        training: a backward follows, for the tensors that take part in autograd.
    """
    tensors, structure = take_apart(output, stage_index)
    if not training:
        structure = FORWARD_ONLY if structure is None else replace(structure, forward_only=True)
    wanted = tuple([training and tensor.requires_grad for tensor in tensors])
    return Message(tuple(map(ready, tensors)), wanted, structure)
