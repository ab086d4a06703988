"""Modules whose linear layers are calls on parameters, and what of them is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.split_modules import WIDTH


def matrix(rows: int = WIDTH, columns: int = WIDTH) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * 0.2)


class Calls(nn.Module):
    """Owns two matrices and a bias; ``how`` computes with them."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = matrix(), matrix()
        self.bias = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.register_buffer("constant", torch.randn(WIDTH) * 0.1)
        self._how = how

    def forward(self, x: Tensor) -> Tensor:
        return self._how(self, x)


class LowRank(nn.Linear):
    """A layer with two factors beside its weight."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = matrix(3, WIDTH), matrix(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([matrix(), matrix()])
        self.named = nn.ParameterDict({"last": matrix()})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(F.linear(x, weight))
        return F.linear(x, self.named["last"])


class OwnEmbedding(nn.Module):
    """A weight that is read as a table too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = matrix()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.embedding(x.argmax(-1), self.table) + x, self.table)


class Outer(nn.Module):
    """A scope within a scope, and layers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix()
        self.inner = Calls(lambda self, x: F.linear(x, self.one, self.bias))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(self.inner(x)), self.weight)


class CheckpointedBlocks(nn.Module):
    """Of a scope that is checkpointed as a whole, and of a part of one."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.weight, self.part = matrix(), matrix()
        self.whole = Calls(lambda self, x: F.linear(x, self.one, self.bias))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight)
        x = checkpoint(self.whole, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return checkpoint(lambda y: torch.tanh(F.linear(y, self.part)), x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def scaled(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.one / self.one.norm()) + F.linear(x, self.two)


def thrice(self: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(F.linear(x, self.one, self.bias))
    return x


def cast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = F.linear(x, self.one).float()
    return F.linear(x, self.two)


def frozen() -> nn.Module:
    module = Calls(lambda self, x: F.linear(F.linear(x, self.one, self.bias), self.two))
    module.one.requires_grad_(False)
    return module


def rows(self: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, WIDTH)
    return torch.mm(torch.addmm(self.bias, flat, self.one).tanh(), self.two).view(x.shape)


# What each module is, and the weights whose calls are split.
FUNCTIONAL: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "F.linear": (
        lambda: Calls(lambda self, x: F.linear(torch.relu(F.linear(x, self.one, self.bias)), self.two)),
        ["one", "two"],
    ),
    "by keyword": (lambda: Calls(lambda self, x: F.linear(input=x, bias=self.bias, weight=self.one)), ["one"]),
    "aten": (lambda: Calls(lambda self, x: torch.ops.aten.linear(x, self.one, self.bias)), []),
    "aten, overload": (lambda: Calls(lambda self, x: torch.ops.aten.linear.default(x, self.one)), ["one"]),
    "matmul": (lambda: Calls(lambda self, x: torch.matmul(x, self.one) + x.matmul(self.two)), ["one", "two"]),
    "@": (lambda: Calls(lambda self, x: torch.tanh(x @ self.one) @ self.two + self.bias), ["one", "two"]),
    "addmm and mm": (lambda: Calls(rows), ["one", "two"]),
    "addmm, scaled": (
        lambda: Calls(lambda self, x: torch.addmm(self.bias, x.view(-1, WIDTH), self.one, alpha=2).view(x.shape)),
        [],
    ),
    "constant bias": (lambda: Calls(lambda self, x: F.linear(x, self.one, self.constant)), ["one"]),
    "computed bias": (lambda: Calls(lambda self, x: F.linear(x, self.one, 2 * self.bias)), []),
    "computed weight": (lambda: Calls(scaled), ["two"]),
    "used three times": (lambda: Calls(thrice), ["one"]),
    "transposed": (lambda: Calls(lambda self, x: x @ self.one.t() + F.linear(x, self.two)), ["two"]),
    "one weight, both ways": (lambda: Calls(lambda self, x: torch.tanh(x @ self.one) + F.linear(x, self.one)), ["one"]),
    "read elsewhere": (lambda: Calls(lambda self, x: F.linear(x, self.one) + self.one.square().mean(0)), ["one"]),
    "input is a parameter": (
        lambda: Calls(lambda self, x: x + F.linear(self.two, self.one).mean(0) + F.linear(x, self.two)),
        ["one", "two"],
    ),
    "autocast in part": (lambda: Calls(cast), ["one", "two"]),
    "partly frozen": (frozen, ["two"]),
    "subclass of Linear": (LowRank, ["", "down", "up"]),
    "lists": (Lists, ["weights.0", "weights.1", "named.last"]),
    "own embedding": (OwnEmbedding, ["table"]),
    "nested": (Outer, ["layer", "inner.one", ""]),  # its own ".weight"
    "checkpoint": (lambda: CheckpointedBlocks(False), ["", "whole.one"]),
    "reentrant checkpoint": (lambda: CheckpointedBlocks(True), ["", "whole.one"]),
}
