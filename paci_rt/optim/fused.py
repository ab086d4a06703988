"""Optimizers that update flat parameter groups straight from a sealed accumulator: what all of them share, their state
for a group, and how a stage drives them.

They are ordinary ``torch.optim.Optimizer`` objects as far as parameter groups, learning-rate schedulers and
``state_dict`` go, but a schedule takes their steps. State lives in flat fp32 buffers; ``optimizer.state`` holds views
of them under torch's names. Parameters in bf16 or fp16 get an fp32 ``master`` next to them.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt.errors import OptimizerOwnedError
from paci_rt.optim import backend
from paci_rt.optim.accumulator import Window
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.fused_state import FusedState
from paci_rt.optim.shards import Shards, WeightGathers
from paci_rt.optim.shards_ahead import AheadCall, ShardsAhead
from paci_rt.optim.stage_optimizer import NamedParams, StageOptimizer
from paci_rt.optim.steps_native import Ahead, FlatStep
from paci_rt.optim.verdict import LARGEST
from paci_rt.transport.replicas import Pending, ReplicaGroup

OWNED_MESSAGE = (
    "the schedule owns the optimizer step: schedule.step() and schedule.drain() update every stage as soon as a window "
    "of micro-batches is complete, so remove the call of optimizer.step(). Learning-rate schedulers go to the "
    "schedule as lr_scheduler=..."
)


class FusedOptimizer(torch.optim.Optimizer):
    """What the native optimizers share: no step of their own, and state that survives ``load_state_dict`` in fp32."""

    fused_states: list[FusedState]
    shardable = True
    """Whether steps and state can be cut at any element, and shared out among replicas."""
    masks = True
    """Whether a step on a GPU can be told by a number in its memory to leave all as it is."""

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
        *,
        among: Sequence[int] | None = None,
        into: Tensor | None = None,
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
            among: only parameters at these positions; None is all.
            into: flat, of the parameters' dtype, has the weights and is put ahead in their place.

        Returns:
            Positions of the parameters that were put ahead.
        """
        moved = [at for at in state.movable(known) if among is None or at in among]
        step = state.step(grad_sum, divisor, moved, Ahead([known[position] for position in moved], repeats, kept))
        if into is not None:
            step["master" if state.master is None else "weight"] = into
        self.run(state, moved, step)
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
        shard_among: ReplicaGroup | None = None,
    ) -> None:
        super().__init__(grouped, frozen, buffers)
        self.optimizer: FusedOptimizer = optimizer
        groups: Sequence[FlatGroup] = self.groups
        if shard_among is not None:
            self.shards = Shards(self.groups, shard_among)
            self.order = WeightGathers(self._send_weights)
            groups = self.shards.groups
            for shard in self.shards.groups:
                for position, param in enumerate(shard.params):
                    if optimizer.state.get(param):
                        optimizer.state[param] = shard.cut(position, optimizer.state[param])
        self._states = [optimizer.make_state(owner, group) for owner, group in zip(owners, groups, strict=True)]
        optimizer.fused_states = self._states
        self._shards_ahead: ShardsAhead | None = None

    @property
    def masks(self) -> bool:
        return self.optimizer.masks and all(map(backend.uses_kernels, (group.device for group in self.groups)))

    def _scale(self, windows: dict[int, Window], factor: float | Tensor) -> None:
        native = not any(backend.uses_kernels(group.device) for group in self.groups)
        if not (self.masks if isinstance(factor, Tensor) else self.optimizer.masks and native):
            super()._scale(windows, factor)  # by kernels a number has to be in device memory
            return
        for state in self._states:
            state.clip = factor

    def _apply(self, windows: dict[int, Window], divisor: float) -> None:
        try:
            self._step(windows, divisor)
        finally:
            for state in self._states:
                state.clip = None

    def _step(self, windows: dict[int, Window], divisor: float) -> None:
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

    def _update(self, number: int, grad_sum: Tensor, positions: list[int], divisor: float) -> None:
        """Update the parameters at ``positions`` of flat group ``number``; the others keep weights and state."""
        state = self._states[number]
        if self.shards is not None:
            grad_sum = self.shards.groups[number].of(grad_sum)
        self.optimizer.run(state, positions, state.step(grad_sum, divisor, positions))
        state.count(positions)

    def _send_weights(self, bucket: int) -> Pending[None]:
        assert self.shards is not None
        return self.shards.send_weights(self._parts(bucket))

    def _parts(self, bucket: int) -> list[list[int] | None]:
        """Positions of a bucket in each flat group; None is all."""
        if self._buckets is None:
            return [None] * len(self.groups)
        return [self._buckets.part(bucket, number, range(len(one.params))) for number, one in enumerate(self.groups)]

    def state_by_name(self, *, copy: bool = True) -> dict[str, dict[str, Any]]:
        if self.shards is None:
            return super().state_by_name(copy=copy)
        found: dict[str, dict[str, Any]] = {}
        for number, (group, state) in enumerate(zip(self.groups, self._states, strict=True)):
            state.refresh_masters()
            flats = state.flat if state.master is None else {**state.flat, "master": state.master}
            whole = {key: self.shards.whole(number, flat) for key, flat in flats.items()}
            for position, name in enumerate(group.names):
                if not state.has_state(position):
                    found[name] = {}
                    continue
                numbers = {key: values[position].clone() for key, values in state.numbers.items()}
                found[name] = numbers | {key: group.view(flat, position).clone() for key, flat in whole.items()}
        return found

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

    def prepare_ahead(self) -> int:
        """Make ready for :meth:`ahead_together`; bytes of scratch buffers that it takes."""
        assert self.shards is not None
        self._shards_ahead = ShardsAhead(self.optimizer, self._states, self.shards)
        return self._shards_ahead.nbytes

    def ahead_together(
        self, divisor: float, repeats: int, kept: Sequence[Tensor], *, before: bool, wanted: bool
    ) -> list[list[int]]:
        """:meth:`ahead` for all flat groups where replicas share out the optimizer's state; all of them call this.

        When it returns a forward may begin: layers wait for their own weights, and :meth:`before_reading` for all.

        Args:
            kept: flat buffers of the groups' dtypes, which receive the weights as they were.
            wanted: False leaves this replica's weights as they are.
        """
        self.before_reading()
        assert self._shards_ahead is not None
        assert isinstance(self.order, WeightGathers)
        assert self.shards is not None
        for state, group, true in zip(self._states, self.groups, kept, strict=True):
            state.refresh_masters()
            if wanted:
                true.copy_(group.weight)
        sums = [accumulator.sums(before=before) for accumulator in self.accumulators]
        call = AheadCall(sums=sums, kept=kept, divisor=divisor, repeats=repeats, reduced=before, wanted=wanted)
        for bucket in range(1 if self._buckets is None else self._buckets.count):
            work = partial(self._shards_ahead.make, call, self._parts(bucket), first=bucket == 0)
            self.order.expect(bucket, self.shards.replicas.submit("looking ahead", work))
        self.before_forward()
        moved = [state.movable(known) for state, (_, known) in zip(self._states, sums, strict=True)]
        return moved if wanted else []

    def _copied_state(self, memory: Any) -> Any:
        return [state.copied(None if memory is None else memory[at]) for at, state in enumerate(self._states)]

    def _restore_state(self, state: Any) -> None:
        for own, kept in zip(self._states, state, strict=True):
            own.bring_back(kept)

    def _masters_bytes(self) -> int:
        return sum(state.master.nbytes for state in self._states if state.master is not None)

    def _optimizer_bytes(self) -> int:
        return sum(state.nbytes for state in self._states)

    def _state_of(self, number: int, position: int) -> dict[str, Any]:
        state = self._states[number]
        return state.views(position) if state.has_state(position) else {}

    def _check_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        self._states[number].check(position, self._own(number, position, entry))

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        self._states[number].adopt(position, self._own(number, position, entry))

    def _own(self, number: int, position: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The part of a parameter's state that this replica keeps."""
        return entry if self.shards is None else self.shards.groups[number].cut(position, entry)

    def unbind(self) -> None:
        self.optimizer.fused_states = []


def check_option(ok: bool, text: str) -> None:
    """Refuse an option of an optimizer.

    Raises:
        ValueError: not ``ok``; ``text`` names the option and its value.
    """
    if not ok:
        raise ValueError(text)


def _check_shared(*, lr: float | Tensor, weight_decay: float, **others: Any) -> None:
    """Refuse values of the options that several optimizers have."""
    check_option(0 <= float(lr) <= LARGEST, f"lr={lr}: the learning rate must be finite and not negative")
    betas, eps = others.get("betas", ()), others.get("eps", 0.0)
    check_option(all(0 <= beta < 1 for beta in betas), f"betas={betas}: both must lie in [0, 1)")
    check_option(0 <= eps < math.inf, f"eps={eps}: must be finite and not negative")
    check_option(0 <= weight_decay < math.inf, f"weight_decay={weight_decay}: must be finite and not negative")
