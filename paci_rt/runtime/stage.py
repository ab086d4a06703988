"""One stage: a slice of the model, its forwards and backwards, and what it keeps between the two."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from paci_rt.errors import StageError
from paci_rt.optim.backend import usable
from paci_rt.optim.stage_optimizer import GradSink
from paci_rt.runtime.activation_bytes import distinct_bytes, saved_bytes, shares_of
from paci_rt.runtime.declared import Declared, Example
from paci_rt.runtime.outgoing import forward_message
from paci_rt.runtime.split_backward import SplitLayer, WeightGradient, WeightGradients
from paci_rt.runtime.trees import detached, tensors
from paci_rt.transport.base import Message
from paci_rt.transport.structure import take_apart

# In newer versions of torch a backward can start from a gradient edge, which keeps the graph but not the output's
# memory. Without the token, which is newer still, an edge does not keep the node of a Python function, such as a split
# layer's.
_EDGES_AS_ROOTS = (
    "GradientEdge" in str(inspect.signature(torch.autograd.backward)) and "ownership_token" in GradientEdge._fields
)


LossFn = Callable[..., Tensor]


@dataclass(slots=True)
class _Graph:
    """Where a backward starts."""

    roots: tuple[Any, ...]
    which: tuple[int, ...]  # positions of the outputs that the roots belong to
    used: list[SplitLayer]  # linear layers, in the order of their uses


@dataclass(slots=True)
class _Again:
    """What it takes to run a forward once more."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Tensor] | None
    rng_states: tuple[Tensor, ...]


@dataclass(slots=True)
class InFlight:
    """What one micro-batch leaves behind between its forward and its backward.

    Attributes:
        kept_bytes, full_bytes: of activations that stay alive until the backward, and in it; see
            :meth:`PipelineStage.kept_bytes`.
        shares: of the caller's batch, by storage.
    """

    inputs: tuple[Tensor, ...]
    held: _Graph | _Again
    kept_bytes: int
    full_bytes: int
    shares: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the first forward of a signature has shown."""

    saved_bytes: int
    requires_grad: tuple[bool, ...]  # of the outputs


class PipelineStage:
    """One module slice at one place of the pipeline; torch's constructor order.

    Args:
        submodule: the slice. It takes what the previous stage returns (the first stage: the arguments of ``step``):
            the items of a tuple or list as arguments, anything else as one. It returns tensors, or containers that
            ``torch.utils._pytree`` knows of tensors and constants; the last stage returns whatever ``loss_fn`` takes.
        stage_index: 0 ... ``num_stages - 1``.
        num_stages: stages of the whole pipeline.
        device: where the stage runs, ``"cpu"`` or a CUDA device; the module is moved there.
        input_args, output_args: examples of what one micro-batch brings and leaves, compared with the first one. They
            are not needed: shapes are found as micro-batches travel and may change from one to the next.
        output_grads, input_grads: their gradients; only compared with those.
        group: process group whose rank ``i`` runs stage ``i``; None is the default group.
        dw_builder, get_mesh: must stay None: weight gradients are computed here, and DTensors do not travel.
        stream: on a GPU the stream that forwards and backwards run on, a ``torch.cuda.Stream``; None is the one that is
            current when a step is called. Several stages on one GPU overlap only on streams of their own.
        update_stream: likewise the one that updates run on; None is a new one.
        wgrad: on a GPU what computes weight gradients, a :class:`paci_rt.kernels.WgradRoutes` for the fastest route of
            each shape. Routes differ in their last bits, so the default is one that does not depend on measurements.

    Raises:
        ValueError: index or count out of range, a device that cannot be used, or an argument that must stay None; the
            reason is in the message.
        TritonMissingError: a CUDA device without Triton.
        StageError: ``submodule`` is no ``torch.nn.Module``, or an example is no tensor.

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=1, num_stages=2)
        >>> stage.is_first, stage.is_last, [name for name, _ in stage.named_parameters()]
        (False, True, ['weight', 'bias'])
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device | str = "cpu",
        input_args: Example = None,
        output_args: Example = None,
        output_grads: Example = None,
        input_grads: Example = None,
        group: Any = None,
        dw_builder: None = None,
        get_mesh: None = None,
        *,
        stream: torch.cuda.Stream | None = None,
        update_stream: torch.cuda.Stream | None = None,
        wgrad: Callable[..., None] | None = None,
    ) -> None:
        if not isinstance(submodule, nn.Module):
            raise StageError(f"submodule is a {type(submodule).__name__}: give a torch.nn.Module")
        if not 0 <= stage_index < num_stages:
            raise ValueError(f"stage_index is {stage_index} of num_stages {num_stages}: give 0 to {num_stages - 1}")
        self.device = usable(torch.device(device))
        for name, given in (("stream", stream), ("update_stream", update_stream), ("wgrad", wgrad)):
            if given is not None and self.device.type == "cpu":
                raise ValueError(f"{name} was given for a stage on the CPU, where it means nothing: leave it out")
        self.stream, self.update_stream, self.wgrad = stream, update_stream, wgrad
        self.submod = submodule.to(self.device)
        self.stage_index = stage_index
        self.num_stages = num_stages
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.group = group
        if dw_builder is not None:
            raise ValueError("dw_builder was given: the stage computes weight gradients by itself, so leave it out")
        if get_mesh is not None:
            raise ValueError("get_mesh was given: DTensors do not travel between stages, so leave it out")
        self.has_backward = False
        self._declared = Declared(stage_index, input_args, output_args, output_grads, input_grads)
        self.in_flight: dict[int, InFlight] = {}
        self._pending: dict[int, tuple[list[WeightGradient], dict[int, int]]] = {}
        self._known: dict[Any, _Known] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._gradients: WeightGradients | None = None

    @property
    def group_rank(self) -> int:
        """This process's rank in ``group``; 0 without a process group."""
        return dist.get_rank(self.group) if dist.is_available() and dist.is_initialized() else 0

    @property
    def group_size(self) -> int:
        """Processes of ``group``; 1 without a process group."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

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

    def attach(self, sink: GradSink) -> None:
        """Hand every parameter's gradient to ``sink`` as soon as a backward has completed it, and split the backward
        of linear layers (see :mod:`paci_rt.runtime.split_backward`)."""
        self.require_free()
        gradients = self._gradients = WeightGradients(self.submod, sink)

        def take(param: Tensor) -> None:
            if gradients.collecting and param.grad is not None:
                grad, param.grad = param.grad, None
                sink.accumulate(param, grad)  # type: ignore[arg-type]

        for param in self.parameters():
            if param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(take))

    def detach(self) -> None:
        """Leave gradients in ``.grad`` again, and the layers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None

    @property
    def split_layers(self) -> list[str]:
        """Names of the linear layers whose weight gradients are computed by themselves, while a schedule has the
        stage; the gradients of all other parameters come with the input's."""
        return [] if self._gradients is None else self._gradients.names

    # --- computing ---

    def forward(
        self,
        micro_batch: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor] | None = None,
        *,
        recompute: bool = False,
    ) -> tuple[Message | None, Any, Tensor | None]:
        """Run the slice, and on the last stage the loss, and keep what the backward will need.

        Args:
            micro_batch: its number.
            args, kwargs: of the module.
            loss: from the output to a scalar, on the last stage.
            recompute: keep the arguments only; the backward runs the forward again, with the same random numbers.

        Returns:
            The message for the next stage (None on the last), the module's output detached, and the detached loss.
        """
        inputs = () if self.is_first else tuple(tensors(args))
        key = _signature(args, kwargs)
        shares = shares_of(tensors((*(args if self.is_first else ()), *kwargs.values())))
        again = _Again(args, kwargs, loss, self._rng_states()) if recompute else None
        if again is not None and key in self._known:
            with torch.no_grad():
                output, loss_value = self._compute(args, kwargs, loss)
            outputs = self._differentiable(output, loss_value)
        else:
            outputs, output, loss_value, used = self._build_graph(args, kwargs, loss)
            if key not in self._known:
                size = saved_bytes(outputs, inputs, self.parameters(), shares)
                self._known[key] = _Known(size, tuple(tensor.requires_grad for tensor in outputs))
                if self._gradients is not None:
                    self._gradients.learn_order(outputs, used)
            graph = self._graph(outputs, used)
        known = self._known[key]
        held = graph if again is None else again
        kept = known.saved_bytes if again is None else distinct_bytes(tensors((*args, *kwargs.values())), shares=shares)
        self.in_flight[micro_batch] = InFlight(inputs, held, kept, known.saved_bytes, shares)
        message = None if self.is_last else forward_message(output, self.stage_index, known.requires_grad)
        return message, detached(output), None if loss_value is None else loss_value.detach()

    def _build_graph(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> tuple[tuple[Tensor, ...], Any, Tensor | None, list[SplitLayer]]:
        """A forward with autograd: what gradients start from, output, loss, and the layers that were used."""
        counting: AbstractContextManager[list[SplitLayer]] = nullcontext([])
        if self._gradients is not None:
            counting = self._gradients.forward()
        with torch.enable_grad(), counting as used:
            output, loss_value = self._compute(args, kwargs, loss)
        return self._differentiable(output, loss_value), output, loss_value, used

    def _differentiable(self, output: Any, loss_value: Tensor | None) -> tuple[Tensor, ...]:
        if loss_value is not None:
            return (loss_value,)
        return () if self.is_last else take_apart(output, self.stage_index)[0]

    @staticmethod
    def _graph(outputs: tuple[Tensor, ...], used: list[SplitLayer]) -> _Graph:
        which = tuple(at for at, tensor in enumerate(outputs) if tensor.requires_grad)
        return _Graph(tuple(_root(outputs[at]) for at in which), which, used)

    def evaluate(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None
    ) -> tuple[Message | None, Any, Tensor | None]:
        """A forward that keeps nothing; otherwise as :meth:`forward`."""
        with torch.no_grad():
            output, loss_value = self._compute(args, kwargs, loss)
        message = None
        if not self.is_last:
            message = forward_message(output, self.stage_index, None)
        return message, detached(output), loss_value

    def backward(self, micro_batch: int, gradients: tuple[Tensor | None, ...], *, split: bool = False) -> Message:
        """Backward of one micro-batch; parameter gradients go where :meth:`attach` said.

        Args:
            micro_batch: one whose forward has run.
            gradients: one for each output, None where the next stage had none; ignored on the last stage.
            split: leave the weight gradients of linear layers to :meth:`weight_gradients`.

        Returns:
            The gradients of the stage's inputs, None for inputs that need none.

        Raises:
            StageError: a tensor that a weight gradient needs was modified in place; the message names the layer.
        """
        saved = self.in_flight.pop(micro_batch)
        graph = saved.held if isinstance(saved.held, _Graph) else self._rebuild(saved.held)
        if self.is_last:
            roots, grads = graph.roots, tuple(None for _ in graph.roots)
        else:
            pairs = [
                (root, gradients[at])
                for root, at in zip(graph.roots, graph.which, strict=True)
                if gradients[at] is not None
            ]
            roots, grads = tuple(root for root, _ in pairs), tuple(grad for _, grad in pairs)  # type: ignore[misc]
        collecting: AbstractContextManager[list[WeightGradient]] = nullcontext([])
        if self._gradients is not None:
            collecting = self._gradients.backward(graph.used, defer=split)
        with collecting as pending:
            if roots:
                torch.autograd.backward(roots, grads)
        if split:
            self._pending[micro_batch] = pending, saved.shares
        return Message(
            tuple(None if tensor.grad is None else tensor.grad.contiguous() for tensor in saved.inputs),
            tuple(False for _ in saved.inputs),
        )

    def weight_gradients(self, micro_batch: int) -> None:
        """The half of a split backward that was left; see :meth:`backward`."""
        pending, _ = self._pending.pop(micro_batch)
        if self._gradients is not None:
            self._gradients.compute_left(pending)

    def _rng_states(self) -> tuple[Tensor, ...]:
        here = (torch.cuda.get_rng_state(self.device),) if self.device.type == "cuda" else ()
        return (torch.get_rng_state(), *here)

    def _rebuild(self, again: _Again) -> _Graph:
        with torch.random.fork_rng(devices=() if self.device.type == "cpu" else (self.device,)):
            torch.set_rng_state(again.rng_states[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(again.rng_states[1], self.device)
            outputs, _, _, used = self._build_graph(again.args, again.kwargs, again.loss)
        return self._graph(outputs, used)

    def kept_bytes(self, micro_batch: int) -> tuple[int, int]:
        """Bytes of activations that ``micro_batch`` keeps alive until its backward, and in its backward.

        Both are measured on the first forward of its shape: every distinct storage that autograd saved except
        parameters, and the stage's inputs. They differ where the forward is run again.
        """
        saved = self.in_flight[micro_batch]
        return saved.kept_bytes, saved.full_bytes

    def pending_bytes(self, micro_batch: int) -> int:
        """Bytes that ``micro_batch`` keeps alive between its I and its W."""
        pending, shares = self._pending[micro_batch]
        return distinct_bytes((tensor for one in pending for tensor in (one.x, one.grad)), shares=shares)

    def forget(self) -> None:
        """Drop every micro-batch in flight, after a failure."""
        self.in_flight.clear()
        self._pending.clear()

    def _compute(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> tuple[Any, Tensor | None]:
        output = self.submod(*args, **kwargs)
        if self._declared.pending:
            self._declared.check(args, output)
        if loss is None:
            return output, None
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StageError(f"loss_fn returned a {got}: it must return a scalar tensor, for example by .mean()")
        return output, value


def _root(tensor: Tensor) -> Any:
    # An edge holds the graph without the output, whose memory is free once it has been sent.
    return get_gradient_edge(tensor) if _EDGES_AS_ROOTS else tensor


def _signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    return tuple(
        (tuple(value.shape), value.dtype, value.requires_grad)
        if isinstance(value, Tensor)
        else (type(value), *(_signature((tensor,), {}) for tensor in tensors(value)))
        for value in values
    )
