"""One stage: a slice of the model, its forwards and backwards, and what it keeps between the two."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from paci_rt.errors import StageError
from paci_rt.saved import saved_bytes
from paci_rt.transport.base import Message

# Since torch 2.7 or so a backward can start from a gradient edge, which keeps the graph but not the output's memory.
_EDGES_AS_ROOTS = "GradientEdge" in str(inspect.signature(torch.autograd.backward))

LossFn = Callable[..., Tensor]


@dataclass(slots=True)
class _InFlight:
    """What one micro-batch leaves behind between its forward and its backward."""

    inputs: tuple[Tensor, ...]
    roots: tuple[Any, ...]
    which: tuple[int, ...]  # positions of the outputs that the roots belong to
    is_loss: bool
    saved_bytes: int


class PipelineStage:
    """One module slice at one place of the pipeline; torch's constructor order.

    Args:
        submodule: the slice. It takes what the previous stage returns (the first stage: the arguments of ``step``)
            and returns a tensor or a tuple of tensors.
        stage_index: 0 ... ``num_stages - 1``.
        num_stages: stages of the whole pipeline.
        device: where the stage runs; the module is moved there. The native core of this version runs on ``"cpu"``.
        input_args, output_args: accepted because torch's constructor has them; shapes are discovered as
            micro-batches travel and may change from one to the next, so they are not needed.
        group: process group whose rank ``i`` runs stage ``i``; None is the default group.

    Raises:
        ValueError: index or count out of range, or a device that this version cannot use.
        StageError: ``submodule`` is no ``torch.nn.Module``.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device | str = "cpu",
        input_args: Any = None,
        output_args: Any = None,
        *,
        group: Any = None,
    ) -> None:
        if not isinstance(submodule, nn.Module):
            raise StageError(f"submodule is a {type(submodule).__name__}: give a torch.nn.Module")
        if not 0 <= stage_index < num_stages:
            raise ValueError(f"stage_index is {stage_index} of num_stages {num_stages}: give 0 to {num_stages - 1}")
        self.device = torch.device(device)
        if self.device.type != "cpu":
            raise ValueError(f"device is {str(device)!r}: this version runs stages on 'cpu' only")
        self.submod = submodule.to(self.device)
        self.stage_index = stage_index
        self.num_stages = num_stages
        self.group = group
        self._in_flight: dict[int, _InFlight] = {}
        self._saved_bytes: dict[Any, int] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._in_backward = False

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters, for an optimizer."""
        return self.submod.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's parameters under their names in the module."""
        return self.submod.named_parameters()

    # --- gradients leave autograd the moment they are complete ---

    def require_free(self) -> None:
        """Make sure that no schedule has the stage.

        Raises:
            StageError: the stage already belongs to a schedule.
        """
        if self._hooks:
            raise StageError(f"stage {self.stage_index} already belongs to a schedule: call close() on that one first")

    def attach(self, accumulate: Callable[[nn.Parameter, Tensor], None]) -> None:
        """Hand every parameter's gradient to ``accumulate`` as soon as a backward has completed it."""
        self.require_free()

        def take(param: Tensor) -> None:
            if self._in_backward and param.grad is not None:
                grad, param.grad = param.grad, None
                accumulate(param, grad)  # type: ignore[arg-type]

        for param in self.parameters():
            if param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(take))

    def detach(self) -> None:
        """Leave gradients in ``.grad`` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # --- computing ---

    def forward(
        self,
        micro_batch: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor] | None = None,
    ) -> tuple[Message | None, Any, Tensor | None]:
        """Run the slice, and on the last stage the loss, and keep what the backward will need.

        Returns:
            The message for the next stage (None on the last), the module's output detached, and the detached loss.
        """
        with torch.enable_grad():
            output, loss_value = self._compute(args, kwargs, loss)
        outputs = self._as_tuple(output) if not self.is_last else ()
        inputs = tuple(arg for arg in args if isinstance(arg, Tensor)) if not self.is_first else ()
        differentiable = outputs if loss_value is None else (loss_value,)
        which = tuple(at for at, tensor in enumerate(differentiable) if tensor.requires_grad)
        roots = tuple(self._root(differentiable[at]) for at in which)
        key = _signature(args, kwargs)
        if key not in self._saved_bytes:
            self._saved_bytes[key] = saved_bytes(differentiable, inputs, self.parameters())
        self._in_flight[micro_batch] = _InFlight(inputs, roots, which, self.is_last, self._saved_bytes[key])
        message = None if self.is_last else _message(outputs)
        return message, _detached(output), None if loss_value is None else loss_value.detach()

    def evaluate(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None
    ) -> tuple[Message | None, Any, Tensor | None]:
        """A forward that keeps nothing; otherwise as :meth:`forward`."""
        with torch.no_grad():
            output, loss_value = self._compute(args, kwargs, loss)
        message = None if self.is_last else _message(self._as_tuple(output))
        return message, _detached(output), loss_value

    def backward(self, micro_batch: int, gradients: tuple[Tensor | None, ...]) -> Message:
        """Backward of one micro-batch; parameter gradients go where :meth:`attach` said.

        Args:
            micro_batch: one whose forward has run.
            gradients: one for each output, None where the next stage had none; ignored on the last stage.

        Returns:
            The gradients of the stage's inputs, None for inputs that need none.
        """
        saved = self._in_flight.pop(micro_batch)
        if saved.is_loss:
            roots, grads = saved.roots, tuple(None for _ in saved.roots)
        else:
            pairs = [
                (root, gradients[at])
                for root, at in zip(saved.roots, saved.which, strict=True)
                if gradients[at] is not None
            ]
            roots, grads = tuple(root for root, _ in pairs), tuple(grad for _, grad in pairs)  # type: ignore[misc]
        if roots:
            self._in_backward = True
            try:
                torch.autograd.backward(roots, grads)
            finally:
                self._in_backward = False
        return Message(
            tuple(None if tensor.grad is None else tensor.grad.contiguous() for tensor in saved.inputs),
            tuple(False for _ in saved.inputs),
        )

    def saved_bytes(self, micro_batch: int) -> int:
        """Bytes of activations that ``micro_batch`` keeps alive until its backward, measured on the first forward
        of its shape: every distinct storage that autograd saved except parameters, and the stage's inputs."""
        return self._in_flight[micro_batch].saved_bytes

    def forget(self) -> None:
        """Drop every micro-batch in flight, after a failure."""
        self._in_flight.clear()

    def _compute(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> tuple[Any, Tensor | None]:
        output = self.submod(*args, **kwargs)
        if loss is None:
            return output, None
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StageError(f"loss_fn returned a {got}: it must return a scalar tensor, for example by .mean()")
        return output, value

    def _as_tuple(self, output: Any) -> tuple[Tensor, ...]:
        outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        for at, tensor in enumerate(outputs):
            if not isinstance(tensor, Tensor):
                raise StageError(
                    f"stage {self.stage_index} returned a {type(tensor).__name__} at position {at}: a stage returns "
                    "a tensor or a tuple of tensors, since that is what travels to the next stage"
                )
        return outputs

    @staticmethod
    def _root(tensor: Tensor) -> Any:
        # An edge holds the graph without the output, whose memory is free once it has been sent.
        return get_gradient_edge(tensor) if _EDGES_AS_ROOTS else tensor


def _message(outputs: tuple[Tensor, ...]) -> Message:
    return Message(
        tuple(tensor.detach().contiguous() for tensor in outputs),
        tuple(tensor.requires_grad for tensor in outputs),
    )


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, (tuple, list)):
        return type(output)(_detached(item) for item in output)
    if isinstance(output, dict):
        return {key: _detached(item) for key, item in output.items()}
    return output


def _signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    return tuple(
        (tuple(value.shape), value.dtype, value.requires_grad) if isinstance(value, Tensor) else type(value)
        for value in values
    )
