"""AdamW and SGD that update flat parameter groups straight from a sealed accumulator, in one native pass.

They are ordinary ``torch.optim.Optimizer`` objects as far as parameter groups, learning-rate schedulers and
``state_dict`` go, but a schedule takes their steps. State lives in flat fp32 buffers; ``optimizer.state`` holds views
of them under torch's names. Parameters in bf16 or fp16 get an fp32 ``master`` next to them.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt import native
from paci_rt.errors import OptimizerOwnedError
from paci_rt.flat import FlatGroup

OWNED_MESSAGE = (
    "the schedule owns the optimizer step: schedule.step() and schedule.drain() update every stage as soon as a window "
    "of micro-batches is complete, so remove the call of optimizer.step(). Learning-rate schedulers go to the "
    "schedule as lr_scheduler=..."
)


class FusedState:
    """State of a fused optimizer for one flat group: flat fp32 buffers and, for low precision, fp32 masters.

    Attributes:
        group: the parameters.
        param_group: the optimizer's group that they belong to; hyper-parameters are read from it at each update.
        flat: flat fp32 buffers by state name.
        master: fp32 weights of bf16/fp16 parameters, None where parameters are fp32 themselves.
        steps: updates that each parameter has had, one number a parameter; None where torch keeps no ``step``.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        param_group: dict[str, Any],
        group: FlatGroup,
        names: tuple[str, ...],
        *,
        counts_steps: bool,
    ) -> None:
        self.group, self.param_group, self._optimizer = group, param_group, optimizer
        self.flat = {name: group.empty_like(torch.float32) for name in names}
        self.master: Tensor | None = None
        if group.dtype is not torch.float32:
            self.master = group.empty_like(torch.float32)
            self.master.copy_(group.weight)
        self.steps = torch.zeros(len(group.params)) if counts_steps else None
        self._versions = self._param_versions()
        for position, param in enumerate(group.params):
            self.adopt(position, optimizer.state.get(param) or {})

    @property
    def nbytes(self) -> int:
        """Bytes of the state without the masters."""
        return sum(flat.nbytes for flat in self.flat.values()) + (0 if self.steps is None else self.steps.nbytes)

    def has_state(self, position: int) -> bool:
        """Whether a parameter has been updated, or was given a state."""
        return bool(self._optimizer.state.get(self.group.params[position]))

    def views(self, position: int) -> dict[str, Any]:
        """One parameter's state under torch's names, as views of the flat buffers."""
        views: dict[str, Any] = {}
        if self.steps is not None:
            views["step"] = self.steps[position]
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
            for view in views.values():
                view.zero_()
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

    def publish(self, positions: list[int]) -> None:
        """Make the state of parameters that were just updated visible in ``optimizer.state``."""
        if not self.flat and self.master is None:
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
    def apply(self, state: FusedState, grad_sum: Tensor, positions: list[int], divisor: int) -> None:
        """Update the parameters at ``positions`` with the gradients ``grad_sum / divisor``, flat and fp32."""

    @abstractmethod
    def ahead(
        self,
        state: FusedState,
        grad_sum: Tensor,
        known: Sequence[bool],
        divisor: int,
        repeats: int,
        kept: Tensor | None,
    ) -> list[int]:
        """Put the weights where the next ``repeats`` updates would bring them, were all of them to see the gradients
        ``grad_sum / divisor``; state and masters stay.

        Args:
            state: of one flat group.
            grad_sum: flat fp32 sums of a window in the making.
            known: for each parameter whether the sum has a gradient of it; without one its momentum has to do, and a
                parameter that was never updated stays.
            divisor: micro-batches in the sum.
            kept: flat fp32, receives the weights as they were; None where there are masters.

        Returns:
            Positions of the parameters that were put ahead.
        """

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
            ValueError: groups, names or shapes do not match.
        """
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

    def _states_with_new_groups(self) -> list[tuple[FusedState, dict[str, Any]]]:
        """torch's load_state_dict replaces the group dictionaries: pair each state with the one that holds its
        parameters now."""
        home = {id(param): group for group in self.param_groups for param in group["params"]}
        return [(state, home[id(state.group.params[0])]) for state in self.fused_states]


def _check(ok: bool, text: str) -> None:
    if not ok:
        raise ValueError(text)


class AdamW(FusedOptimizer):
    """``torch.optim.AdamW`` as one native pass over flat parameters: divides the summed gradients, updates both
    moments and the weights, and rounds to bf16/fp16 parameters from fp32 masters.

    Same order of operations as torch's, so results agree to a few units in the last place of fp32.

    Args:
        params: parameters or groups, as for ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay, maximize: as there.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        _check(float(lr) >= 0, f"lr={lr}: the learning rate must not be negative")
        _check(0 <= betas[0] < 1 and 0 <= betas[1] < 1, f"betas={betas}: both must lie in [0, 1)")
        _check(eps >= 0, f"eps={eps}: must not be negative")
        _check(weight_decay >= 0, f"weight_decay={weight_decay}: must not be negative")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """First and second moments and a step count for each parameter."""
        return FusedState(self, param_group, group, ("exp_avg", "exp_avg_sq"), counts_steps=True)

    def apply(self, state: FusedState, grad_sum: Tensor, positions: list[int], divisor: int) -> None:
        """Update the parameters at ``positions``; the others keep weights, moments and step count."""
        group, options, steps = state.group, state.param_group, state.steps
        assert steps is not None
        if len(positions) == len(group.params):
            steps += 1
        else:
            steps[positions] += 1
        counts = steps.tolist()
        native.adamw_step(
            master=group.weight if state.master is None else state.master,
            weight=None if state.master is None else group.weight,
            grad_sum=grad_sum,
            exp_avg=state.flat["exp_avg"],
            exp_avg_sq=state.flat["exp_avg_sq"],
            pieces=[(group.offsets[i], group.numels[i], int(counts[i])) for i in positions],
            lr=float(options["lr"]),
            betas=(float(options["betas"][0]), float(options["betas"][1])),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            divisor=-divisor if options["maximize"] else divisor,
        )

    def ahead(
        self,
        state: FusedState,
        grad_sum: Tensor,
        known: Sequence[bool],
        divisor: int,
        repeats: int,
        kept: Tensor | None,
    ) -> list[int]:
        """As :meth:`apply`, ``repeats`` times, on copies of the moments."""
        group, options, steps = state.group, state.param_group, state.steps
        assert steps is not None
        counts = [int(count) for count in steps.tolist()]
        moved = [position for position, count in enumerate(counts) if known[position] or count]
        native.adamw_ahead(
            master=group.weight if state.master is None else state.master,
            weight=None if state.master is None else group.weight,
            grad_sum=grad_sum,
            exp_avg=state.flat["exp_avg"],
            exp_avg_sq=state.flat["exp_avg_sq"],
            kept=kept,
            pieces=[(group.offsets[i], group.numels[i], counts[i] + 1, known[i]) for i in moved],
            repeats=repeats,
            lr=float(options["lr"]),
            betas=(float(options["betas"][0]), float(options["betas"][1])),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            divisor=-divisor if options["maximize"] else divisor,
        )
        return moved


class SGD(FusedOptimizer):
    """``torch.optim.SGD`` as one native pass over flat parameters; see :class:`AdamW`.

    Args:
        params: parameters or groups, as for ``torch.optim.SGD``.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as there.

    Raises:
        ValueError: a value is out of range, or Nesterov momentum without momentum or with dampening.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        _check(float(lr) >= 0, f"lr={lr}: the learning rate must not be negative")
        _check(momentum >= 0, f"momentum={momentum}: must not be negative")
        _check(weight_decay >= 0, f"weight_decay={weight_decay}: must not be negative")
        _check(
            not nesterov or (momentum > 0 and dampening == 0),
            f"nesterov=True needs momentum above 0 and dampening 0, got momentum={momentum}, dampening={dampening}",
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """A momentum buffer, or nothing where the group has no momentum."""
        names = ("momentum_buffer",) if float(param_group["momentum"]) != 0 else ()
        return FusedState(self, param_group, group, names, counts_steps=False)

    def apply(self, state: FusedState, grad_sum: Tensor, positions: list[int], divisor: int) -> None:
        """Update the parameters at ``positions``; the others keep weights and momentum."""
        group, options = state.group, state.param_group
        momentum = float(options["momentum"])
        if momentum != 0 and "momentum_buffer" not in state.flat:
            raise ValueError(
                "the momentum of a parameter group became non-zero after the optimizer was given to a schedule: "
                "construct SGD with momentum above 0"
            )
        native.sgd_step(
            master=group.weight if state.master is None else state.master,
            weight=None if state.master is None else group.weight,
            grad_sum=grad_sum,
            momentum_buffer=state.flat.get("momentum_buffer"),
            pieces=[(group.offsets[i], group.numels[i], 2 if state.has_state(i) else 1) for i in positions],
            lr=float(options["lr"]),
            momentum=momentum,
            dampening=float(options["dampening"]),
            weight_decay=float(options["weight_decay"]),
            nesterov=bool(options["nesterov"]),
            divisor=-divisor if options["maximize"] else divisor,
        )

    def ahead(
        self,
        state: FusedState,
        grad_sum: Tensor,
        known: Sequence[bool],
        divisor: int,
        repeats: int,
        kept: Tensor | None,
    ) -> list[int]:
        """As :meth:`apply`, ``repeats`` times, on a copy of the momentum."""
        group, options = state.group, state.param_group
        updated = [state.has_state(position) for position in range(len(group.params))]
        moved = [position for position, before in enumerate(updated) if known[position] or before]
        native.sgd_ahead(
            master=group.weight if state.master is None else state.master,
            weight=None if state.master is None else group.weight,
            grad_sum=grad_sum,
            momentum_buffer=state.flat["momentum_buffer"],
            kept=kept,
            pieces=[(group.offsets[i], group.numels[i], 2 if updated[i] else 1, known[i]) for i in moved],
            repeats=repeats,
            lr=float(options["lr"]),
            momentum=float(options["momentum"]),
            dampening=float(options["dampening"]),
            weight_decay=float(options["weight_decay"]),
            nesterov=bool(options["nesterov"]),
            divisor=-divisor if options["maximize"] else divisor,
        )
        return moved
