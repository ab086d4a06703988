"""Statistics and state of a pipeline's stages, keyed by stage and by parameter name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.stage import PipelineStage


def collect_state(
    named: Mapping[str, nn.Parameter],
    stages: Sequence[PipelineStage],
    bounds: Sequence[StageOptimizer],
    lr_schedulers: Sequence[Any],
    windows: int,
) -> dict[str, Any]:
    """Copies of parameters and optimizer state by the names of ``named``, which say where a stage's names collide."""
    optimizer = {}
    for names, bound in zip(_names_of(named, stages), bounds, strict=True):
        for own_name, state in bound.state_by_name().items():
            optimizer[names[own_name]] = state
    return {
        "params": {name: param.detach().clone() for name, param in named.items()},
        "optimizer": optimizer,
        "lr_scheduler": lr_schedulers[0].state_dict() if lr_schedulers else None,
        "windows": windows,
    }


def load_state(
    state: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    stages: Sequence[PipelineStage],
    bounds: Sequence[StageOptimizer],
    lr_schedulers: Sequence[Any],
) -> None:
    """Check everything, then copy it into the parameters and the optimizers.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs.
    """
    params, optimizer = state["params"], state["optimizer"]
    missing, unexpected = sorted(named.keys() - params.keys()), sorted(params.keys() - named.keys())
    if missing or unexpected:
        raise ValueError(f"state does not fit this pipeline: missing {missing}, unexpected {unexpected}")
    for name, param in named.items():
        if params[name].shape != param.shape:
            raise ValueError(
                f"state does not fit this pipeline: {name!r} has shape {tuple(params[name].shape)}, "
                f"the parameter {tuple(param.shape)}"
            )
    for names, bound in zip(_names_of(named, stages), bounds, strict=True):
        own = {own_name: optimizer[name] for own_name, name in names.items() if name in optimizer}
        bound.load_state_by_name(own)
    with torch.no_grad():
        for name, param in named.items():
            param.copy_(params[name])
    if state.get("lr_scheduler") is not None:
        for scheduler in lr_schedulers:
            scheduler.load_state_dict(state["lr_scheduler"])
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr


def _names_of(named: Mapping[str, nn.Parameter], stages: Sequence[PipelineStage]) -> list[dict[str, str]]:
    """For each stage its modules' own parameter names and the names in ``named``."""
    of_param = {param: name for name, param in named.items()}
    return [{own_name: of_param[param] for own_name, param in stage.named_parameters()} for stage in stages]


def params_sha256(named_params: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the bytes of all parameters, in the order given.

    Args:
        named_params: pairs of name and tensor, of any dtype, in the order of the uncut model.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> before = paci_rt.params_sha256(model.named_parameters())
        >>> len(before), before == paci_rt.params_sha256(model.named_parameters())
        (64, True)
    """
    digest = hashlib.sha256()
    for _name, tensor in named_params:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
