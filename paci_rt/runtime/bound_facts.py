"""What a stage was bound to, compared with what its module and optimizer have now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from paci_rt.errors import StageError


def walk(module: nn.Module) -> tuple[list[nn.Module], list[nn.Parameter | None]]:
    """All modules once, and the parameters in their places: one that is used twice comes twice."""
    parts: list[nn.Module] = [module]
    slots: list[nn.Parameter | None] = []
    seen = {id(module)}
    for part in parts:  # which grows meanwhile
        slots.extend(part._parameters.values())
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                parts.append(child)
    return parts, slots


def listed(optimizer: torch.optim.Optimizer | None) -> list[int]:
    """``id`` of an optimizer's parameters, group by group."""
    if optimizer is None:
        return []
    ids: list[int] = []
    for group in optimizer.param_groups:
        ids.extend(map(id, group["params"]))
        ids.append(-1)
    return ids


class BoundFacts:
    """Taken when a stage is bound; :meth:`changed` compares, in about 0.2 µs a module and parameter.

    Args:
        module: of the stage.
        optimizer: of the stage, None without one.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._parts, self._slots = walk(module)  # kept alive, so that an id stays theirs
        self._ids = [*map(id, self._parts), *map(id, self._slots)]
        self._trained = [slot is not None and slot.requires_grad for slot in self._slots]
        self._names = dict(module.named_parameters(remove_duplicate=False))
        self._listed, self._optimizer = listed(optimizer), optimizer
        self._incomplete = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))

    def changed(self, module: nn.Module) -> bool:
        """Whether anything is not as it was: modules, parameters, which of them are trained, the optimizer's lists."""
        parts, slots = walk(module)
        return (
            self._incomplete
            or any(part._is_full_backward_hook is False for part in parts)
            or [*map(id, parts), *map(id, slots)] != self._ids
            or [slot is not None and slot.requires_grad for slot in slots] != self._trained
            or listed(self._optimizer) != self._listed
        )

    def only_modules_changed(self, module: nn.Module) -> bool:
        """Whether parameters, in their order, and the optimizer's lists are as they were."""
        slots = walk(module)[1]
        return (
            not self._incomplete
            and [*map(id, slots)] == self._ids[len(self._parts) :]
            and [slot is not None and slot.requires_grad for slot in slots] == self._trained
            and listed(self._optimizer) == self._listed
        )

    def difference(self, module: nn.Module) -> str:
        """The first few things that changed, in words."""
        now = dict(module.named_parameters(remove_duplicate=False))
        was_trained = {id(slot): flag for slot, flag in zip(self._slots, self._trained, strict=True)}
        found = []
        for name in [*now, *(name for name in self._names if name not in now)]:
            old, new = self._names.get(name), now.get(name)
            if old is None:
                found.append(f"parameter {name!r} was added")
            elif new is None:
                found.append(f"parameter {name!r} was removed")
            elif new is not old:
                found.append(f"parameter {name!r} was replaced")
            elif new.requires_grad != was_trained[id(new)]:
                found.append(f"parameter {name!r} was {'unfrozen' if new.requires_grad else 'frozen'}")
        if not found:
            lists = listed(self._optimizer) != self._listed
            found.append("the optimizer's parameter groups changed" if lists else "its modules changed")
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that were trained."""
        return (slot for slot, flag in zip(self._slots, self._trained, strict=True) if slot is not None and flag)

    def unbound(self, module: nn.Module) -> list[str]:
        """Names of parameters that are trained now and were not when the stage was bound."""
        was_trained = set(map(id, self.trained()))
        now = ((name, param) for name, param in module.named_parameters() if param.requires_grad)
        return [name for name, param in now if id(param) not in was_trained]

    @contextmanager
    def as_begun(self, module: nn.Module, *, runs_again: bool) -> Iterator[None]:
        """Within it, what is trained is what was trained when the stage was bound: for work that was begun so.

        Args:
            module: of the stage.
            runs_again: the work includes forwards, which need the module that they were begun with.

        Raises:
            StageError: ``runs_again``, and parameters were replaced, added or removed.
        """
        trained: dict[Any, bool] = {slot: False for slot in walk(module)[1] if slot is not None}
        if runs_again and [*map(id, walk(module)[1])] != self._ids[len(self._parts) :]:
            raise StageError(
                f"{self.difference(module)} while micro-batches are in flight whose forwards run again (policy "
                "'recompute'), or are still to run (paci-v): put it back, call drain() and change it then"
            )
        for slot, flag in zip(self._slots, self._trained, strict=True):
            if slot is not None:
                trained[slot] = flag
        with ExitStack() as stack:
            for param, flag in trained.items():
                if param.requires_grad != flag:
                    stack.callback(param.requires_grad_, param.requires_grad)
                    param.requires_grad_(flag)
            yield
