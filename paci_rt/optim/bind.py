"""Every optimizer that a stage can have, and how it is bound to the stage's parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.errors import OptimizerOwnedError
from paci_rt.optim.accumulator import Window
from paci_rt.optim.adam import AdamW, NAdam
from paci_rt.optim.flat import PLAIN_DTYPES
from paci_rt.optim.fused import OWNED_MESSAGE, FusedOptimizer, FusedStageOptimizer
from paci_rt.optim.fused_state import check_state_value
from paci_rt.optim.lion import Lion
from paci_rt.optim.muon import Muon
from paci_rt.optim.sgd import SGD
from paci_rt.optim.stage_optimizer import NamedParams, StageOptimizer, UpdateStats
from paci_rt.optim.verdict import require_finite
from paci_rt.transport.replicas import ReplicaGroup

__all__ = [
    "SGD",
    "AdamW",
    "FusedStageOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "StageOptimizer",
    "UpdateStats",
    "bind_optimizer",
]

_GUARD = "_paci_rt_guard"


class _GradsOnly(StageOptimizer):
    """No optimizer: windows end up in ``.grad``, and the user steps."""

    def _apply(self, windows: dict[int, Window], divisor: float) -> None:
        for number, window in windows.items():
            group = self.groups[number]
            for position in window.positions:
                param = group.params[position]
                mean = (group.view(window.sums, position) / divisor).to(param.dtype)
                if param.grad is None:
                    param.grad = mean
                else:
                    param.grad.add_(mean)
        self._publish_all()

    def unbind(self) -> None:
        pass


class _AnyTorch(StageOptimizer):
    """Any ``torch.optim`` optimizer: it sees ``.grad`` and steps in place while version counters stand still."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, grouped: Sequence[NamedParams], frozen: Iterable[Tensor], buffers: int
    ) -> None:
        super().__init__(grouped, frozen, buffers)
        self.optimizer: torch.optim.Optimizer = optimizer
        self._params = tuple(param for group in self.groups for param in group.params)
        self._stepping = False
        # A binding made earlier gives way: its flat buffer is left behind, so its next update raises StageError.
        earlier = getattr(optimizer, _GUARD, None)
        if earlier is not None:
            earlier.remove()
        self._guard = optimizer.register_step_pre_hook(self._refuse_foreign_step)
        setattr(optimizer, _GUARD, self._guard)

    def _refuse_foreign_step(self, *_: Any) -> None:
        if not self._stepping:
            raise OptimizerOwnedError(OWNED_MESSAGE)

    def _apply(self, windows: dict[int, Window], divisor: float) -> None:
        for param in self._params:
            param.grad = None
        for number, window in windows.items():
            group = self.groups[number]
            if divisor != 1:
                window.sums.div_(divisor)
            for position in window.positions:
                param = group.params[position]
                param.grad = group.view(window.sums, position).to(param.dtype)
                if param.dtype is torch.float16 and not bool(param.grad.isfinite().all()):
                    raise ValueError(
                        f"the gradient of {group.names[position]!r} is finite as a sum and too large for fp16: use "
                        f"paci_rt's optimizer in place of {type(self.optimizer).__name__}, or scale_grads=True"
                    )
        self._stepping = True
        try:
            # Backwards of micro-batches still in flight must accept these weights; the schedule bounds their drift.
            with ExitStack() as stack:
                for param in self._params:  # all in one call only since torch 2.7
                    stack.enter_context(torch.autograd._unsafe_preserve_version_counter(param))
                self.optimizer.step()
        finally:
            self._stepping = False
            for param in self._params:
                param.grad = None
            self._publish_all()

    def _copied_state(self, memory: Any) -> Any:
        return [deepcopy(self.optimizer.state.get(param)) for param in self._params]

    def _restore_state(self, state: Any) -> None:
        for param, entry in zip(self._params, state, strict=True):
            if entry is None:
                self.optimizer.state.pop(param, None)
            else:
                self.optimizer.state[param] = deepcopy(entry)

    def _optimizer_bytes(self) -> int:
        values = (value for param in self._params for value in self.optimizer.state.get(param, {}).values())
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def _state_of(self, number: int, position: int) -> dict[str, Any]:
        return dict(self.optimizer.state.get(self.groups[number].params[position], {}))

    def check_state_by_name(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        super().check_state_by_name(states)
        if not type(self.optimizer).__module__.startswith("torch."):
            return
        # What torch's optimizers keep depends on a parameter's group and on whether it is a matrix.
        seen: dict[tuple[int, int], tuple[str, set[tuple[str, int]]]] = {}
        for number, group in enumerate(self.groups):
            for name, param in zip(group.names, group.params, strict=True):
                entry = states[name].items()
                kinds = {(str(key), value.dim() if isinstance(value, Tensor) else -1) for key, value in entry}
                first, others = seen.setdefault((number, param.dim()), (name, kinds)) if kinds else (name, kinds)
                if kinds != others:
                    raise ValueError(
                        f"optimizer state of {name!r} and {first!r}, which are in one parameter group, is not alike: "
                        f"{min(kinds ^ others)[0]!r} differs in kind"
                    )

    def _check_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        name, param = self.groups[number].names[position], self.groups[number].params[position]
        if "master" in entry:
            raise ValueError(
                f"optimizer state of {name!r} has an fp32 master, which {type(self.optimizer).__name__} of torch.optim "
                "does not keep: use paci_rt's optimizer of that name"
            )
        if not type(self.optimizer).__module__.startswith("torch."):
            return  # others keep what they like
        for key, value in entry.items():
            if value is None or type(value) is bool:
                continue
            check_state_value(key, name, value)
            if not isinstance(value, Tensor) and key != "step":
                raise ValueError(f"optimizer state {key!r} of {name!r} is {value!r:.40}, not a tensor")
            if isinstance(value, Tensor) and value.dim() and value.dtype not in (param.dtype, torch.float32):
                real = param.is_complex() and value.dtype == param.real.dtype
                if not real:
                    raise ValueError(
                        f"optimizer state {key!r} of {name!r} is of {value.dtype}, and the parameter of {param.dtype}"
                    )
            if isinstance(value, Tensor) and value.dim() and not _reducible(value.shape, param.shape):
                raise ValueError(
                    f"optimizer state {key!r} of {name!r} has shape {tuple(value.shape)}, which does not fit the "
                    f"parameter's {tuple(param.shape)}"
                )

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        param = self.groups[number].params[position]
        if not entry:
            self.optimizer.state.pop(param, None)
            return
        options = next(one for one in self.optimizer.param_groups if any(member is param for member in one["params"]))
        self.optimizer.state[param] = {key: _placed(key, value, param, options) for key, value in entry.items()}

    def unbind(self) -> None:
        self._guard.remove()


def _reducible(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether ``shape`` is ``full``, or that with some dimensions of 1, as Adafactor keeps it."""
    if len(full) < 2:
        return tuple(shape) == tuple(full)
    return len(shape) == len(full) and all(one in (1, whole) for one, whole in zip(shape, full, strict=True))


def _placed(key: str, value: Any, param: Tensor, options: Mapping[str, Any]) -> Any:
    """A copy of one entry of a torch optimizer's state where that optimizer has it: with its parameter, but for the
    step count, which is on the CPU unless the kernels read it."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not options.get("capturable") and not options.get("fused"):
        return value.clone()
    return value.to(param.device, copy=True)


def bind_optimizer(
    optimizer: torch.optim.Optimizer | None,
    named_params: Mapping[str, nn.Parameter],
    *,
    buffers: int = 1,
    asynchronous: bool = True,
    ignored: Collection[nn.Parameter] = (),
    shard_among: ReplicaGroup | None = None,
) -> StageOptimizer:
    """Flatten a stage's trainable parameters and put an optimizer over them.

    Args:
        optimizer: one of this package's, any of ``torch.optim``, or None (flush schedules only), where every window
            leaves its mean gradient in ``.grad``.
        named_params: the stage's parameters by name; those that need no gradient are left alone.
        buffers: accumulator buffers, 1 or 2.
        asynchronous: whether the schedule updates without a flush.
        ignored: parameters that the optimizer may list although the stage never updates them, such as a tied
            weight that follows another stage.
        shard_among: replicas that share the optimizer's state; one of this package's that is ``shardable``.

    Raises:
        ValueError: the optimizer and the stage have different parameters, an option of it is not finite, or there is
            none under an asynchronous schedule.

    An optimizer that was bound before, by a schedule that is no longer used, is taken over with its state.
    """
    trainable = {name: param for name, param in named_params.items() if param.requires_grad}
    frozen = [param for param in named_params.values() if not param.requires_grad]
    if optimizer is None:
        if asynchronous:
            raise ValueError(
                "an asynchronous schedule updates its stages itself and needs an optimizer: pass optimizer=..., for "
                "example paci_rt.AdamW(stage.parameters(), lr=3e-4)"
            )
        return _GradsOnly(_by_dtype(list(trainable.items())), frozen, buffers)
    _check_same_params(optimizer, trainable, [*frozen, *ignored])
    require_finite(optimizer.param_groups)
    names = {id(param): name for name, param in trainable.items()}
    grouped: list[NamedParams] = []
    owners: list[dict[str, Any]] = []
    for param_group in optimizer.param_groups:
        members = [(names[id(param)], param) for param in param_group["params"] if id(param) in names]
        for named in _by_dtype(members):
            grouped.append(named)
            owners.append(param_group)
    if isinstance(optimizer, FusedOptimizer):
        _check_fused(optimizer, trainable)
        return FusedStageOptimizer(optimizer, grouped, owners, frozen, buffers, shard_among)
    _check_step(optimizer)
    return _AnyTorch(optimizer, grouped, frozen, buffers)


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    named = [one for one in signature(type(optimizer).step).parameters.values() if one.kind is not one.VAR_POSITIONAL]
    needed = [one.name for one in named[1:] if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    if needed:
        raise ValueError(
            f"{type(optimizer).__name__}.step() needs a {needed[0]}, to compute the loss again, which no stage can do "
            "by itself: use an optimizer whose step() needs nothing"
        )


def _check_fused(optimizer: FusedOptimizer, trainable: Mapping[str, nn.Parameter]) -> None:
    other = [f"{name} ({param.dtype})" for name, param in trainable.items() if param.dtype in PLAIN_DTYPES]
    if other:
        raise ValueError(
            f"paci_rt.{type(optimizer).__name__} updates fp32, bf16 and fp16 parameters, and this stage has "
            f"{_few(other)}: use an optimizer of torch.optim, or cast the module"
        )


def _by_dtype(named: NamedParams) -> list[NamedParams]:
    """Split by dtype and device, keeping the order."""
    parts: dict[tuple[torch.dtype, torch.device], NamedParams] = {}
    for name, param in named:
        parts.setdefault((param.dtype, param.device), []).append((name, param))
    return list(parts.values())


def _check_same_params(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], tolerated: Collection[nn.Parameter]
) -> None:
    listed = [param for group in optimizer.param_groups for param in group["params"]]
    ours, allowed = {id(param) for param in trainable.values()}, {id(param) for param in tolerated}
    foreign = [
        f"group {number} parameter {position} of shape {tuple(param.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for position, param in enumerate(group["params"])
        if id(param) not in ours and id(param) not in allowed
    ]
    if foreign:
        raise ValueError(
            f"the optimizer holds parameters that are not in this stage: {_few(foreign)}; construct it from this "
            "stage's parameters, stage.parameters()"
        )
    ids = {id(param) for param in listed}
    missing = [name for name, param in trainable.items() if id(param) not in ids]
    if missing:
        raise ValueError(
            f"the optimizer misses trainable parameters of this stage: {_few(missing)}; add them, or freeze them with "
            "requires_grad_(False)"
        )


def _few(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
