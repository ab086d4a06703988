"""One stage: a slice of the model, its forwards and backwards, and what it keeps between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr

from paci_rt.errors import StageError
from paci_rt.optim.backend import usable
from paci_rt.optim.stage_optimizer import GradSink
from paci_rt.runtime.activation_bytes import distinct_bytes, saved_bytes, shares_of
from paci_rt.runtime.aliasing import OwnMemory
from paci_rt.runtime.graph_facts import GraphFacts, signature
from paci_rt.runtime.in_flight import Graph, InFlight, root
from paci_rt.runtime.modes import Mode, Settings, mode_now, settings_now
from paci_rt.runtime.recompute import Again, Reruns
from paci_rt.runtime.split_backward import SplitLayer, WeightGradient, WeightGradients
from paci_rt.transport.base import Message

LossFn = Callable[..., Tensor]

_NOTHING: AbstractContextManager[None] = nullcontext()


class PipelineStage:
    """One module slice at one place of the pipeline; torch's constructor order.

    Args:
        submodule: the slice. It takes what the previous stage returns (the first stage: the arguments of ``step``)
            and returns a tensor or a tuple of tensors.
        stage_index: 0 ... ``num_stages - 1``.
        num_stages: stages of the whole pipeline.
        device: where the stage runs, ``"cpu"`` or a CUDA device; the module is moved there.
        input_args, output_args: accepted because torch's constructor has them; shapes are discovered as
            micro-batches travel and may change from one to the next, so they are not needed.
        group: process group whose rank ``i`` runs stage ``i``; None is the default group.
        stream: on a GPU the stream that forwards and backwards run on, a ``torch.cuda.Stream``; None is the one that is
            current when a step is called. Several stages on one GPU overlap only on streams of their own.
        update_stream: likewise the one that updates run on; None is a new one.
        wgrad: on a GPU what computes weight gradients, a :class:`paci_rt.kernels.WgradRoutes` for the fastest route of
            each shape. Routes differ in their last bits, so the default is one that does not depend on measurements.

    Raises:
        ValueError: index or count out of range, or a device that cannot be used; the reason is in the message.
        TritonMissingError: a CUDA device without Triton.
        StageError: ``submodule`` is no ``torch.nn.Module``.

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
        input_args: Any = None,
        output_args: Any = None,
        *,
        group: Any = None,
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
        self.in_flight: dict[int, InFlight] = {}
        self._pending: dict[int, tuple[list[WeightGradient], dict[int, int], Mode]] = {}
        self._facts = GraphFacts()
        self._own = OwnMemory(self.submod)
        self.lent = False  # what it receives is memory that other stages of this process have too
        self.mode = Mode(settings_now())
        self.reruns = Reruns(stage_index, self.device)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._gradients: WeightGradients | None = None

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

    def begin(self, settings: Settings) -> None:
        """A step, a drain or an evaluation begins: look at what it finds, once.

        Args:
            settings: torch's.
        """
        mode = mode_now(settings, (self.submod, *self.reruns.loss_modules) if self.reruns.possible else ())
        if mode != self.mode:
            self.mode = mode
        self._own.look_again(self.submod)

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
        inputs = () if self.is_first else tuple(arg for arg in args if isinstance(arg, Tensor))
        shares = shares_of((*(args if self.is_first else ()), *kwargs.values()))
        again = None
        if recompute or self.reruns.on or self.reruns.doubtful(self.mode):
            again = self.reruns.prepare(args, kwargs, loss, self.mode, (self.submod,))
        before = _get_sequence_nr()
        outputs, output, loss_value, used = self._build_graph(args, kwargs, loss)
        if again is not None:
            self.reruns.ran(again)
        graph = self._graph(outputs, used)
        kind = signature(args, kwargs), _get_sequence_nr() - before, graph.which, tuple(map(id, used))
        full_bytes = self._facts.saved_bytes(kind, lambda: self._measure(outputs, inputs, used, shares))
        if self._facts.overlooked and self._gradients is not None:
            self._gradients.forget_order()
        if again is not None and not recompute and not self.reruns.wanted(outputs, self.mode, micro_batch):
            again = None
        if again is not None:
            again.roots = graph.which
        kept_bytes = full_bytes if again is None else again.kept_bytes(shares)
        held = graph if again is None else again
        self.in_flight[micro_batch] = InFlight(inputs, held, kept_bytes, full_bytes, shares, self.mode)
        message = None if self.is_last else self._message(outputs, shares, inputs)
        return message, self._detached(output, shares), None if loss_value is None else self._own.apart(loss_value)

    def _measure(
        self, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], used: list[SplitLayer], shares: dict[int, int]
    ) -> int:
        """What takes a walk over a graph of a kind that is not known yet: its bytes, and who reads which weights."""
        if self._gradients is not None:
            self._gradients.learn_order(outputs, used)
        return saved_bytes(outputs, inputs, self.parameters(), shares)

    def _build_graph(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> tuple[tuple[Tensor, ...], Any, Tensor | None, list[SplitLayer]]:
        """A forward with autograd: what gradients start from, output, loss, and the layers that were used."""
        if self.mode.settings.autocast:
            torch.clear_autocast_cache()  # weights may have changed since they were cast
        counting: AbstractContextManager[list[SplitLayer]] = nullcontext([])
        if self._gradients is not None:
            counting = self._gradients.forward()
        with torch.enable_grad(), counting as used:
            output, loss_value = self._compute(args, kwargs, loss)
        return self._differentiable(output, loss_value), output, loss_value, used

    def _differentiable(self, output: Any, loss_value: Tensor | None) -> tuple[Tensor, ...]:
        if loss_value is not None:
            return (loss_value,)
        return () if self.is_last else self._as_tuple(output)

    @staticmethod
    def _graph(outputs: tuple[Tensor, ...], used: list[SplitLayer]) -> Graph:
        which = tuple(at for at, tensor in enumerate(outputs) if tensor.requires_grad)
        return Graph(tuple(root(outputs[at]) for at in which), which, used)

    def evaluate(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None
    ) -> tuple[Message | None, Any, Tensor | None]:
        """A forward that keeps nothing; otherwise as :meth:`forward`."""
        if self.mode.settings.autocast:
            torch.clear_autocast_cache()
        with torch.no_grad():
            output, loss_value = self._compute(args, kwargs, loss)
        shares = shares_of((*(args if self.is_first else ()), *kwargs.values()))
        message = None if self.is_last else self._message(self._as_tuple(output), shares, training=False)
        return message, self._detached(output, shares), None if loss_value is None else self._own.apart(loss_value)

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
        with _NOTHING if saved.mode is self.mode else saved.mode.resumed(self.mode):
            if isinstance(saved.held, Graph):
                return self._backward(micro_batch, saved, saved.held, gradients, split)
            with saved.held.buffers_back():
                graph = self._rebuild(saved.held)
                return self._backward(micro_batch, saved, graph, gradients, split)

    def _backward(
        self, micro_batch: int, saved: InFlight, graph: Graph, gradients: tuple[Tensor | None, ...], split: bool
    ) -> Message:
        if self.mode.settings.autocast or saved.mode.settings.autocast:
            torch.clear_autocast_cache()  # activation checkpointing computes in a backward
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
            self._pending[micro_batch] = pending, saved.shares, saved.mode
        if self._gradients is not None and self._gradients.repeated:
            self.reruns.seen_in_backward(micro_batch)
        return Message(
            tuple(None if tensor.grad is None else tensor.grad.contiguous() for tensor in saved.inputs),
            tuple(False for _ in saved.inputs),
        )

    def weight_gradients(self, micro_batch: int) -> None:
        """The half of a split backward that was left; see :meth:`backward`."""
        pending, _, mode = self._pending.pop(micro_batch)
        if self._gradients is not None:
            with _NOTHING if mode is self.mode else mode.resumed(self.mode):
                self._gradients.compute_left(pending)

    def _rebuild(self, again: Again) -> Graph:
        again.check(self.stage_index)
        with again.random.again(self.device):
            outputs, _, _, used = self._build_graph(again.args, again.kwargs, again.loss)
        graph = self._graph(outputs, used)
        again.check(self.stage_index, graph.which)
        return graph

    def kept_bytes(self, micro_batch: int) -> tuple[int, int]:
        """Bytes of activations that ``micro_batch`` keeps alive until its backward, and in its backward.

        Both are measured on forwards whose graph is of the same kind (:mod:`paci_rt.runtime.graph_facts`): every
        distinct storage that autograd saved except parameters, and the stage's inputs. They differ where the forward is
        run again.
        """
        saved = self.in_flight[micro_batch]
        return saved.kept_bytes, saved.full_bytes

    def pending_bytes(self, micro_batch: int) -> int:
        """Bytes that ``micro_batch`` keeps alive between its I and its W."""
        pending, shares, _ = self._pending[micro_batch]
        return distinct_bytes((tensor for one in pending for tensor in (one.x, one.grad)), shares=shares)

    def forget(self) -> None:
        """Drop every micro-batch in flight, after a failure."""
        self.in_flight.clear()
        self._pending.clear()
        self.reruns = Reruns(self.stage_index, self.device)

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

    def _message(
        self,
        outputs: tuple[Tensor, ...],
        given: dict[int, int],
        received: tuple[Tensor, ...] = (),
        *,
        training: bool = True,
    ) -> Message:
        received = received if self.lent else ()
        return Message(
            tuple([self._own.apart(tensor, given, received).contiguous() for tensor in outputs]),
            tuple([training and tensor.requires_grad for tensor in outputs]),
        )

    def _detached(self, output: Any, given: dict[int, int]) -> Any:
        if isinstance(output, Tensor):
            return self._own.apart(output, given) if self.is_last else output.detach()
        if isinstance(output, (tuple, list)):
            return type(output)(self._detached(item, given) for item in output)
        if isinstance(output, dict):
            return {key: self._detached(item, given) for key, item in output.items()}
        return output
