"""Optimizers that update flat parameter groups straight from a sealed accumulator: what all of them share, their state
for a group, and how a stage drives them.

They are ordinary ``torch.optim.Optimizer`` objects as far as parameter groups, learning-rate schedulers and
``state_dict`` go, but a schedule takes their steps. State lives in flat fp32 buffers; ``optimizer.state`` holds views
of them under torch's names. Parameters in bf16 or fp16 get an fp32 ``master`` next to them.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt.errors import OptimizerOwnedError
from paci_rt.optim.accumulator import Window
from paci_rt.optim.backend import make_steps
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.stage_optimizer import NamedParams, StageOptimizer
from paci_rt.optim.steps_native import Ahead, FlatStep


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
        steps: what takes the group's steps on its device.
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
        self.steps = make_steps(group)
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

    def check(self, position: int, entry: Mapping[str, Any]) -> None:
        """Make sure that :meth:`adopt` can take ``entry``.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        name, views = self.group.names[position], self.views(position)
        given = {key: value for key, value in entry.items() if value is not None}
        if not given:
            return
        missing, unexpected = views.keys() - given.keys() - {"master"}, given.keys() - views.keys() - {"master"}
        if missing or unexpected:
            raise ValueError(
                f"optimizer state of {name!r} has {sorted(given)}, but {type(self._optimizer).__name__} keeps "
                f"{sorted(views)}: it was saved by another optimizer"
            )
        for key, value in given.items():
            check_state_value(key, name, value)
            shape = torch.as_tensor(value).shape
            if key in views and shape != views[key].shape:
                raise ValueError(
                    f"optimizer state {key!r} of {name!r} has shape {tuple(shape)}, expected {tuple(views[key].shape)}"
                )

    def adopt(self, position: int, entry: dict[str, Any]) -> None:
        """Replace one parameter's state by the values of ``entry``; an empty one resets it.

        A missing ``master`` keeps the master that the parameter implies, so that states of plain torch optimizers
        can be loaded.

        Raises:
            ValueError: as :meth:`check`; nothing has been changed then.
        """
        self.check(position, entry)
        param, views = self.group.params[position], self.views(position)
        given = {key: value for key, value in entry.items() if value is not None}
        if not given:
            for key, view in views.items():
                view.fill_(self._first.get(key, 0.0))
            if self.master is not None:
                views["master"].copy_(param.detach())
            self._optimizer.state.pop(param, None)
            return
        for key, view in views.items():
            view.copy_(torch.as_tensor(given[key]) if key in given else param.detach())
        self._optimizer.state[param] = views

    def updates(self) -> list[int]:
        """Updates that each parameter has had: all of them where there is a ``step``, else only whether there was
        one."""
        steps = self.numbers.get("step")
        if steps is not None:
            return [int(count) for count in steps.tolist()]
        return [int(self.has_state(position)) for position in range(len(self.group.params))]

    def step(self, grad_sum: Tensor, divisor: float, positions: list[int], ahead: Ahead | None = None) -> FlatStep:
        """What a step over the parameters at ``positions``, which ascend, is told: gradients ``grad_sum / divisor``,
        flat and fp32, and the group's options."""
        group, options, updates = self.group, self.param_group, self.updates()
        return {
            "master": group.weight if self.master is None else self.master,
            "weight": None if self.master is None else group.weight,
            "grad_sum": grad_sum,
            "pieces": [(group.offsets[i], group.numels[i], updates[i] + 1) for i in positions],
            "lr": float(options["lr"]),
            "weight_decay": float(options["weight_decay"]),
            "divisor": -divisor if options["maximize"] else divisor,
            "ahead": ahead,
        }

    def count(self, positions: list[int]) -> None:
        """Parameters at ``positions`` were updated: their state shows in ``optimizer.state`` from now on."""
        if "step" in self.numbers:
            self.numbers["step"][positions] += 1
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
        _check_shared(**defaults)
        self.fused_states = []
        super().__init__(params, defaults)

    @abstractmethod
    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """State buffers for one flat group."""

    @abstractmethod
    def run(self, state: FusedState, positions: list[int], step: FlatStep) -> None:
        """Update the parameters at ``positions``, or put them ahead, as ``step`` says; their step counts stay."""

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
        ahead = Ahead([known[position] for position in moved], repeats, kept)
        self.run(state, moved, state.step(grad_sum, divisor, moved, ahead))
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

    def register_step_pre_hook(self, hook: Any) -> NoReturn:
        """Not here: such a hook expects gradients in ``.grad``, which these optimizers never put there.

        Raises:
            OptimizerOwnedError: always.
        """
        raise OptimizerOwnedError(
            f"paci_rt.{type(self).__name__} has no gradients in .grad that a hook before the step could see: use "
            "register_step_post_hook, or the optimizer of that name in torch.optim"
        )

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
        if saved.get("amsgrad"):
            raise ValueError(
                f"the state was saved with amsgrad=True, which paci_rt.{type(self).__name__} does not have: use "
                f"torch.optim.{type(self).__name__}"
            )
        return {**own, **saved}

    def _states_with_new_groups(self) -> list[tuple[FusedState, dict[str, Any]]]:
        """torch's load_state_dict replaces the group dictionaries: pair each state with the one that holds its
        parameters now."""
        home = {id(param): group for group in self.param_groups for param in group["params"]}
        return [(state, home[id(state.group.params[0])]) for state in self.fused_states]


class FusedStageOptimizer(StageOptimizer):
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

    def _apply(self, windows: dict[int, Window], divisor: int) -> None:
        for number in windows:
            self._states[number].refresh_masters()
        try:
            for bucket in range(1 if self._buckets is None else self._buckets.count):
                for number, (sums, positions) in windows.items():
                    part = positions if self._buckets is None else self._buckets.part(bucket, number, positions)
                    if part:
                        self._update(number, sums, part, divisor)
                self._publish(bucket)
        except BaseException:
            self._publish_all()  # nobody may wait for what will not come
            raise
        for hook in self.optimizer._optimizer_step_post_hooks.values():
            hook(self.optimizer, (), {})
        # torch's learning-rate schedulers look at this to warn about a scheduler that steps before the optimizer.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]

    def _update(self, number: int, grad_sum: Tensor, positions: list[int], divisor: int) -> None:
        """Update the parameters at ``positions`` of flat group ``number``; the others keep weights and state."""
        state = self._states[number]
        self.optimizer.run(state, positions, state.step(grad_sum, divisor, positions))
        state.count(positions)

    def master(self, number: int) -> Tensor | None:
        self._states[number].refresh_masters()
        return self._states[number].master

    def ahead(self, number: int, divisor: float, repeats: int, kept: Tensor | None, *, before: bool) -> list[int]:
        """Put the weights of flat group ``number`` where its next updates would bring them, by the gradients of the
        window in the making, or of the one before; see :meth:`FusedOptimizer.ahead`."""
        self.before_reading()
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

    def _check_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        self._states[number].check(position, entry)

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        self._states[number].adopt(position, entry)

    def unbind(self) -> None:
        self.optimizer.fused_states = []


def check_state_value(key: str, name: str, value: Any) -> None:
    """Make sure that one entry of a parameter's state is something to compute with.

    Raises:
        ValueError: it is neither a tensor nor a number; a moment that is no floating-point or complex tensor; a count
            of steps that is no number of at least 0.
    """
    if isinstance(value, Tensor) and value.dim():
        fine, wanted = value.is_floating_point() or value.is_complex(), "floating-point numbers"
    else:
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        fine, wanted = type(number) in (int, float, complex), "a number"
        if fine and key == "step":
            fine, wanted = type(number) is not complex and 0 <= number < 2**53, "a count of steps"
    if not fine:
        said = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"optimizer state {key!r} of {name!r} is {said}, not {wanted}")


def check_option(ok: bool, text: str) -> None:
    """Refuse an option of an optimizer.

    Raises:
        ValueError: not ``ok``; ``text`` names the option and its value.
    """
    if not ok:
        raise ValueError(text)


def _check_shared(*, lr: float | Tensor, weight_decay: float, **others: Any) -> None:
    """Refuse values of the options that several optimizers have."""
    check_option(float(lr) >= 0, f"lr={lr}: the learning rate must not be negative")
    betas, eps = others.get("betas", ()), others.get("eps", 0.0)
    check_option(all(0 <= beta < 1 for beta in betas), f"betas={betas}: both must lie in [0, 1)")
    check_option(eps >= 0, f"eps={eps}: must not be negative")
    check_option(weight_decay >= 0, f"weight_decay={weight_decay}: must not be negative")
