"""The caller's tensors are the caller's: what a step still needs of them when it returns has been copied before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paci_rt.action import Action, Op
from paci_rt.runtime.batch import Batch
from paci_rt.runtime.stage import PipelineStage
from paci_rt.runtime.trees import tensors


def keep_safe(batch: Batch, stages: Sequence[PipelineStage], streams: Iterable[Sequence[Action]] | None) -> int:
    """Copy what micro-batches that stay in flight were given, before anything runs; bytes that were copied.

    A forward keeps views of the caller's batch for its backward. Autograd would not notice all writes to it, such as
    those through NumPy. Micro-batches that end in this step stay as they are, and what is copied to a GPU anyway. A
    tensor that was made in inference mode is always copied, since autograd refuses it.

    Args:
        batch: of a step; its entries are replaced.
        stages: of this process.
        streams: the actions of the step; None where all micro-batches end in it.
    """
    ended, copies = None if streams is None else ended_in(streams), _Copies()
    devices = {stage.stage_index: stage.device for stage in stages}

    def late(key: tuple[int, int]) -> bool:
        return ended is not None and key not in ended

    first, last = stages[0], stages[-1]
    batch.args = {m: copies.of(args, first.device, late((first.stage_index, m))) for m, args in batch.args.items()}
    batch.kwargs = {key: copies.of(kwargs, devices[key[0]], late(key)) for key, kwargs in batch.kwargs.items()}
    for m, loss in batch.losses.items():
        loss.target = copies.of(loss.target, last.device, late((last.stage_index, m)))
    return copies.copied_bytes


def ended_in(streams: Iterable[Sequence[Action]]) -> set[tuple[int, int]]:
    """Stage and number of the micro-batches whose backward ends in ``streams``."""
    actions = chain.from_iterable(streams)
    return {(action.stage, action.index) for action in actions if action.op in (Op.B, Op.W)}


@contextmanager
def gradients_set_aside(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """What the user left in ``.grad`` is none of what is computed within; it comes back, with that added."""
    kept = [(param, param.grad) for param in params if param.grad is not None]
    for param, _ in kept:
        param.grad = None
    yield
    for param, grad in kept:
        param.grad = grad if param.grad is None else grad.add_(param.grad)


class _Copies:
    """Copies of tensors, each made once."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self.copied_bytes = 0

    def of(self, value: Any, device: torch.device, late: bool) -> Any:
        """``value`` with copies of its tensors, if it is ``late``; else of those made in inference mode."""
        if not late and not any(tensor.is_inference() for tensor in tensors(value)):
            return value
        return pytree.tree_map_only(Tensor, lambda tensor: self._copy(tensor, device), value)

    def _copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device != device and not tensor.is_inference():
            return tensor
        if id(tensor) not in self._made:
            copy = tensor.clone() if tensor.requires_grad else tensor.detach().clone()
            self._made[id(tensor)] = tensor, copy
            self.copied_bytes += tensor.numel() * tensor.element_size()
        return self._made[id(tensor)][1]
