"""An optimizer as a stage drives it: gradients go in one by one, whole windows come out as updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.optim.accumulator import GradAccumulator, Window
from paci_rt.optim.backend import make_accumulator, update_order
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.replicas import ReplicaSums
from paci_rt.optim.shards import Shards, WeightGathers
from paci_rt.optim.take_back import UpdateHistory
from paci_rt.optim.update_stream import Buckets, UpdateStream
from paci_rt.optim.verdict import AS_IT_IS, Sealed, Verdict, require_finite


class GradSink(ABC):
    """What a stage hands its gradients to, and asks before it reads its weights.

    Attributes:
        backward_bytes: what a backward takes at a time, beside what its forward has saved.
    """

    backward_bytes = 0

    @abstractmethod
    def place(self, param: nn.Parameter) -> tuple[GradAccumulator, int]:
        """The accumulator of a parameter's gradient, and its position there.

        Raises:
            ValueError: it has none.
        """

    def accumulate(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add one gradient to the window's sum.

        Raises:
            ValueError: the parameter has no accumulator, or the gradient is sparse, of a wrong shape or dtype.
        """
        accumulator, position = self.place(param)
        accumulator.add(position, grad)

    def accumulate_product(self, weight: nn.Parameter, left: Tensor, right: Tensor, bias: nn.Parameter | None) -> None:
        """Add ``left @ right`` to the window's sum of ``weight``, and the row sums of ``left`` to that of ``bias``."""
        accumulator, position = self.place(weight)
        accumulator.add_product(position, left, right, None if bias is None else self.place(bias))

    @abstractmethod
    def flush(self) -> None:
        """A backward, or half of one, is over: issue what was put off in it."""

    @abstractmethod
    def before_layer(self, param: nn.Parameter) -> None:
        """A layer is about to read its weight ``param``."""

    @abstractmethod
    def set_layer_order(self, layers: Sequence[Sequence[nn.Parameter]]) -> None:
        """Parameters of the layers that say so before they read them, in the order in which a forward does."""


NamedParams = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What an update saw. On a GPU these are fp64 tensors of one element, whose values nobody has waited for yet.

    Attributes:
        grad_norm: 2-norm of this stage's mean gradient.
        nonfinite: infinite and NaN elements in it.
    """

    grad_norm: float | Tensor
    nonfinite: int | Tensor


def _multiply(windows: dict[int, Window], factor: float | Tensor) -> None:
    for window in windows.values():
        window.sums.mul_(factor)


class StageOptimizer(GradSink):
    """An optimizer tied to one stage's flat parameters and accumulators. Made by :func:`bind_optimizer`.

    Attributes:
        groups: flat groups, one for each optimizer group and dtype.
        accumulators: one for each of them.
        optimizer: the user's optimizer, None without one.
        order: who waits for updates, on a GPU; None on the CPU, where nobody has to.
        history: updates that may have to be taken back; None where none ever has.
        replicas: sums over the replicas of the stage; None where there are none.
        shards: the parts of optimizer state that replicas have; None where each has all of it.
        learned: parts in which updates can be waited for, by this stage's layers; None where they cannot.
    """

    optimizer: torch.optim.Optimizer | None = None

    def __init__(self, grouped: Sequence[NamedParams], frozen: Iterable[Tensor], buffers: int) -> None:
        self.groups = [FlatGroup(named) for named in grouped]
        self.accumulators = [make_accumulator(group, buffers) for group in self.groups]
        self._frozen_bytes = sum(tensor.nbytes for tensor in frozen)
        self._home = {
            id(param): (number, position)
            for number, group in enumerate(self.groups)
            for position, param in enumerate(group.params)
        }
        self.order: UpdateStream | WeightGathers | None = update_order(self.groups[0].device if self.groups else None)
        self.history: UpdateHistory | None = None
        self.replicas: ReplicaSums | None = None
        self.shards: Shards | None = None
        self.learned: Buckets | None = None
        self._buckets: Buckets | None = None
        self._sealed: Sealed | None = None

    @property
    def masks(self) -> bool:
        """Whether an update can be told on the device, by a ``factor`` of NaN, to leave all as it is."""
        return False

    def compute_products_by(self, wgrad: Callable[..., None] | None) -> None:
        """What weight gradients are computed by on a GPU; None is the default route."""
        if wgrad is not None:
            for accumulator in self.accumulators:
                accumulator.product_by = wgrad

    def place(self, param: nn.Parameter) -> tuple[GradAccumulator, int]:
        home = self._home.get(id(param))
        if home is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not among the {len(self._home)} that this stage's "
                "optimizer was bound to"
            )
        return self.accumulators[home[0]], home[1]

    def flush(self) -> None:
        for accumulator in self.accumulators:
            accumulator.flush()

    # --- what a forward or backward has to wait for; nothing on the CPU ---

    def set_layer_order(self, layers: Sequence[Sequence[nn.Parameter]]) -> None:
        """Update in parts from now on, in this order of layers, which wait for their own part; without any, a forward
        waits for the whole update."""
        if self.order is None:
            return
        self.learned = Buckets(self._home, layers, len(self.groups)) if layers else None
        if self.shards is None:  # else what travels in parts has to be agreed on, in seal_window
            self._set_buckets(self.learned)

    def _set_buckets(self, buckets: Buckets | None) -> None:
        if self.order is not None and buckets is not self._buckets:
            self._buckets = buckets
            self.order.set_buckets(1 if buckets is None else buckets.count)

    @property
    def _waits_by_layer(self) -> bool:
        """Whether a forward waits layer by layer; not while its layers are others than those agreed on."""
        return self._buckets is not None and self._buckets is self.learned

    def before_forward(self, *, whole: bool = False) -> None:
        """A forward is about to run; ``whole``: it reads weights in another way than by its layers."""
        if whole or not self._waits_by_layer:
            self.before_reading()
        elif self.order is not None:
            self.order.wait(0)

    def before_layer(self, param: nn.Parameter) -> None:
        if self.order is not None and self._buckets is not None:
            self.order.wait(self._buckets.of_param.get(id(param), 0))

    def before_reading(self) -> None:
        """Something is about to run that reads any weight, or optimizer state."""
        if self.order is not None:
            self.order.wait_all()

    def seal_window(self) -> Sealed:
        """End the window, ahead of :meth:`update` where something must be known of its sums.

        Raises:
            StageError: a parameter was moved off its flat buffer.
        """
        if self._sealed is None and self.replicas is not None:
            self._sealed = self.replicas.finish()
            if self.shards is not None:
                self._set_buckets(self.replicas.buckets)
        if self._sealed is None:
            for group in self.groups:
                group.check_views()
            live = [number for number, accumulator in enumerate(self.accumulators) if accumulator.end_window()]
            squares, nonfinite = 0.0, 0
            for number in live:
                square, count = self.accumulators[number].measured()
                squares, nonfinite = squares + square, nonfinite + count
            self._sealed = Sealed(live, squares, nonfinite)
        return self._sealed

    def sealed_sums(self) -> list[tuple[int, int, Tensor]]:
        """Of a sealed window the sum of each parameter that has one: flat group, position, a view of the sum."""
        return [
            (number, position, view)
            for number in self.seal_window().live
            for position, view in self.accumulators[number].sealed_views()
        ]

    def update(
        self,
        divisor: float,
        prepare: Callable[[], None] = lambda: None,
        *,
        decide: Callable[[Sealed], Verdict | None] = lambda _: AS_IT_IS,
    ) -> UpdateStats:
        """End the window: seal the sums, apply ``sum / divisor``, and leave the accumulators empty.

        Parameters without a gradient in the window are left alone, as torch does with a ``grad`` of None.

        Args:
            divisor: what the sums are divided by.
            prepare: called before any weight is written, where it may write them too.
            decide: what becomes of the window; None drops it: weights and optimizer state stay as they are.

        Raises:
            ValueError: ``divisor`` is below 1, or an option of the optimizer is not finite.
            StageError: a parameter was moved off its flat buffer.
        """
        if divisor < 1:
            raise ValueError(f"divisor={divisor}: gradients are divided by a number of micro-batches, at least 1")
        if self.optimizer is not None:
            require_finite(self.optimizer.param_groups)
        sealed = self.seal_window()
        verdict = decide(sealed)
        self._sealed = None
        if self.replicas is not None:
            self.replicas.forget()
        with nullcontext() if self.order is None else self.order.updating():
            prepare()
            windows = {number: self.accumulators[number].consume() for number in sealed.live}
            try:
                if verdict is None:
                    for window in windows.values():
                        window.sums.zero_()  # nothing may find what is not finite there later
                    self._publish_all()
                else:
                    self._take(windows, divisor if verdict.divisor is None else verdict.divisor, verdict)
            finally:
                for number in sealed.live:
                    self.accumulators[number].release()
                    if verdict is None:
                        self.accumulators[number].forget()
        return UpdateStats(grad_norm=sealed.squares**0.5 / divisor, nonfinite=sealed.nonfinite)

    def _take(self, windows: dict[int, Window], divisor: float, verdict: Verdict) -> None:
        kept = self.history is not None and verdict.window is not None
        if isinstance(verdict.factor, Tensor) or verdict.factor != 1.0:
            (_multiply if kept else self._scale)(windows, verdict.factor)
        if self.history is not None and verdict.window is not None:
            self.history.keep(verdict.window, windows, divisor)
        self._apply(windows, divisor)

    def _scale(self, windows: dict[int, Window], factor: float | Tensor) -> None:
        """Have the update that comes now take its sums times ``factor``."""
        _multiply(windows, factor)

    def apply(self, windows: dict[int, Window], divisor: float) -> None:
        """Update once more from sums that were kept."""
        self._apply(windows, divisor)

    @torch.no_grad()
    def snapshot(self, memory: Any = None) -> Any:
        """Copies of weights, masters and optimizer state, in the ``memory`` of an earlier one if that is given."""
        weights = [group.weight for group in self.groups]
        if memory is None:
            return [weight.clone() for weight in weights], self._copied_state(None)
        for kept, weight in zip(memory[0], weights, strict=True):
            kept.copy_(weight)
        return memory[0], self._copied_state(memory[1])

    @torch.no_grad()
    def restore(self, snapshot: Any) -> None:
        """Bring back what :meth:`snapshot` has copied; version counters stand still, as for an update."""
        weights, state = snapshot
        self.before_reading()
        for group, weight in zip(self.groups, weights, strict=True):
            group.weight.copy_(weight)
        self._restore_state(state)
        for accumulator in self.accumulators:
            accumulator.forget()

    def _copied_state(self, memory: Any) -> Any:
        """Copies of all that an update changes besides the weights."""

    def _restore_state(self, state: Any) -> None:
        """Bring that back."""

    def _publish_all(self) -> None:
        for bucket in range(1 if self._buckets is None else self._buckets.count):
            self._publish(bucket)

    def _publish(self, bucket: int) -> None:
        if self.order is not None:
            self.order.publish(bucket)

    @abstractmethod
    def _apply(self, windows: dict[int, Window], divisor: float) -> None:
        """Update from what is being consumed of each flat group, by its number, and publish every bucket."""

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

    def check_state_by_name(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Make sure that :meth:`load_state_by_name` can take ``states``.

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
                self._check_state_of(number, position, dict(states[name]))

    def load_state_by_name(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what :meth:`state_by_name` returned, perhaps from a stage cut differently.

        Raises:
            ValueError: as :meth:`check_state_by_name`; nothing has been changed then.
        """
        self.check_state_by_name(states)
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

    def _check_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        if entry:
            raise ValueError(
                f"optimizer state for {self.groups[number].names[position]!r} was given, but the schedule has no "
                "optimizer: load it into your own"
            )

    def _load_state_of(self, number: int, position: int, entry: dict[str, Any]) -> None:
        """Take over an entry that was checked."""

    @abstractmethod
    def unbind(self) -> None:
        """Give the optimizer back to the user. Parameters stay views of their flat buffer, which does no harm."""
