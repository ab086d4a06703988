"""A weight that lives on two stages, such as GPT-2's token embedding and output head.

The owner keeps the optimizer state. In every window the reader, which is the last stage, sends the sum of its
gradients and later takes over the updated weight, at the places that :mod:`paci_rt.schedules.lowering` fixed. Where the
weight is frozen, on both stages, the messages are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.backend import make_accumulator
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.stage_optimizer import GradSink, StageOptimizer
from paci_rt.schedules.lowering import TiedWeight


class TiedExchange(GradSink):
    """One stage's side of all its tied weights.

    Args:
        ties: all tied weights of the pipeline, in the same order on every stage.
        stage: this stage's index.
        named_params: the stage's parameters.

    Raises:
        ValueError: a name in ``ties`` is no parameter of this stage.
    """

    def __init__(self, ties: tuple[TiedWeight, ...], stage: int, named_params: Mapping[str, nn.Parameter]) -> None:
        self._owned: dict[int, nn.Parameter] = {}
        self._read: dict[int, nn.Parameter] = {}
        self._accumulators: dict[nn.Parameter, GradAccumulator] = {}
        for number, tie in enumerate(ties):
            for at, name, params in (
                (tie.owner_stage, tie.owner, self._owned),
                (tie.reader_stage, tie.reader, self._read),
            ):
                if at == stage:
                    if name not in named_params:
                        raise ValueError(f"tied weight {name!r} is no parameter of stage {stage}: check its name")
                    params[number] = named_params[name]
        self._ties = ties
        for number, param in self._read.items():
            if param.requires_grad:
                group = FlatGroup([(ties[number].reader, param)])
                self._accumulators[param] = make_accumulator(group, 1)
        self._bound: StageOptimizer | None = None

    @property
    def read_params(self) -> set[nn.Parameter]:
        """Parameters that follow another stage's and therefore have no optimizer state here."""
        return set(self._read.values())

    @property
    def owns(self) -> bool:
        """Whether gradients of another stage enter sums of this one."""
        return bool(self._owned)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights that follow another stage's, and of the sums of their gradients."""
        return {
            "weights": sum(param.nbytes for param in self._read.values()),
            "accumulators": sum(accumulator.nbytes for accumulator in self._accumulators.values()),
        }

    def bind(self, bound: StageOptimizer) -> None:
        """The optimizer of the stage's own parameters."""
        self._bound = bound

    @property
    def bound(self) -> StageOptimizer:
        """What :meth:`bind` was given."""
        assert self._bound is not None
        return self._bound

    def place(self, param: nn.Parameter) -> tuple[GradAccumulator, int]:
        """The reader's own accumulator, or the optimizer's."""
        accumulator = self._accumulators.get(param)
        return (accumulator, 0) if accumulator is not None else self.bound.place(param)

    def flush(self) -> None:
        for accumulator in self._accumulators.values():
            accumulator.flush()
        self.bound.flush()

    def before_layer(self, param: nn.Parameter) -> None:
        self.bound.before_layer(param)

    def set_layer_order(self, layers: Sequence[Sequence[nn.Parameter]]) -> None:
        own = [params for params in layers if not any(param in self._accumulators for param in params)]
        self.bound.set_layer_order(own)

    def gradient(self, tie: int) -> Tensor:
        """Reader: the fp32 sum of this window, until the first gradient of the next one; the accumulator is empty
        again."""
        accumulator = self._accumulators.get(self._read[tie])
        if accumulator is None:
            return self._read[tie].new_empty(0, dtype=torch.float32)
        accumulator.seal()
        accumulator.consume()
        total = accumulator.sealed_view(0)
        accumulator.release()
        return total

    def nonfinite(self) -> bool:
        """Reader: whether a sum of this window, which has not been sent yet, has NaN or infinite elements."""
        fronts = [one.front_flat for one in self._accumulators.values() if one.front_flat.numel() > 0]
        # By no mask of all elements: that would take as much memory as the sums once more.
        return any(not bool(torch.stack(torch.aminmax(front)).isfinite().all()) for front in fronts)

    def add_gradient(self, tie: int, gradient: Tensor) -> None:
        """Owner: one more term of this window's sum."""
        param = self._owned[tie]
        if param.requires_grad != (gradient.numel() > 0):
            one, other = ("trained", "frozen") if param.requires_grad else ("frozen", "trained")
            own = self._ties[tie]
            raise ValueError(
                f"tied weight {own.owner!r} of stage {own.owner_stage} is {one} and its copy {own.reader!r} on stage "
                f"{own.reader_stage} is {other}: freeze both, or none"
            )
        if param.requires_grad:
            self.bound.accumulate(param, gradient)

    def weight(self, tie: int) -> Tensor:
        """Owner: the weight, until the next update."""
        self.bound.before_reading()
        weight = self._owned[tie].detach()
        return weight if self._owned[tie].requires_grad else weight.new_empty(0)

    def take_weight(self, tie: int, weight: Tensor) -> None:
        """Reader: follow the owner; the version counter stays, as for every update of the schedule's own."""
        param = self._read[tie]
        if not weight.numel():  # it is frozen
            return
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(param):
            param.copy_(weight)


def declared_ties(modules: Iterable[object], given: Sequence[TiedWeight]) -> Sequence[TiedWeight]:
    """What a schedule was given; else what its modules say in an attribute ``tied_weights``."""
    if given:
        return given
    for module in modules:
        own = getattr(getattr(module, "_orig_mod", module), "tied_weights", None)
        if isinstance(own, tuple) and own and all(isinstance(one, TiedWeight) for one in own):
            return own
    return given
