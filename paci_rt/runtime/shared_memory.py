"""Finds tensors that share memory where flat buffers would part them: ties between stages, and views of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from paci_rt.errors import StageError
from paci_rt.runtime.module_checks import tensors_of
from paci_rt.schedules.lowering import TiedWeight


class HasModule(Protocol):
    """A stage, as far as it matters here."""

    stage_index: int
    num_stages: int
    submod: nn.Module


@dataclass(frozen=True, slots=True)
class _Held:
    """One tensor that a stage holds."""

    stage: int
    kind: str
    name: str
    tensor: Tensor

    @property
    def trained(self) -> bool:
        return self.kind == "parameter" and self.tensor.requires_grad

    @property
    def span(self) -> tuple[int, int]:
        """First and last byte, by their addresses."""
        last = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        start = self.tensor.data_ptr()
        return start, start + (last + 1) * self.tensor.element_size()

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of stage {self.stage}"


def check_memory(stages: Sequence[HasModule], ties: Sequence[TiedWeight]) -> None:
    """Make sure that no trained parameter shares memory with anything else in this process's stages.

    A parameter that several layers of one stage use is one parameter, and fine. Stages of other processes cannot be
    seen from here: there a tie has to be declared.

    Raises:
        StageError: two do; the message names both.
    """
    held = [
        _Held(stage.stage_index, kind, name, tensor)
        for stage in stages
        for kind, name, tensor in tensors_of(stage.submod)
        if _has_plain_memory(tensor)
    ]
    _check_one_stage_each(held, stages[-1].num_stages - 1)
    declared = {frozenset(((tie.owner_stage, tie.owner), (tie.reader_stage, tie.reader))) for tie in ties}
    by_storage: dict[int, list[_Held]] = {}
    for one in {(one.stage, id(one.tensor)): one for one in reversed(held)}.values():
        by_storage.setdefault(one.tensor.untyped_storage().data_ptr(), []).append(one)
    for members in by_storage.values():
        if len(members) > 1 and any(one.trained for one in members):
            _check_storage(sorted(members, key=lambda one: one.span), declared, stages[-1].num_stages - 1)


def _has_plain_memory(tensor: Tensor) -> bool:
    plain = type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    lazy = nn.parameter.is_lazy(tensor)
    return plain and not lazy and not tensor.is_meta and tensor.layout is torch.strided and tensor.numel() > 0


def _check_one_stage_each(held: Sequence[_Held], last: int) -> None:
    first: dict[int, _Held] = {}
    for one in held:
        before = first.setdefault(id(one.tensor), one)
        if before.stage != one.stage and (one.trained or before.trained):
            raise StageError(f"{before} and {one} are one and the same nn.Parameter: {_tie_remedy(before, one, last)}")


def _check_storage(members: Sequence[_Held], declared: set[frozenset[tuple[int, str]]], last: int) -> None:
    """Tensors of one storage, by address."""
    for at, one in enumerate(members):
        for other in members[at + 1 :]:
            if other.span[0] >= one.span[1]:
                break
            pair = frozenset(((one.stage, one.name), (other.stage, other.name)))
            if not (one.trained or other.trained) or pair in declared or not _overlap(one.tensor, other.tensor):
                continue
            if one.kind == other.kind == "parameter" and one.stage != other.stage:
                first, second = sorted((one, other), key=lambda held: held.stage)
                raise StageError(f"{first} and {second} share memory: {_tie_remedy(first, second, last)}")
            raise StageError(
                f"{one} and {other} share memory, and a schedule moves parameters into a buffer of their own: use one "
                "nn.Parameter in both places, compute the view in forward(), or clone() one of them"
            )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage, whose spans overlap, have a byte in common."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    size = one.untyped_storage().nbytes()
    marks = torch.zeros(size, dtype=torch.uint8)
    for tensor in (one, other):
        width = tensor.element_size()
        at = tensor.storage_offset() * width
        strides = [*(stride * width for stride in tensor.stride()), 1]
        marks.as_strided([*tensor.shape, width], strides, at).add_(1)
    return bool((marks > 1).any())


def _tie_remedy(first: _Held, second: _Held, last: int) -> str:
    if second.stage != last:
        return f"keep both uses on one stage, since only the last stage ({last}) can follow another's weight"
    return (
        "give each stage one of its own (nn.Parameter(weight.detach().clone())) and tell the schedule: tied_weights="
        f"[paci_rt.TiedWeight(owner_stage={first.stage}, owner={first.name!r}, reader_stage={second.stage}, "
        f"reader={second.name!r})]"
    )
