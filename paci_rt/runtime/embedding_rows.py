"""Gradients of embeddings, row by row.

Autograd makes the gradient of an embedding as large as its weight, and nearly all of it is zero: for GPT-2's tokens 196
MiB in every micro-batch. While a stage on the CPU belongs to a schedule, the rows that a micro-batch looked up go
straight into the accumulator's front buffer, with the bits that the dense gradient would give: rows that were looked up
several times are summed by torch's own kernel first, and to the others zero would be added.

An embedding is left to autograd where that is the only way to be right: inside ``torch.compile``, where another module
or anything but this lookup reads its weight, with a hook on the weight, and with ``max_norm``, ``sparse`` or
``scale_grad_by_freq``. Of one that is looked up several times in a forward the dense gradients are summed first, as
autograd does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paci_rt.optim.stage_optimizer import GradSink
from paci_rt.runtime.activation_bytes import graph_nodes
from paci_rt.runtime.gradient_hooks import GradientHooks
from paci_rt.runtime.linear_layers import PlainForward, compiled_parts

Rows = tuple[Tensor, Tensor]  # indices of any shape, and gradients of what was looked up, [..., columns]


class Collector(Protocol):
    """What is asked of a stage's collector of weight gradients (:mod:`paci_rt.runtime.split_backward`)."""

    active: bool
    collecting: bool
    hooks: GradientHooks


class EmbeddingRows:
    """The embeddings of one stage, while a schedule has it.

    Args:
        module: the stage's.
        sink: where gradients go.
        gradients: the stage's collector of other weight gradients.
    """

    def __init__(self, module: nn.Module, sink: GradSink, gradients: Collector) -> None:
        self._sink, self._gradients = sink, gradients
        self._found: dict[int, tuple[nn.Parameter, list[Rows]]] = {}  # of the backward that runs
        self._elsewhere: set[int] = set()
        self._layers = find_embeddings(module)
        for layer in self._layers:
            layer.forward = EmbeddingLookup(layer, self)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the embeddings their own ``forward`` back."""
        for layer in self._layers:
            if isinstance(layer.__dict__.get("forward"), EmbeddingLookup):  # else somebody has wrapped it
                del layer.__dict__["forward"]
        self._layers.clear()

    def learn(self, outputs: Sequence[Tensor]) -> None:
        """Learn from the graph of a forward which of the weights others read too."""
        if not self._layers:
            return
        for node in graph_nodes(outputs):
            for parent, _ in node.next_functions:
                param = getattr(parent, "variable", None)
                if param is not None and type(node).__name__ != _NODE:
                    self._elsewhere.add(id(param))

    def takes(self, weight: nn.Parameter) -> bool:
        """Whether the rows of a backward are wanted here, and not by autograd."""
        gradients = self._gradients
        return gradients.collecting and id(weight) not in self._elsewhere and not gradients.hooks.waits(weight)

    def take(self, weight: nn.Parameter, indices: Tensor, grad: Tensor) -> None:
        """Called by a lookup's backward."""
        self._found.setdefault(id(weight), (weight, []))[1].append((indices, grad))

    @property
    def weights(self) -> set[int]:
        """``id`` of the weights whose gradients come in rows, as far as is known."""
        return {id(layer.weight) for layer in self._layers} - self._elsewhere

    @property
    def active(self) -> bool:
        """Whether a forward or a backward of the stage is running."""
        return self._gradients.active

    def begin(self) -> None:
        """A backward begins."""
        self._found = {}

    @torch.no_grad()
    def finish(self) -> None:
        """It is over: add what it found to the window's sums."""
        found, self._found = self._found, {}
        for weight, uses in found.values():
            accumulator, position = self._sink.place(weight)
            if len(uses) > 1:
                total = dense(weight, *uses[0])
                for use in uses[1:]:
                    total = total + dense(weight, *use)
                accumulator.add(position, total)
                continue
            rows, values = summed_rows(*uses[0])
            sums, overwrite = accumulator.front(position)
            if overwrite:
                sums.zero_()
                sums[rows] = values.to(sums.dtype)
            else:
                sums[rows] += values.to(sums.dtype)


class EmbeddingLookup:
    """Stands in for ``forward`` on one embedding of an attached stage."""

    def __init__(self, module: nn.Embedding, rows: EmbeddingRows) -> None:
        self.module, self._rows = module, rows
        self._weight = module.weight

    def __call__(self, input: Tensor) -> Tensor:
        module, rows, weight = self.module, self._rows, self._weight
        if (
            torch.compiler.is_compiling()
            or not (rows.active and torch.is_grad_enabled())
            or module._parameters.get("weight") is not weight
            or not (weight.requires_grad and _is_plain(module) and type(input) is Tensor)
            or torch._C._are_functorch_transforms_active()
        ):
            return type(module).forward(module, input)
        return _Lookup.apply(input, weight, module, rows)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return PlainForward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return PlainForward, (self.module,)


class _Lookup(torch.autograd.Function):
    """``weight[indices]``, whose weight gradient the stage's collector takes."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: nn.Parameter, module: nn.Embedding, rows: EmbeddingRows) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.weight, ctx.rows, ctx.padding = weight, rows, module.padding_idx
        return type(module).forward(module, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        if ctx.padding is not None:
            grad = grad.masked_fill((indices == ctx.padding).unsqueeze(-1), 0.0)
        if ctx.rows.takes(ctx.weight):
            ctx.rows.take(ctx.weight, indices, grad)
            return None, None, None, None
        return None, dense(ctx.weight, indices, grad), None, None


_NODE = _Lookup.__name__ + "Backward"


def find_embeddings(module: nn.Module) -> list[nn.Embedding]:
    """The embeddings of a stage on the CPU whose gradients can come in rows."""
    owners: dict[int, int] = {}
    for _, part in module.named_modules():
        for param in part._parameters.values():
            if param is not None:
                owners[id(param)] = owners.get(id(param), 0) + 1
    skipped = compiled_parts(module)
    return [
        part
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        and type(part).forward is nn.Embedding.forward
        and "forward" not in part.__dict__
        and id(part) not in skipped
        and type(part.weight) is nn.Parameter
        and owners[id(part.weight)] == 1
        and part.weight.requires_grad
        and part.weight.device.type == "cpu"
        and _is_plain(part)
    ]


def _is_plain(part: nn.Embedding) -> bool:
    return part.max_norm is None and not part.sparse and not part.scale_grad_by_freq


def dense(weight: Tensor, indices: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight as autograd makes it, in its shape."""
    return torch.ops.aten.embedding_dense_backward(grad, indices, weight.shape[0], -1, False)  # type: ignore[no-any-return]


def summed_rows(indices: Tensor, grad: Tensor) -> Rows:
    """Rows that were looked up, each once, ``[n]``, and the sums of their gradients, ``[n, columns]``."""
    rows, places = torch.unique(indices, return_inverse=True)
    return rows, torch.ops.aten.embedding_dense_backward(grad, places, len(rows), -1, False)


__all__ = ["EmbeddingLookup", "EmbeddingRows", "dense", "find_embeddings", "summed_rows"]
