"""One stage: a slice of the model, its forwards and backwards, and what it keeps between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr

from paci_rt.errors import StageError
from paci_rt.optim.backend import usable
from paci_rt.optim.stage_optimizer import GradSink
from paci_rt.runtime.activation_bytes import distinct_bytes, saved_bytes, shares_of
from paci_rt.runtime.aliasing import OwnMemory
from paci_rt.runtime.argument_types import as_device, check_place
from paci_rt.runtime.declared import Declared, Example
from paci_rt.runtime.graph_facts import GraphFacts
from paci_rt.runtime.in_flight import Graph, InFlight, first_gradient, graph_of
from paci_rt.runtime.modes import Mode, Settings, mode_now, settings_now
from paci_rt.runtime.module_checks import check_wrappers, has_meta, require_graph
from paci_rt.runtime.recompute import Again, Reruns
from paci_rt.runtime.split_backward import SplitUse, WeightGradient, WeightGradients
from paci_rt.runtime.split_calls import SplitCalls
from paci_rt.runtime.trees import map_tensors, tensors
from paci_rt.transport.base import Message
from paci_rt.transport.payload import plain
from paci_rt.transport.structure import Structure, forward_only, take_apart

LossFn = Callable[..., Tensor]

_NOTHING: AbstractContextManager[None] = nullcontext()


class PipelineStage:
    """One module slice at one place of the pipeline; torch's constructor order.

    Args:
        submodule: the slice. It takes what the previous stage returns (the first stage: the arguments of ``step``):
            the items of a tuple or list as arguments, anything else as one. It returns tensors, or containers that
            ``torch.utils._pytree`` knows of tensors and constants; the last stage returns whatever ``loss_fn`` takes.
        stage_index: 0 ... ``num_stages - 1``.
        num_stages: stages of the whole pipeline.
        device: where the stage runs, ``"cpu"`` or a CUDA device; the module is moved there, unless it is on the meta
            device: then call ``to_empty()`` and fill it in before it is trained.
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
        StageError: ``submodule`` is no ``torch.nn.Module``, an example is no tensor, or something in the module
            synchronises or shards by itself, such as DistributedDataParallel, ``fully_shard`` or a DTensor parameter;
            the message has its path.

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
        check_place(stage_index, num_stages)
        self.device = usable(as_device(device))
        for name, given in (("stream", stream), ("update_stream", update_stream), ("wgrad", wgrad)):
            if given is not None and self.device.type == "cpu":
                raise ValueError(f"{name} was given for a stage on the CPU, where it means nothing: leave it out")
        self.stream, self.update_stream, self.wgrad = stream, update_stream, wgrad
        check_wrappers(submodule, stage_index)
        # As in torch: memory that is not there yet cannot be moved; to_empty() says where it will be.
        self.submod = submodule if has_meta(submodule) else submodule.to(self.device)
        self.stage_index = stage_index
        self.num_stages = num_stages
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.group = group
        if dw_builder is not None:
            raise ValueError("dw_builder was given: the stage computes weight gradients by itself, so leave it out")
        if get_mesh is not None:
            raise ValueError("get_mesh was given: DTensors do not travel between stages, so leave it out")
        self.has_backward = False
        self.root_scale = 1.0  # of the losses that backwards begin with
        self._declared = Declared(stage_index, input_args, output_args, output_grads, input_grads)
        self.in_flight: dict[int, InFlight] = {}
        self._pending: dict[int, tuple[list[WeightGradient], dict[int, int], Mode]] = {}
        self._facts = GraphFacts()
        self._own = OwnMemory(self.submod)
        self.lent = False  # what it receives is memory that other stages of this process have too
        self.mode = Mode(settings_now())
        self.reruns = Reruns(stage_index, self.device)
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
        if self._gradients is not None:
            raise StageError(f"stage {self.stage_index} already belongs to a schedule: call close() on that one first")

    def begin(self, settings: Settings) -> None:
        """A step, a drain or an evaluation begins under torch's ``settings``: look at what it finds, once."""
        mode = mode_now(settings, (self.submod, *self.reruns.loss_modules) if self.reruns.possible else ())
        if mode != self.mode:
            self.mode = mode
        self._own.look_again(self.submod)
        self.reruns.begin()

    def attach(self, sink: GradSink) -> None:
        """Hand every parameter's gradient to ``sink`` as soon as a backward has completed it, and split the backward
        of linear layers (see :mod:`paci_rt.runtime.split_backward`)."""
        self.require_free()
        self._gradients = WeightGradients(self.submod, sink)
        self._gradients.calls = SplitCalls(self.submod, self._gradients)

    def detach(self) -> None:
        """Leave gradients in ``.grad`` again, and the layers as they were."""
        if self._gradients is not None:
            self._gradients.remove()
            self._gradients = None
        self._facts, self.root_scale = GraphFacts(), 1.0  # the first may depend on what is trained

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
        given = tensors(args)
        inputs = () if self.is_first else tuple(given)
        shares = self._shares(given, kwargs)
        again = None
        if recompute or self.reruns.on or self.reruns.doubtful(self.mode):
            again = self.reruns.prepare(args, kwargs, loss, self.mode, (self.submod,))
        before = _get_sequence_nr()
        (outputs, structure), output, loss_value, used = self._build_graph(args, kwargs, loss)
        if again is not None:
            self.reruns.ran(again)
        graph = graph_of(outputs, used)
        kind = _get_sequence_nr() - before, graph.which, tuple(map(id, used))
        full_bytes = self._facts.saved_bytes(args, kwargs, kind, lambda: self._measure(outputs, inputs, used, shares))
        if self._facts.overlooked and self._gradients is not None:
            self._gradients.forget_order()
        if again is not None and not recompute and not self.reruns.wanted(outputs, self.mode, micro_batch):
            again = None
        if again is not None:
            again.roots = graph.which
        kept_bytes = full_bytes if again is None else again.kept_bytes(shares)
        held = graph if again is None else again
        self.in_flight[micro_batch] = InFlight(inputs, held, kept_bytes, full_bytes, shares, self.mode)
        message = None if self.is_last else self._message(outputs, structure, shares, inputs)
        return message, self._detached(output, shares), None if loss_value is None else self._own.apart(loss_value)

    def _shares(self, given: list[Tensor], kwargs: Mapping[str, Any]) -> dict[int, int]:
        """Of the caller's batch, by storage."""
        callers = given if self.is_first else []
        return shares_of([*callers, *tensors(list(kwargs.values()))] if kwargs else callers)

    def _measure(
        self, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], used: list[SplitUse], shares: dict[int, int]
    ) -> int:
        """What takes a walk over a graph of a kind that is not known yet: its bytes, and who reads which weights."""
        if self._gradients is not None:
            self._gradients.learn_order(outputs, used)
        return saved_bytes(outputs, inputs, self.parameters(), shares)

    def _build_graph(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> tuple[tuple[tuple[Tensor, ...], Structure | None], Any, Tensor | None, list[SplitUse]]:
        """A forward with autograd: what gradients start from and are part of, output, loss, and the layers used."""
        if self.mode.settings.autocast:
            torch.clear_autocast_cache()  # weights may have changed since they were cast
        gradients = self._gradients
        used = [] if gradients is None else gradients.begin_forward()
        try:
            with torch.enable_grad():
                output, loss_value = self._compute(args, kwargs, loss)
        finally:
            if gradients is not None:
                gradients.active = False
        if loss_value is not None and gradients is not None:
            require_graph(loss_value, self.stage_index)
        return self._differentiable(output, loss_value), output, loss_value, used

    def _differentiable(self, output: Any, loss_value: Tensor | None) -> tuple[tuple[Tensor, ...], Structure | None]:
        if self.is_last:
            return () if loss_value is None else (loss_value,), None
        return take_apart(output, self.stage_index)

    def evaluate(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None = None
    ) -> tuple[Message | None, Any, Tensor | None]:
        """A forward that keeps nothing; otherwise as :meth:`forward`."""
        if self.mode.settings.autocast:
            torch.clear_autocast_cache()
        with torch.no_grad():
            output, loss_value = self._compute(args, kwargs, loss)
        shares = self._shares(tensors(args), kwargs)
        message = None
        if not self.is_last:
            message = self._message(*take_apart(output, self.stage_index), shares, training=False)
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
            with saved.held.modules_back():
                graph = self._rebuild(saved.held)
                return self._backward(micro_batch, saved, graph, gradients, split)

    def _backward(
        self, micro_batch: int, saved: InFlight, graph: Graph, gradients: tuple[Tensor | None, ...], split: bool
    ) -> Message:
        if self.mode.settings.autocast or saved.mode.settings.autocast:
            torch.clear_autocast_cache()  # activation checkpointing computes in a backward
        if self.is_last:
            roots, scale = graph.roots, self.root_scale
            grads = tuple([None if scale == 1.0 else first_gradient(root, scale) for root in roots])
        else:
            given = [at for at, which in enumerate(graph.which) if gradients[which] is not None]
            roots = tuple([graph.roots[at] for at in given])
            grads = tuple([gradients[graph.which[at]] for at in given])
        pending: list[WeightGradient] = []
        before = _get_sequence_nr()
        if self._gradients is not None:
            pending = self._gradients.backward(graph.used, roots, grads, defer=split)
        elif roots:
            torch.autograd.backward(roots, grads)
        if split:
            self._pending[micro_batch] = pending, saved.shares, saved.mode
        if self._gradients is not None and self._gradients.repeated:
            self.reruns.seen_in_backward(micro_batch)
        elif _get_sequence_nr() != before:  # on a GPU another thread counts
            self.reruns.nodes_made_in_backward()
        return Message(
            tuple(None if tensor.grad is None else plain(tensor.grad) for tensor in saved.inputs),
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
            (outputs, _), _, _, used = self._build_graph(again.args, again.kwargs, again.loss)
        graph = graph_of(outputs, used)
        again.check(self.stage_index, graph.which)
        return graph

    def kept_bytes(self, micro_batch: int) -> tuple[int, int]:
        """Bytes of activations that ``micro_batch`` keeps alive until its backward, and in its backward, which differ
        where the forward is run again: every distinct storage that autograd saved except parameters, and the inputs.
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

    def run_module(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The slice's output; what is not the next stage's business yet is added by stages that were traced."""
        return self.submod(*args, **kwargs)

    def _compute(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
    ) -> tuple[Any, Tensor | None]:
        output = self.run_module(args, kwargs)
        if self._declared.pending:
            self._declared.check(args, output)
        if loss is None:
            return output, None
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StageError(f"loss_fn returned a {got}: it must return a scalar tensor, for example by .mean()")
        return output, value

    def _message(
        self,
        outputs: tuple[Tensor, ...],
        structure: Structure | None,
        given: dict[int, int],
        received: tuple[Tensor, ...] = (),
        *,
        training: bool = True,
    ) -> Message:
        received = received if self.lent else ()
        return Message(
            tuple([self._own.ready(tensor, given, received) for tensor in outputs]),
            tuple([training and tensor.requires_grad for tensor in outputs]),
            structure if training else forward_only(structure),
        )

    def _detached(self, output: Any, given: dict[int, int]) -> Any:
        if self.is_last:
            return map_tensors(lambda tensor: self._own.apart(tensor, given), output)
        return output.detach() if isinstance(output, Tensor) else map_tensors(Tensor.detach, output)
