"""Arguments of stages and pipelines that are of no use at all: refused by name, before anything is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from paci_rt.errors import StageError
from paci_rt.schedules import StepCosts, limits
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.wording import shown


def as_device(given: Any) -> torch.device:
    """The device that the caller named.

    Raises:
        ValueError: it is none.
    """
    if isinstance(given, torch.device):
        return given
    try:
        if isinstance(given, str):
            return torch.device(given)
    except RuntimeError:
        pass
    raise ValueError(f"device is {shown(given)}: give 'cpu', 'cuda' or 'cuda:N'")


def check_place(stage_index: Any, num_stages: Any) -> None:
    """Raise ValueError for a stage that no pipeline has."""
    limits.check_integer("num_stages", num_stages, 1, limits.MOST_STAGES)
    if isinstance(stage_index, bool) or not isinstance(stage_index, int) or not 0 <= stage_index < num_stages:
        raise ValueError(f"stage_index is {shown(stage_index)} of num_stages {num_stages}: give 0 to {num_stages - 1}")


def check_modules(modules: Any) -> None:
    """Raise unless ``modules`` is a list of modules.

    Raises:
        ValueError: it is no list, or empty.
        StageError: one of them is no module.
    """
    if isinstance(modules, (str, bytes)) or not isinstance(modules, (Sequence, nn.ModuleList, nn.Sequential)):
        raise ValueError(f"modules is a {type(modules).__name__}: give a list with one torch.nn.Module per stage")
    if not len(modules):
        raise ValueError("modules is empty: give one module per stage")
    for at, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise StageError(f"modules[{at}] is a {type(module).__name__}: give a torch.nn.Module")


def check_types(
    *,
    schedule: Any,
    loss_fn: Any,
    optimizers: Sequence[Any],
    chunks: Any,
    policy: Any,
    lookahead: Any,
    costs: Any,
    buffers: Any,
    tied_weights: Any,
    scale_grads: Any,
) -> None:
    """Raise ValueError for an argument of a type that no pipeline takes; the arguments are those of ``Pipeline``."""
    limits.check_integer("chunks", chunks, 1, limits.MOST_STAGES)
    wanted: tuple[tuple[str, Any, tuple[type, ...], str], ...] = (
        ("schedule", schedule, (str,), "the name of a schedule"),
        ("policy", policy, (str, type(None)), "the name of a policy, or leave it out"),
        ("lookahead", lookahead, (bool, type(None)), "True, False or None"),
        ("costs", costs, (StepCosts, type(None)), "a paci_rt.StepCosts, or leave it out"),
        ("scale_grads", scale_grads, (bool,), "True or False"),
    )
    for name, value, types, remedy in wanted:
        if not isinstance(value, types):
            raise ValueError(f"{name} is {shown(value)}: give {remedy}")
    if buffers is not None and (type(buffers) is not int or buffers not in (1, 2)):
        raise ValueError(f"buffers is {shown(buffers)}: give 1 (update in line) or 2")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn is {shown(loss_fn)}: give loss_fn(output, target), or None to run forward only")
    for optimizer in optimizers:
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer is {shown(optimizer)}: give a torch.optim.Optimizer, such as paci_rt.AdamW")
    _check_ties(tied_weights)


def _check_ties(tied_weights: Any) -> None:
    if not isinstance(tied_weights, (list, tuple)):
        raise ValueError(f"tied_weights is {shown(tied_weights)}: give a list of paci_rt.TiedWeight")
    for tie in tied_weights:
        if not isinstance(tie, TiedWeight):
            raise ValueError(f"tied_weights has {shown(tie)}: give a list of paci_rt.TiedWeight")
        for side in ("owner", "reader"):
            stage, name = getattr(tie, f"{side}_stage"), getattr(tie, side)
            if isinstance(stage, bool) or not isinstance(stage, int) or not isinstance(name, str):
                raise ValueError(
                    f"tied weight with {side} {shown(name)} on stage {shown(stage)}: give a parameter's name and the "
                    "number of a stage"
                )
