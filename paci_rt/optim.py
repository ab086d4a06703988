"""Optimizers as a stage drives them: gradients go in one by one, whole windows come out as updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.accumulator import GradAccumulator
from paci_rt.errors import OptimizerOwnedError
from paci_rt.flat import FlatGroup
from paci_rt.fused import OWNED_MESSAGE, FusedOptimizer
from paci_rt.fused_adam import AdamW, NAdam
from paci_rt.fused_momentum import SGD, Lion
from paci_rt.fused_muon import Muon

__all__ = ["SGD", "AdamW", "BoundOptimizer", "FusedBound", "Lion", "Muon", "NAdam", "UpdateStats", "bind_optimizer"]

_GUARD = "_paci_rt_guard"
NamedParams = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What an update saw.

    Attributes:
        grad_norm: 2-norm of this stage's mean gradient.
        nonfinite: infinite and NaN elements in it.
    """

    grad_norm: float
    nonfinite: int


class BoundOptimizer(ABC):
    """An optimizer tied to one stage's flat parameters and accumulators. Made by :func:`bind_optimizer`.

    Attributes:
        groups: flat groups, one for each optimizer group and dtype.
        accumulators: one for each of them.
        optimizer: the user's optimizer, None without one.
    """

    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, grouped: Sequence[NamedParams], frozen: Iterable[Tensor], buffers: int) -> None:
        self.groups = [FlatGroup(named) for named in grouped]
        self.accumulators = [GradAccumulator(group, buffers=buffers) for group in self.groups]
        self._frozen_bytes = sum(tensor.nbytes for tensor in frozen)
        self._home = {
            id(param): (accumulator, position)
            for group, accumulator in zip(self.groups, self.accumulators, strict=True)
            for position, param in enumerate(group.params)
        }

    def accumulate(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add one micro-batch's gradient of one parameter to the current window.

        Raises:
            ValueError: the parameter is not one of the stage's, or the gradient is sparse, of a wrong shape or dtype.
        """
        home = self._home.get(id(param))
        if home is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not among the {len(self._home)} that this stage's "
                "optimizer was bound to"
            )
        home[0].add(home[1], grad)

    def front(self, param: nn.Parameter) -> tuple[Tensor, bool]:
        """Where a gradient can be computed in place; see :meth:`paci_rt.accumulator.GradAccumulator.front`."""
        accumulator, position = self._home[id(param)]
        return accumulator.front(position)

    def update(self, divisor: int) -> UpdateStats:
        """End the window: seal the sums, apply ``sum / divisor``, and leave the accumulators empty.

        Parameters without a gradient in the window are left alone, as torch does with a ``grad`` of None.

        Raises:
            ValueError: ``divisor`` is below 1.
            StageError: a parameter was moved off its flat buffer.
        """
        if divisor < 1:
            raise ValueError(f"divisor={divisor}: gradients are divided by a number of micro-batches, at least 1")
        for group in self.groups:
            group.check_views()
        live = [number for number, accumulator in enumerate(self.accumulators) if accumulator.state == "filling"]
        for number in live:
            self.accumulators[number].seal()
            self.accumulators[number].consume()
        squares = sum(self.accumulators[number].sum_of_squares for number in live)
        nonfinite = sum(self.accumulators[number].nonfinite_count for number in live)
        try:
            self._apply(live, divisor)
        finally:
            for number in live:
                self.accumulators[number].release()
        return UpdateStats(grad_norm=squares**0.5 / divisor, nonfinite=nonfinite)

    def _touched(self, number: int) -> list[int]:
        """Positions in flat group ``number`` that got a gradient in the window being consumed."""
        return [position for position, touched in enumerate(self.accumulators[number].touched) if touched]

    @abstractmethod
    def _apply(self, live: list[int], divisor: int) -> None:
        """Update from the accumulators numbered ``live``, which are being consumed."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held for this stage: ``weights`` (frozen ones included), ``masters``, ``optimizer``,
        ``accumulators``; padding included."""
        return {
            "weights": sum(group.weight.nbytes for group in self.groups) + self._frozen_bytes,
            "masters": self._masters_bytes(),
            "optimizer": self._optimizer_bytes(),
            "accumulators": sum(accumulator.nbytes for accumulator in self.accumulators),
        }

    def _masters_bytes(self) -> int:
        return 0

    def _optimizer_bytes(self) -> int:
        return 0

    def state_by_name(self, *, copy: bool = True) -> dict[str, dict[str, Any]]:
        """Optimizer state of every trainable parameter, keyed by its name; ``{}`` where it has none yet.

        Args:
            copy: return copies; False returns the tensors that the next update changes.
        """
        return {
            name: {
                key: value.clone() if copy and isinstance(value, Tensor) else value
                for key, value in self._state_of(number, position).items()
            }
            for number, group in enumerate(self.groups)
            for position, name in enumerate(group.names)
        }

    def load_state_by_name(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what :meth:`state_by_name` returned, perhaps from a stage cut differently.

        Raises:
            ValueError: names are missing or unexpected, or an entry does not fit the optimizer.
        """
        known = {name for group in self.groups for name in group.names}
        missing, unexpected = sorted(known - states.keys()), sorted(states.keys() - known)
        if missing or unexpected:
            parts = [f"missing {', '.join(missing)}"] if missing else []
            parts += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
            raise ValueError(f"optimizer state does not fit this stage's parameters: {'; '.join(parts)}")
        for number, group in enumerate(self.groups):
            for position, name in enumerate(group.names):
                self._load_state_of(number, position, dict(states[name]))

    def state_views(self, number: int, position: int) -> dict[str, Any]:
        """State of the parameter at ``position`` of flat group ``number``, as the tensors that the next update
        changes; ``{}`` before its first update."""
        return self._state_of(number, position)

    def master(self, number: int) -> Tensor | None:
        """Flat fp32 weights behind flat group ``number``, None where the parameters are all there is."""
        return None

    def _state_of(self, number: int, position: int) -> dict[str, Any]:
        return {}

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        if entry:
            raise ValueError(
                f"optimizer state for {self.groups[number].names[position]!r} was given, but the schedule has no "
                "optimizer: load it into your own"
            )

    @abstractmethod
    def unbind(self) -> None:
        """Give the optimizer back to the user. Parameters stay views of their flat buffer, which does no harm."""


class _GradsOnly(BoundOptimizer):
    """No optimizer: windows end up in ``.grad``, and the user steps."""

    def _apply(self, live: list[int], divisor: int) -> None:
        for number in live:
            group, accumulator = self.groups[number], self.accumulators[number]
            for position in self._touched(number):
                param = group.params[position]
                mean = (accumulator.sealed_view(position) / divisor).to(param.dtype)
                if param.grad is None:
                    param.grad = mean
                else:
                    param.grad.add_(mean)

    def unbind(self) -> None:
        pass


class FusedBound(BoundOptimizer):
    """One of this package's optimizers, which read the sealed buffer themselves."""

    def __init__(
        self,
        optimizer: FusedOptimizer,
        grouped: Sequence[NamedParams],
        owners: Sequence[dict[str, Any]],
        frozen: Iterable[Tensor],
        buffers: int,
    ) -> None:
        super().__init__(grouped, frozen, buffers)
        self.optimizer: FusedOptimizer = optimizer
        self._states = [optimizer.make_state(owner, group) for owner, group in zip(owners, self.groups, strict=True)]
        optimizer.fused_states = self._states

    def _apply(self, live: list[int], divisor: int) -> None:
        for number in live:
            state, positions = self._states[number], self._touched(number)
            state.refresh_masters()
            self.optimizer.apply(state, self.accumulators[number].sealed_flat, positions, divisor)
            state.publish(positions)
        # torch's learning-rate schedulers look at this to warn about a scheduler that steps before the optimizer.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def master(self, number: int) -> Tensor | None:
        self._states[number].refresh_masters()
        return self._states[number].master

    def ahead(self, number: int, divisor: float, repeats: int, kept: Tensor | None, *, before: bool) -> list[int]:
        """Put the weights of flat group ``number`` where its next updates would bring them, by the gradients of the
        window in the making, or of the one before; see :meth:`paci_rt.fused.FusedOptimizer.ahead`."""
        grad_sum, known = self.accumulators[number].sums(before=before)
        self._states[number].refresh_masters()
        return self.optimizer.ahead(self._states[number], grad_sum, known, divisor, repeats, kept)

    def _masters_bytes(self) -> int:
        return sum(state.master.nbytes for state in self._states if state.master is not None)

    def _optimizer_bytes(self) -> int:
        return sum(state.nbytes for state in self._states)

    def _state_of(self, number: int, position: int) -> dict[str, Any]:
        state = self._states[number]
        return state.views(position) if state.has_state(position) else {}

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        self._states[number].adopt(position, entry)

    def unbind(self) -> None:
        self.optimizer.fused_states = []


class _AnyTorch(BoundOptimizer):
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

    def _apply(self, live: list[int], divisor: int) -> None:
        for param in self._params:
            param.grad = None
        for number in live:
            group, accumulator = self.groups[number], self.accumulators[number]
            if divisor != 1:
                accumulator.sealed_flat.div_(divisor)
            for position in self._touched(number):
                param = group.params[position]
                param.grad = accumulator.sealed_view(position).to(param.dtype)
        self._stepping = True
        try:
            # Backwards of micro-batches still in flight must accept these weights; the schedule bounds their drift.
            with torch.autograd._unsafe_preserve_version_counter(self._params):
                self.optimizer.step()
        finally:
            self._stepping = False
            for param in self._params:
                param.grad = None

    def _optimizer_bytes(self) -> int:
        values = (value for param in self._params for value in self.optimizer.state.get(param, {}).values())
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    def _state_of(self, number: int, position: int) -> dict[str, Any]:
        return dict(self.optimizer.state.get(self.groups[number].params[position], {}))

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        param = self.groups[number].params[position]
        if not entry:
            self.optimizer.state.pop(param, None)
            return
        self.optimizer.state[param] = {
            key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()
        }

    def unbind(self) -> None:
        self._guard.remove()


def bind_optimizer(
    optimizer: torch.optim.Optimizer | None,
    named_params: Mapping[str, nn.Parameter],
    *,
    buffers: int = 1,
    asynchronous: bool = True,
    ignored: Collection[nn.Parameter] = (),
) -> BoundOptimizer:
    """Flatten a stage's trainable parameters and put an optimizer over them.

    Args:
        optimizer: one of this package's, any of ``torch.optim``, or None (flush schedules only), where every window
            leaves its mean gradient in ``.grad``.
        named_params: the stage's parameters by name; those that need no gradient are left alone.
        buffers: accumulator buffers, 1 or 2.
        asynchronous: whether the schedule updates without a flush.
        ignored: parameters that the optimizer may list although the stage never updates them, such as a tied
            weight that follows another stage.

    Raises:
        ValueError: the optimizer and the stage have different parameters, or there is none under an asynchronous
            schedule.

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
    names = {id(param): name for name, param in trainable.items()}
    grouped: list[NamedParams] = []
    owners: list[dict[str, Any]] = []
    for param_group in optimizer.param_groups:
        members = [(names[id(param)], param) for param in param_group["params"] if id(param) in names]
        for named in _by_dtype(members):
            grouped.append(named)
            owners.append(param_group)
    if isinstance(optimizer, FusedOptimizer):
        return FusedBound(optimizer, grouped, owners, frozen, buffers)
    return _AnyTorch(optimizer, grouped, frozen, buffers)


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
