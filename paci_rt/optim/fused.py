"""Optimizers that update flat parameter groups straight from a sealed accumulator: what all of them share.

They are ordinary ``torch.optim.Optimizer`` objects as far as parameter groups, learning-rate schedulers and
``state_dict`` go, but a schedule takes their steps. State lives in flat fp32 buffers; ``optimizer.state`` holds views
of them under torch's names. Parameters in bf16 or fp16 get an fp32 ``master`` next to them.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt import native
from paci_rt.errors import OptimizerOwnedError
from paci_rt.optim.flat import FlatGroup


class FusedState:
    """State of a fused optimizer for one flat group: flat fp32 buffers and, for low precision, fp32 masters.

    Args:
        names: of the flat buffers, which begin at zero.
        numbers: what is one number for each parameter, and what it begins at.

    Attributes:
        group: the parameters.
        param_group: the optimizer's group that they belong to; hyper-parameters are read from it at each update.
        flat: flat fp32 buffers by state name.
        master: fp32 weights of bf16/fp16 parameters, None where parameters are fp32 themselves.
        numbers: by state name, one number for each parameter, such as ``step``, the updates that it has had.
        scalars: what the kernels on a GPU keep there between launches; see :mod:`paci_rt.optim.steps_triton`.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        param_group: dict[str, Any],
        group: FlatGroup,
        names: tuple[str, ...],
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        self.group, self.param_group, self._optimizer = group, param_group, optimizer
        self.scalars: dict[int, Any] = {}
        self.flat = {name: group.empty_like(torch.float32) for name in names}
        self.master: Tensor | None = None
        if group.dtype is not torch.float32:
            self.master = group.empty_like(torch.float32)
            self.master.copy_(group.weight)
        self._first = dict(numbers or {})
        self.numbers = {name: torch.full((len(group.params),), value) for name, value in self._first.items()}
        self._versions = self._param_versions()
        for position, param in enumerate(group.params):
            self.adopt(position, optimizer.state.get(param) or {})

    @property
    def nbytes(self) -> int:
        """Bytes of the state without the masters."""
        return sum(tensor.nbytes for tensor in (*self.flat.values(), *self.numbers.values()))

    def has_state(self, position: int) -> bool:
        """Whether a parameter has been updated, or was given a state."""
        return bool(self._optimizer.state.get(self.group.params[position]))

    def views(self, position: int) -> dict[str, Any]:
        """One parameter's state under torch's names, as views of the flat buffers."""
        views: dict[str, Any] = {name: values[position] for name, values in self.numbers.items()}
        views.update({name: self.group.view(flat, position) for name, flat in self.flat.items()})
        if self.master is not None:
            views["master"] = self.group.view(self.master, position)
        return views

    def adopt(self, position: int, entry: dict[str, Any]) -> None:
        """Replace one parameter's state by the values of ``entry``; an empty one resets it.

        A missing ``master`` keeps the master that the parameter implies, so that states of plain torch optimizers
        can be loaded.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        name, param = self.group.names[position], self.group.params[position]
        views = self.views(position)
        given = {key: value for key, value in entry.items() if value is not None}
        if not given:
            for key, view in views.items():
                view.fill_(self._first.get(key, 0.0))
            if self.master is not None:
                views["master"].copy_(param.detach())
            self._optimizer.state.pop(param, None)
            return
        missing, unexpected = views.keys() - given.keys() - {"master"}, given.keys() - views.keys() - {"master"}
        if missing or unexpected:
            raise ValueError(
                f"optimizer state of {name!r} has {sorted(given)}, but {type(self._optimizer).__name__} keeps "
                f"{sorted(views)}: it was saved by another optimizer"
            )
        for key, view in views.items():
            value = torch.as_tensor(given[key]) if key in given else param.detach()
            if value.shape != view.shape:
                raise ValueError(
                    f"optimizer state {key!r} of {name!r} has shape {tuple(value.shape)}, expected {tuple(view.shape)}"
                )
            view.copy_(value)
        self._optimizer.state[param] = views

    def updates(self) -> list[int]:
        """Updates that each parameter has had: all of them where there is a ``step``, else only whether there was
        one."""
        steps = self.numbers.get("step")
        if steps is not None:
            return [int(count) for count in steps.tolist()]
        return [int(self.has_state(position)) for position in range(len(self.group.params))]

    def count(self, positions: list[int]) -> None:
        """Parameters at ``positions`` were updated."""
        if "step" in self.numbers:
            self.numbers["step"][positions] += 1

    def publish(self, positions: list[int]) -> None:
        """Make the state of parameters that were just updated visible in ``optimizer.state``."""
        if not self.flat and not self.numbers and self.master is None:
            return
        for position in positions:
            if not self.has_state(position):
                self._optimizer.state[self.group.params[position]] = self.views(position)

    def refresh_masters(self) -> None:
        """Follow weights that the user changed in place since the last update, for example by ``load_state_dict``.

        Only elements whose master no longer rounds to the weight are replaced, so nothing is lost where nothing
        changed. Changes through ``param.data`` are not seen.
        """
        if self.master is None:
            return
        versions = self._param_versions()
        if versions != self._versions:
            weight = self.group.weight
            changed = self.master.to(weight.dtype) != weight
            self.master.copy_(torch.where(changed, weight.float(), self.master))
            self._versions = versions

    def _param_versions(self) -> list[int]:
        return [param._version for param in self.group.params]


OWNED_MESSAGE = (
    "the schedule owns the optimizer step: schedule.step() and schedule.drain() update every stage as soon as a window "
    "of micro-batches is complete, so remove the call of optimizer.step(). Learning-rate schedulers go to the "
    "schedule as lr_scheduler=..."
)


class FusedOptimizer(torch.optim.Optimizer):
    """What the native optimizers share: no step of their own, and state that survives ``load_state_dict`` in fp32."""

    fused_states: list[FusedState]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.fused_states = []
        super().__init__(params, defaults)

    @abstractmethod
    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """State buffers for one flat group."""

    @abstractmethod
    def run(
        self,
        state: FusedState,
        grad_sum: Tensor,
        divisor: float,
        positions: list[int],
        ahead: native.Ahead | None = None,
    ) -> None:
        """Update the parameters at ``positions`` with the gradients ``grad_sum / divisor``, flat and fp32, or put them
        ahead; their step counts stay."""

    def apply(self, state: FusedState, grad_sum: Tensor, positions: list[int], divisor: int) -> None:
        """Update the parameters at ``positions``; the others keep weights and state."""
        self.run(state, grad_sum, divisor, positions)
        state.count(positions)

    def ahead(
        self,
        state: FusedState,
        grad_sum: Tensor,
        known: Sequence[bool],
        divisor: float,
        repeats: int,
        kept: Tensor | None,
    ) -> list[int]:
        """Put the weights where the next ``repeats`` updates would bring them, were all of them to see the gradients
        ``grad_sum / divisor``; state and masters stay.

        Args:
            state: of one flat group.
            grad_sum: flat fp32 sums of a window.
            known: for each parameter whether the sum has a gradient of it; without one its momentum has to do, and a
                parameter that was never updated stays.
            divisor: what the sum is divided by, micro-batches in it where gradients are scaled.
            repeats: updates.
            kept: flat fp32, receives the weights as they were; None where there are masters.

        Returns:
            Positions of the parameters that were put ahead.
        """
        moved = [position for position, count in enumerate(state.updates()) if known[position] or count]
        self.run(state, grad_sum, divisor, moved, native.Ahead([known[i] for i in moved], repeats, kept))
        return moved

    def step(self, closure: Callable[[], Any] | None = None) -> NoReturn:
        """Not for callers: the schedule takes the steps.

        Raises:
            OptimizerOwnedError: always.
        """
        if not self.fused_states:
            raise OptimizerOwnedError(
                f"paci_rt.{type(self).__name__} updates flat parameters inside a schedule and cannot step by itself: "
                "pass it to a schedule as optimizer=..., or use the optimizer of that name in torch.optim"
            )
        raise OptimizerOwnedError(OWNED_MESSAGE)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, of this optimizer or of the torch optimizer of the same name.

        Unlike torch's, it keeps fp32 state of bf16/fp16 parameters in fp32.

        Raises:
            ValueError: groups, names or shapes do not match, or the options mean another optimizer.
        """
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) == len(self.param_groups):  # else torch says so
            merged = [self.merge_options(own, new) for own, new in zip(self.param_groups, saved_groups, strict=True)]
            state_dict = {**state_dict, "param_groups": merged}
        super().load_state_dict(state_dict)
        ids = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        saved = state_dict["state"]
        # torch casts state to the parameter's dtype; the dictionary still has the exact values.
        exact: dict[Tensor, dict[str, Any]] = {
            param: {key: value.clone() if isinstance(value, Tensor) else value for key, value in saved[number].items()}
            for number, param in zip(ids, params, strict=True)
            if number in saved
        }
        self.state.clear()
        self.state.update(exact)
        for state, old in self._states_with_new_groups():
            state.param_group = old
            for position, param in enumerate(state.group.params):
                state.adopt(position, exact.get(param, {}))

    def merge_options(self, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """A parameter group as a state dict has it, with the options that only this optimizer has as they are.

        Raises:
            ValueError: an option means an optimizer that this one is not.
        """
        return {**own, **saved}

    def _states_with_new_groups(self) -> list[tuple[FusedState, dict[str, Any]]]:
        """torch's load_state_dict replaces the group dictionaries: pair each state with the one that holds its
        parameters now."""
        home = {id(param): group for group in self.param_groups for param in group["params"]}
        return [(state, home[id(state.group.params[0])]) for state in self.fused_states]


def check_option(ok: bool, text: str) -> None:
    """Refuse an option of an optimizer.

    Raises:
        ValueError: not ``ok``; ``text`` names the option and its value.
    """
    if not ok:
        raise ValueError(text)


def check_rates(lr: float | Tensor, weight_decay: float) -> None:
    """Refuse a negative learning rate or weight decay.

    Raises:
        ValueError: either is.
    """
    check_option(float(lr) >= 0, f"lr={lr}: the learning rate must not be negative")
    check_option(weight_decay >= 0, f"weight_decay={weight_decay}: must not be negative")


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse shares that are none.

    Raises:
        ValueError: one is outside [0, 1).
    """
    check_option(0 <= betas[0] < 1 and 0 <= betas[1] < 1, f"betas={betas}: both must lie in [0, 1)")
