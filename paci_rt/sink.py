"""Where the gradients of a stage's parameters go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from paci_rt.accumulator import GradAccumulator


class GradSink(ABC):
    """What a stage hands its gradients to, and asks before it reads its weights."""

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
