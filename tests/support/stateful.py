"""Models with state beside their parameters, and how they are trained, for tests of what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt

WIDTH = 4


class Experts(nn.Module):
    """A bias that balances experts, as mixtures keep it: a buffer that each forward replaces, and one not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.zeros(WIDTH))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) + self.bias
        if self.training:
            self.bias = self.bias + 0.1 * torch.sign(x.detach().mean(0))
        return x


class Counting(nn.Module):
    """Extra state: a Python number and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen, self.peak = nn.Linear(WIDTH, WIDTH), 0, torch.zeros(())
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen, self.peak = self.seen + 1, torch.maximum(self.peak, x.detach().abs().max())
        return self.linear(x) / (1 + 0.01 * self.seen + self.peak)  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "peak": self.peak}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        if self.fails and state["seen"]:
            raise RuntimeError("not this one")
        self.peak = state["peak"]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "spectral-norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "experts": Experts,
    "extra-state": Counting,
}


class Blocks(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.values():
            x = torch.tanh(block(x))
        return x


def cut(block: str, sizes: list[int]) -> list[nn.Module]:
    stages, at = [], 0
    for size in sizes:
        blocks: dict[str, nn.Module] = {}
        for number in range(at, at + size):
            torch.manual_seed(number)
            blocks[f"block{number}"] = BLOCKS[block]()
        stages.append(Blocks(blocks))
        at += size
    return stages


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return paci_rt.AdamW(params, lr=1e-2)


def pipeline(
    block: str = "batch-norm",
    sizes: list[int] | None = None,
    schedule: str = "1f1b",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adamw,
    lr_scheduler: Any = None,
) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        cut(block, sizes or [1, 2]),
        schedule=schedule,
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda named: optimizer([param for _, param in named]),
        lr_scheduler=lr_scheduler,
    )


def train(pipe: Any, windows: range) -> None:
    for window in windows:
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(window))
        args = (x,) if pipe.has_first else ()
        pipe.step(*args, target=x.flip(0) if pipe.has_last else None, return_outputs=False)


def flat(value: Any) -> Any:
    """A state to compare: tensors as bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return value


def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return paci_rt.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.2},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0, "name": "plain"},
        ],
        lr=1e-2,
    )


def groups(pipe: Any, stage: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pipe._optimizers[stage].optimizer.param_groups
    return found
