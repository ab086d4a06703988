"""Which layers of a module are linear ones whose backward can be split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class PlainForward:
    """What takes the place of a stand-in for ``forward`` in copies and pickles of an attached module."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def find_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer that can be split; see :mod:`paci_rt.runtime.split_backward` for others."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, part in module.named_modules():
        for role, param in part.named_parameters(recurse=False):
            owners.setdefault(id(param), []).append((part, role))
    inside_compiled = compiled_parts(module)
    candidates = {
        id(part)
        for part in module.modules()
        if _is_linear(part) and id(part) not in inside_compiled and not _has_hooks(part)
    }
    while True:  # a layer that drops out may take those with it that share a parameter
        shared = {
            at
            for uses in owners.values()
            for part, role in uses
            for at in [id(part)]
            if at in candidates and any(id(other) not in candidates or other_role != role for other, other_role in uses)
        }
        if not shared:
            break
        candidates -= shared
    for name, part in module.named_modules():
        if id(part) in candidates:
            yield name, part


def _is_linear(part: nn.Module) -> bool:
    weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
    if weight is None or weight.dim() != 2 or not weight.requires_grad or "forward" in part.__dict__:
        return False
    if isinstance(part, nn.Linear):
        return type(part).forward is nn.Linear.forward and weight.dtype.is_floating_point
    is_conv1d = type(part).__name__ == "Conv1D" and getattr(part, "nf", None) == weight.shape[1]
    return is_conv1d and bias is not None and bias.shape == (weight.shape[1],)


def _has_hooks(part: nn.Module) -> bool:
    """Whether somebody waits for the gradient of a parameter itself, which a split layer would not deliver."""
    params = [param for param in part._parameters.values() if param is not None]
    return any(param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None) for param in params)


def compiled_parts(module: nn.Module) -> set[int]:
    """``id`` of every module that ``torch.compile`` sees."""
    compiled = [
        part
        for part in module.modules()
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
    ]
    return {id(part) for outer in compiled for part in outer.modules()}
