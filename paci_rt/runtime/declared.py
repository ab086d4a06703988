"""What the user said about a stage's tensors, compared once with what comes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paci_rt.errors import StageError
from paci_rt.runtime.trees import tensors

Example = Tensor | tuple[Tensor | None, ...] | list[Tensor | None] | None
"""A tensor, a tuple of tensors, or None for what was not said."""


class Declared:
    """Shapes and dtypes that the examples given to a stage's constructor have.

    Args:
        stage_index: for error messages.
        input_args, output_args: of one micro-batch; tensors of any device, ``meta`` too.
        output_grads, input_grads: their gradients, None where there is none.

    Raises:
        StageError: an example is no tensor.
        ValueError: a gradient has another shape than the tensor that it is of.
    """

    def __init__(
        self, stage_index: int, input_args: Example, output_args: Example, output_grads: Example, input_grads: Example
    ) -> None:
        self._stage_index = stage_index
        self._inputs = _normalized("input_args", input_args)
        self._outputs = _normalized("output_args", output_args)
        for name, gradients, values in (
            ("output_grads", _normalized("output_grads", output_grads, absent=True), self._outputs),
            ("input_grads", _normalized("input_grads", input_grads, absent=True), self._inputs),
        ):
            if gradients is None or values is None:
                continue
            if len(gradients) != len(values) or any(
                grad is not None and value is not None and grad.shape != value.shape
                for grad, value in zip(gradients, values, strict=True)
            ):
                shapes = [None if grad is None else tuple(grad.shape) for grad in gradients]
                raise ValueError(
                    f"{name} has the shapes {shapes}: give one for each tensor, of its shape, or leave it out"
                )
        self.pending = self._inputs is not None or self._outputs is not None

    def check(self, args: tuple[Any, ...], output: Any) -> None:
        """Compare the first micro-batch with the examples; later ones may be of other sizes.

        Raises:
            StageError: another number of tensors, another shape or dtype; the message says which.
        """
        self.pending = False
        for name, what, said, came in (
            ("input_args", "was given", self._inputs, args),
            ("output_args", "returned", self._outputs, output),
        ):
            if said is None:
                continue
            found = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors(came)]
            expected = [(tuple(tensor.shape), tensor.dtype) for tensor in said if tensor is not None]
            if found != expected:
                raise StageError(
                    f"stage {self._stage_index} {what} {_text(found)}, and {name} says {_text(expected)}: give an "
                    f"example of one micro-batch as {name}, or leave it out"
                )


def _normalized(name: str, given: Example, *, absent: bool = False) -> tuple[Tensor | None, ...] | None:
    if given is None:
        return None
    listed = (given,) if isinstance(given, Tensor) else given
    if not isinstance(listed, (tuple, list)):
        raise StageError(f"{name} is a {type(given).__name__}: give a tensor or a tuple of tensors, or leave it out")
    for at, one in enumerate(listed):
        if not isinstance(one, Tensor) and not (absent and one is None):
            raise StageError(f"{name}[{at}] is a {type(one).__name__}: give a tensor, or leave {name} out")
    return tuple(listed)


def _text(looks: list[Any]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in looks) or "no tensor"
