"""State of a pipeline's stages, keyed by the names of parameters, buffers and modules."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.optim.group_options import (
    Members,
    apply_options,
    copied,
    find_places,
    group_places,
    joined_other_state,
    merged_options,
    record_groups,
    record_other_state,
)
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.module_state import (
    Handover,
    check_buffers,
    check_extra,
    check_names,
    check_tensor,
    collect_buffers,
    collect_extra,
    extra_handovers,
    hand_over,
    load_buffers,
    named_keepers,
)
from paci_rt.runtime.schedulers import joined_state, record_scheduler
from paci_rt.runtime.stage import PipelineStage

Apply = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of a pipeline has state.

    Attributes:
        named: parameters by their names in the pipeline.
        stages, bounds: stages and what their optimizers are bound by.
        schedulers: one a stage or None; empty where no stage has one.
    """

    named: Mapping[str, nn.Parameter]
    stages: Sequence[PipelineStage]
    bounds: Sequence[StageOptimizer]
    schedulers: Sequence[Any | None]

    def of_stages(self) -> list[tuple[dict[str, str], StageOptimizer, Any | None]]:
        """For each stage its modules' own parameter names and those in ``named``, its optimizer, its scheduler."""
        name_of = self.name_of
        names = [{own: name_of[param] for own, param in stage.named_parameters()} for stage in self.stages]
        return list(zip(names, self.bounds, self.schedulers or [None] * len(names), strict=True))

    @property
    def name_of(self) -> dict[nn.Parameter, str]:
        return {param: name for name, param in self.named.items()}

    @property
    def prefixed(self) -> bool:
        """Whether names say which stage they are of."""
        name_of = self.name_of
        return any(name_of[param] != own for stage in self.stages for own, param in stage.named_parameters())


def collect_state(parts: Parts, windows: int) -> dict[str, Any]:
    """Copies of everything; see :meth:`paci_rt.runtime.engine.Pipeline.state_dict`.

    Raises:
        ValueError: stages share the name of a buffer, or of a module with extra state, and differ in the value.
    """
    optimizer, records = {}, []
    for stage, (names, bound, scheduler) in zip(parts.stages, parts.of_stages(), strict=True):
        for own_name, state in bound.state_by_name().items():
            optimizer[names[own_name]] = state
        if bound.optimizer is not None:
            records.append(
                {
                    "stage": stage.stage_index,
                    "optimizer": type(bound.optimizer).__name__,
                    "groups": record_groups(bound.optimizer, parts.name_of),
                    "other_state": record_other_state(bound.optimizer),
                    "lr_scheduler": record_scheduler(scheduler),
                }
            )
    buffers, extra = named_keepers(parts.stages, parts.prefixed)
    return {
        "params": {name: param.detach().clone() for name, param in parts.named.items()},
        "buffers": collect_buffers(buffers),
        "extra_state": collect_extra(extra),
        "optimizer": optimizer,
        "optimizers": records,
        "windows": windows,
    }


def check_state(state: Mapping[str, Any], parts: Parts) -> Apply:
    """Check a whole state, and return what takes it over; until that is called nothing changes.

    Without ``optimizer``, optimizers and schedulers stay as they are.

    Raises:
        ValueError: a name is missing or unexpected, a shape or dtype differs, or optimizers, parameter groups or
            schedulers do not fit.
    """
    check_names("parameters", state["params"], parts.named)
    for name, param in parts.named.items():
        check_tensor(name, state["params"][name], param)
    buffers, extra = named_keepers(parts.stages, parts.prefixed)
    has_buffers = "buffers" in state
    if has_buffers:
        check_buffers(state["buffers"], buffers)
        check_extra(state["extra_state"], extra)
    elif buffers or extra:
        warnings.warn(
            f"this state is of an older format, which keeps no buffers: {len(buffers) + len(extra)} of this pipeline, "
            f"such as {next(iter((*buffers, *extra)))!r}, stay as they are; save it anew once they are right",
            RuntimeWarning,
            stacklevel=4,
        )
    schedulers, take_optimizers = _check_optimizers(state, parts) if "optimizer" in state else ([], lambda: None)
    handovers = [*(extra_handovers(state["extra_state"], extra) if has_buffers else ()), *schedulers]

    def take() -> None:
        hand_over(handovers)  # first, since these are the only ones that may fail
        take_optimizers()
        if has_buffers:
            load_buffers(state["buffers"], buffers)
        with torch.no_grad():
            for name, param in parts.named.items():
                param.copy_(state["params"][name])

    return take


def _check_optimizers(state: Mapping[str, Any], parts: Parts) -> tuple[list[Handover], Apply]:
    """What the schedulers take over, and what takes over all else of the optimizers."""
    unknown = sorted(state["optimizer"].keys() - parts.named.keys())
    if unknown:
        raise ValueError(f"state does not fit this pipeline: it has optimizer state of {unknown}, which are not here")
    old = "optimizers" not in state
    records = [] if old else state["optimizers"]
    places = find_places(records)
    schedulers: list[tuple[Any, dict[str, Any]]] = []  # with their new states
    options: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    entries: list[tuple[StageOptimizer, dict[str, Any]]] = []
    others: list[tuple[torch.optim.Optimizer, dict[Any, Any]]] = []
    for names, bound, scheduler in parts.of_stages():
        own = {own_name: state["optimizer"][name] for own_name, name in names.items() if name in state["optimizer"]}
        bound.check_state_by_name(own)
        entries.append((bound, own))
        optimizer = bound.optimizer
        if optimizer is None:
            continue
        if old:
            new = _old_scheduler(scheduler, state.get("lr_scheduler"))
        else:
            groups = _members(bound, optimizer, names, parts.name_of)
            found = group_places(groups, places)
            merged = merged_options(optimizer, groups, records, found)
            options += zip(optimizer.param_groups, merged, strict=True)
            others.append((optimizer, joined_other_state(records, found)))
            new = joined_state(scheduler, records, found) if records else None
        if new is not None:
            schedulers.append((scheduler, new))

    def take() -> None:
        for group, values in options:
            apply_options(group, values)
        if old:
            for scheduler, _ in schedulers:
                for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    apply_options(group, {"lr": lr})
        for bound, own in entries:
            bound.load_state_by_name(own)
        for optimizer, kept in others:
            optimizer.state.update(copied(kept))

    handovers = [Handover(scheduler.state_dict, scheduler.load_state_dict, new) for scheduler, new in schedulers]
    return handovers, take


def _members(
    bound: StageOptimizer,
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, str],
    name_of: Mapping[nn.Parameter, str],
) -> list[Members]:
    """Names in each group of a stage's optimizer. It does not update what is frozen, nor what follows another stage."""
    updated = {names[own] for group in bound.groups for own in group.names}
    listed = [[name_of[param] for param in group["params"] if param in name_of] for group in optimizer.param_groups]
    return [Members([name for name in group if name in updated], group) for group in listed]


def _old_scheduler(scheduler: Any | None, saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The state of a scheduler in the format that kept one for all stages, and of groups only their learning rate."""
    if scheduler is None or saved is None:
        return None
    rates, groups = saved.get("_last_lr"), scheduler.optimizer.param_groups
    if not isinstance(rates, list) or len(rates) != len(groups):
        raise ValueError(
            f"state does not fit this pipeline: its scheduler is of {len(rates or ())} parameter groups, and a stage "
            f"here has {len(groups)}"
        )
    state: dict[str, Any] = copied(saved)
    return state


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
