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
from paci_rt.fused_state import FusedState

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
    def apply(self, state: FusedState, grad_sum: Tensor, positions: list[int], divisor: int) -> None:
        """Update the parameters at ``positions`` with the gradients ``grad_sum / divisor``, flat and fp32."""

    @abstractmethod
    def updates_of(self, state: FusedState) -> list[int]:
        """Updates that each parameter has had, as far as its next one depends on their number."""

    @abstractmethod
    def run(
        self,
        state: FusedState,
        grad_sum: Tensor,
        divisor: float,
        pieces: list[tuple[int, int, int]],
        ahead: native.Ahead | None = None,
    ) -> None:
        """The native pass; ``pieces`` and ``ahead`` as there."""

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
        group, updates = state.group, self.updates_of(state)
        moved = [position for position, count in enumerate(updates) if known[position] or count]
        pieces = [(group.offsets[i], group.numels[i], updates[i] + 1) for i in moved]
        self.run(state, grad_sum, divisor, pieces, native.Ahead([known[i] for i in moved], repeats, kept))
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
        group, steps = state.group, state.steps
        assert steps is not None
        if len(positions) == len(group.params):
            steps += 1
        else:
            steps[positions] += 1
        counts = self.updates_of(state)
        self.run(state, grad_sum, divisor, [(group.offsets[i], group.numels[i], counts[i]) for i in positions])

    def updates_of(self, state: FusedState) -> list[int]:
        """All of them: the corrections for bias depend on it."""
        assert state.steps is not None
        return [int(count) for count in state.steps.tolist()]

    def run(
        self,
        state: FusedState,
        grad_sum: Tensor,
        divisor: float,
        pieces: list[tuple[int, int, int]],
        ahead: native.Ahead | None = None,
    ) -> None:
        """One pass over weights, gradients and both moments."""
        group, options = state.group, state.param_group
        native.adamw_step(
            master=group.weight if state.master is None else state.master,
            weight=None if state.master is None else group.weight,
            grad_sum=grad_sum,
            exp_avg=state.flat["exp_avg"],
            exp_avg_sq=state.flat["exp_avg_sq"],
            pieces=pieces,
            lr=float(options["lr"]),
            betas=(float(options["betas"][0]), float(options["betas"][1])),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            divisor=-divisor if options["maximize"] else divisor,
            ahead=ahead,
        )


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
        group, updates = state.group, self.updates_of(state)
        self.run(state, grad_sum, divisor, [(group.offsets[i], group.numels[i], updates[i] + 1) for i in positions])

    def updates_of(self, state: FusedState) -> list[int]:
        """Whether there was one: the first sets the momentum buffer."""
        return [int(state.has_state(position)) for position in range(len(state.group.params))]

    def run(
        self,
        state: FusedState,
        grad_sum: Tensor,
        divisor: float,
        pieces: list[tuple[int, int, int]],
        ahead: native.Ahead | None = None,
    ) -> None:
        """One pass over weights, gradients and the momentum buffer.

        Raises:
            ValueError: there is momentum, but there was none when the schedule took the optimizer.
        """
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
            pieces=pieces,
            lr=float(options["lr"]),
            momentum=momentum,
            dampening=float(options["dampening"]),
            weight_decay=float(options["weight_decay"]),
            nesterov=bool(options["nesterov"]),
            divisor=-divisor if options["maximize"] else divisor,
            ahead=ahead,
        )
