"""Backward split: the input-gradient half I of a linear layer's backward, and the weight-gradient half W.

While a stage belongs to a schedule, its linear layers (``nn.Linear``, and ``Conv1D`` as in Hugging Face's GPT-2) run
as one autograd node each. In a backward the node returns the gradient of its input; the gradient of its weight is a
matrix product that goes straight into the accumulator's front buffer, either at once (a full backward, B) or later (W
after I). Whatever else a module does, parameters of other layers included, belongs to I.

A layer is left to autograd, and so to I, where that is the only way to be right: inside ``torch.compile``, with a
weight that another kind of layer uses too, under ``torch.autocast``, or with a hook on a parameter, whenever it comes.

On the CPU gradients keep the bits of the unsplit backward. A matrix product that adds to its result does so too only as
long as the BLAS goes through the summed dimension in one piece (384 rows with MKL's fp32 product on AVX-512); beyond
that the product is taken by itself and added in a second pass. One try a shape tells which. On a GPU a product is added
in fp32 and rounded once, where the unsplit backward rounds it to the parameter's dtype first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.errors import StageError
from paci_rt.optim.stage_optimizer import GradSink
from paci_rt.runtime.backward_bytes import backward_bytes
from paci_rt.runtime.embedding_rows import EmbeddingRows
from paci_rt.runtime.gradient_hooks import GradientHooks
from paci_rt.runtime.linear_layers import PlainForward, find_layers
from paci_rt.runtime.readers import readers


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """One layer's W, ready to be computed.

    Attributes:
        layer: whose.
        x: input of the layer, ``[..., in]``.
        grad: gradient of its output, ``[..., out]``.
        versions: autograd's version counters of the two when I ran.
    """

    layer: SplitUse
    x: Tensor
    grad: Tensor
    versions: tuple[int, int]

    def product(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the gradient in the weight's own layout."""
        x, grad = _rows(self.x), _rows(self.grad)
        return (x.t(), grad) if self.layer.transposed else (grad.t(), x)

    def bias_gradient(self) -> Tensor:
        """The sum of the output's gradient over all rows, ``[out]``."""
        return _rows(self.grad).sum(0)

    def check_untouched(self) -> None:
        """Make sure that nobody wrote into the two tensors since I ran.

        Raises:
            StageError: the message names the layer.
        """
        if (self.x._version, self.grad._version) != self.versions:
            what = "input" if self.x._version != self.versions[0] else "output gradient"
            raise StageError(
                f"the {what} of layer {self.layer.name!r} was modified in place between I and W of its micro-batch: "
                "write into a tensor of its own instead, or use a schedule that does not split the backward"
            )


class SplitUse(ABC):
    """One linear layer as autograd sees it while its stage is attached, whatever computes it.

    Attributes:
        name: where its weight is in the stage's module.
        weight, bias: what it was made with.
        transposed: the weight is ``[in, out]``.
        waits: it tells :attr:`gradients` before every read of its parameters in a forward.
        gradients: the stage's collector.
    """

    name: str
    weight: nn.Parameter
    bias: Any
    transposed: bool
    waits: bool = True
    gradients: WeightGradients

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The layer's output, ``[..., out]``, as without a split."""

    def can_run_split(self, x: Tensor) -> bool:
        """False under no_grad, autocast and functorch, and with a frozen weight."""
        return (
            self.weight.requires_grad
            and torch.is_grad_enabled()
            and x.dim() >= 2
            and not torch.is_autocast_enabled(x.device.type)
            and not torch._C._are_functorch_transforms_active()
        )


class SplitLayer(SplitUse):
    """Stands in for ``forward`` on one linear layer of an attached stage.

    Args:
        name: the layer's name in the stage's module.
        module: the layer.
        gradients: the stage's collector.
    """

    def __init__(self, name: str, module: nn.Module, gradients: WeightGradients) -> None:
        self.name, self.gradients = name, gradients
        self.module: Any = module
        self.weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = self.module.bias  # type: ignore[assignment]
        self.transposed = not isinstance(module, nn.Linear)  # Conv1D keeps [in, out]

    def __call__(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:  # given by its name
            if len(named) != 1:
                return type(self.module).forward(self.module, **named)  # type: ignore[no-any-return]
            (x,) = named.values()
        gradients = self.gradients
        gradients.before_layer(self.weight)
        if torch.compiler.is_compiling() or not (gradients.active and self._takes_part(x)):
            return type(self.module).forward(self.module, x)  # type: ignore[no-any-return]
        return run_split(x, self)

    def compute(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)  # type: ignore[no-any-return]

    def _takes_part(self, x: Tensor) -> bool:
        """False also with a parameter that was replaced meanwhile."""
        params = self.module._parameters
        return params.get("weight") is self.weight and params.get("bias") is self.bias and self.can_run_split(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainForward:
        return PlainForward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainForward, (self.module,)


def run_split(x: Tensor, layer: SplitUse) -> Tensor:
    """The layer's output, from one autograd node."""
    gradients = layer.gradients
    if gradients.collecting:  # a forward inside a backward is one that checkpointing repeats
        gradients.repeated = True
    else:
        gradients.used.append(layer)
    return _SplitLinear.apply(x, layer.weight, layer.bias, layer)  # type: ignore[no-any-return]


class _SplitLinear(torch.autograd.Function):
    """``y = x Wᵀ + b`` (Conv1D: ``x W + b``) whose weight gradient the stage's collector takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SplitUse) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer: SplitUse = ctx.layer
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(weight.t() if layer.transposed else weight)
        one = WeightGradient(layer, x, grad, (x._version, grad._version))
        gradients = layer.gradients
        if gradients.collecting and not gradients.awaited(layer) and not gradients.read_elsewhere(layer):
            gradients.take(one)
            return grad_x, None, None, None
        # Autograd has to sum all uses of a parameter, a hook waits for the gradient, or this is somebody else's
        # backward, such as a gradient penalty inside the loss: all gradients, as autograd wants them.
        grad_weight = torch.mm(*one.product()) if ctx.needs_input_grad[1] else None
        grad_bias = one.bias_gradient() if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


LAYER_NODE = _SplitLinear.__name__ + "Backward"


class WeightGradients:
    """Collects the weight gradients of one stage's linear layers and computes them into the sink.

    Attributes:
        active: a forward or a backward of the stage is running.
        collecting: a backward of the stage is running.
        used: layers in the order in which the last forward used them.
        repeated: a backward of the stage has run layers.
    """

    def __init__(self, module: nn.Module, sink: GradSink) -> None:
        self._sink = sink
        self.before_layer = sink.before_layer
        self._layers = list(find_layers(module))
        self.hooks = GradientHooks(module.named_parameters(), sink)
        self.calls: Any = None  # what split_calls has found
        self.active = self.collecting = self.repeated = False
        self.used: list[SplitUse] = []
        self._order: dict[int, SplitUse] = {}  # of all forwards so far, by id
        self._in_layers: set[int] = set()
        self._elsewhere: set[int] = set()
        self._unordered = False
        self._uses: dict[int, int] = {}
        self._defer = False
        self._pending: list[WeightGradient] = []
        for name, layer in self._layers:
            layer.forward = SplitLayer(name, layer, self)
        self._embeddings = EmbeddingRows(module, sink, self)

    @property
    def names(self) -> list[str]:
        """Names of the layers that are split."""
        calls = [] if self.calls is None else [call.name for call in self.calls.found]
        return list(dict.fromkeys([*(name for name, _ in self._layers), *calls]))

    def remove(self) -> None:
        """Give the layers their own ``forward`` back."""
        for _, layer in self._layers:
            if isinstance(layer.__dict__.get("forward"), SplitLayer):  # else somebody has wrapped it
                del layer.__dict__["forward"]
        self._layers.clear()
        self.hooks.remove()
        self._embeddings.remove()
        if self.calls is not None:
            self.calls.remove()

    def begin_forward(self) -> list[SplitUse]:
        """Until :attr:`active` is False again, layers run split; they are listed here in the order of their uses."""
        self.active, self.used = True, []
        return self.used

    def backward(
        self, used: list[SplitUse], roots: Sequence[Any], grads: Sequence[Any], *, defer: bool
    ) -> list[WeightGradient]:
        """Run a backward and collect those of the layers; those left over for W, none unless ``defer``.

        Args:
            used: what :meth:`begin_forward` listed for the micro-batch.
            roots, grads: of ``torch.autograd.backward``; nothing runs without roots.
            defer: keep everything for a W of its own.
        """
        self.active = self.collecting = True
        self._uses = _uses(used)
        self._defer, self._pending = defer, []
        self.hooks.begin()
        self._embeddings.begin()
        try:
            if roots:
                torch.autograd.backward(roots, grads)
        finally:
            self.active = self.collecting = False
            self.hooks.end()
        self._embeddings.finish()
        if self._pending and not defer:
            self.compute(self._pending)
        self._sink.flush()
        return self._pending

    def awaited(self, layer: SplitUse) -> bool:
        """Whether a hook of the user's waits for a gradient of the layer."""
        waits = self.hooks.waits
        return waits(layer.weight) or (layer.bias is not None and waits(layer.bias))

    def take(self, gradient: WeightGradient) -> None:
        """Called by a layer's backward."""
        layer = gradient.layer
        uses = self._uses.get  # None for a layer that checkpointing runs again in this backward
        once = uses(id(layer.weight)) == 1 and (layer.bias is None or uses(id(layer.bias)) == 1)
        if once and not self._defer:
            if torch.is_grad_enabled():  # as it is in no ordinary backward
                self.compute([gradient])
            else:
                self._compute([gradient])
        else:  # autograd sums all uses of a parameter before it adds them to the window's sum, and so do we
            self._pending.append(gradient)

    @torch.no_grad()
    def compute(self, gradients: Sequence[WeightGradient]) -> None:
        """Add weight and bias gradients to the window's sums, in the order in which the backward met them."""
        self._compute(gradients)

    def _compute(self, gradients: Sequence[WeightGradient]) -> None:
        weights: dict[int, list[WeightGradient]] = {}
        biases: dict[int, list[WeightGradient]] = {}
        for gradient in gradients:
            gradient.check_untouched()
            layer = gradient.layer
            weights.setdefault(id(layer.weight), []).append(gradient)
            if layer.bias is not None and layer.bias.requires_grad:
                biases.setdefault(id(layer.bias), []).append(gradient)
        for uses in weights.values():
            layer = uses[0].layer
            if len(uses) > 1:
                self._sink.accumulate(layer.weight, _sum(torch.mm(*use.product()) for use in uses))
                continue
            alone = layer.bias is not None and len(biases.get(id(layer.bias), ())) == 1 and not layer.transposed
            self._sink.accumulate_product(layer.weight, *uses[0].product(), layer.bias if alone else None)
            if alone:
                del biases[id(layer.bias)]
        for uses in biases.values():
            bias = uses[0].layer.bias
            assert bias is not None
            self._sink.accumulate(bias, _sum(use.bias_gradient() for use in uses))

    @torch.no_grad()
    def compute_left(self, gradients: Sequence[WeightGradient]) -> None:
        """:meth:`compute` for what was left over, in a W of its own."""
        self.compute(gradients)
        self._sink.flush()

    def read_elsewhere(self, layer: SplitUse) -> bool:
        """Whether the graph of a forward has shown that other things than layers read the layer's parameters too."""
        return bool(self._elsewhere) and not self._elsewhere.isdisjoint((id(layer.weight), id(layer.bias)))

    def learn_order(self, outputs: Sequence[Tensor], used: Sequence[SplitUse]) -> None:
        """Learn from the graph of a forward who reads parameters, and tell the sink which layers alone do, by all
        forwards so far."""
        self._embeddings.learn(outputs)
        matrices = {id(layer.weight) for layer in used}
        took = backward_bytes(outputs, matrices, self._embeddings.weights)
        self._sink.backward_bytes = max(self._sink.backward_bytes, took)
        in_layers, elsewhere = readers(outputs, LAYER_NODE)
        known = len(self._order), len(self._elsewhere)
        for layer in used:
            if layer.waits:
                self._order.setdefault(id(layer), layer)
        self._in_layers |= in_layers
        self._elsewhere |= elsewhere
        if self._unordered or known == (len(self._order), len(self._elsewhere)):
            return
        alone = self._in_layers - self._elsewhere
        parts = [[param for param in (one.weight, one.bias) if param is not None] for one in self._order.values()]
        self._sink.set_layer_order([params for params in parts if all(id(param) in alone for param in params)])

    def forget_order(self) -> None:
        """There are forwards that nobody has looked at: from now on each waits for the whole update."""
        if not self._unordered:
            self._unordered = True
            self._sink.set_layer_order(())


def _uses(layers: Iterable[SplitUse]) -> dict[int, int]:
    """How often each parameter was used, by its id."""
    count: dict[int, int] = {}
    for layer in layers:
        for key in (id(layer.weight), id(layer.bias)):
            count[key] = count.get(key, 0) + 1
    return count


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


__all__ = ["SplitLayer", "SplitUse", "WeightGradient", "WeightGradients"]
