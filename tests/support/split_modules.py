"""Modules whose linear layers are split, or have to be left alone, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS = 24, 12


class Conv1D(nn.Module):
    """Hugging Face's layer: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.linear(x))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.linear(x))
        return x


class SharedWeight(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


class TiedToEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x.argmax(-1)) + x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class CompiledFunction(nn.Module):
    """A compiled function around layers of this module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.compiled = torch.compile(lambda x: self.two(torch.tanh(self.one(x))), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.compiled(x)  # type: ignore[no-any-return]


def compiled_block() -> nn.Module:
    block: nn.Module = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), backend="aot_eager")  # type: ignore[assignment]
    return nn.Sequential(block, nn.Linear(WIDTH, WIDTH))


def compiled_in_place() -> nn.Module:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    block.compile(backend="aot_eager")
    return nn.Sequential(block, nn.Linear(WIDTH, WIDTH))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    module[0].weight.requires_grad_(False)
    module[1].bias.requires_grad_(False)  # type: ignore[union-attr]
    return module


# What each module is, and the layers that are split.
MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)), ["0", "2"]),
    "no bias": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH)), ["0"]),
    "conv1d": (lambda: nn.Sequential(Conv1D(40, WIDTH), nn.Tanh(), Conv1D(WIDTH, 40)), ["0", "2"]),
    "custom function": (Custom, ["linear"]),
    "used three times": (Twice, ["linear"]),
    "shared weight": (SharedWeight, ["one", "two"]),
    "tied to an embedding": (TiedToEmbedding, []),
    "attention": (Attention, ["attention.out_proj"]),
    "checkpoint": (lambda: Checkpointed(False), ["block.0", "block.2"]),
    "reentrant checkpoint": (lambda: Checkpointed(True), ["block.0", "block.2"]),
    "compiled function": (CompiledFunction, ["one", "two"]),
    "compiled block": (compiled_block, ["1"]),
    "module.compile()": (compiled_in_place, ["1"]),
    "no parameters": (nn.Tanh, []),
    "partly frozen": (frozen, ["1"]),
}


class Anchor(nn.Module):
    """Around the module in question: something to train in front, so that its input needs a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)  # type: ignore[no-any-return]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = (ROWS, 5, WIDTH)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(3)]


def modules_of(name: str) -> list[nn.Module]:
    torch.manual_seed(7)
    return [Anchor(MODULES[name][0]()), Anchor(MODULES[name][0]())]
