"""Two small stages trained with and without a pipeline, while somebody changes the modules between the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt

Change = Callable[[int, list[nn.Module], list[torch.optim.Optimizer]], None]
WIDTH, STEPS, ACCUMULATION = 6, 5, 4


def make_stages() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH)),
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)),
    ]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def _values(stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {
        f"{at}.{name}": param.detach().clone()
        for at, stage in enumerate(stages)
        for name, param in stage.named_parameters()
    }


def nothing(stages: list[nn.Module]) -> None:
    pass


def plain(change: Change, before: Callable[[list[nn.Module]], None] = nothing) -> dict[str, Tensor]:
    """Torch alone: micro-batch after micro-batch through both stages; ``before`` comes first of all."""
    stages = make_stages()
    before(stages)
    optimizers = [adamw(stage.parameters()) for stage in stages]
    for step in range(STEPS):
        change(step, stages, optimizers)
        x, y = batch(step)
        for x_part, y_part in zip(x.tensor_split(ACCUMULATION), y.tensor_split(ACCUMULATION), strict=True):
            hidden = x_part
            for stage in stages:
                hidden = stage(hidden)
            loss_fn(hidden, y_part).backward()
        for param in (param for stage in stages for param in stage.parameters()):
            if param.grad is not None:
                param.grad.div_(ACCUMULATION)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return _values(stages)


def pipelined(
    change: Change, schedule: str = "1f1b", before: Callable[[list[nn.Module]], None] = nothing, **options: Any
) -> dict[str, Tensor]:
    """The same under a schedule."""
    stages = make_stages()
    before(stages)
    optimizers = [adamw(stage.parameters()) for stage in stages]
    pipe = paci_rt.LocalPipeline(
        stages, schedule=schedule, n_microbatches=ACCUMULATION, loss_fn=loss_fn, optimizer=optimizers, **options
    )
    for step in range(STEPS):
        change(step, stages, optimizers)
        x, y = batch(step)
        pipe.step(x, target=y)
    pipe.drain()
    values = _values([stage.submod for stage in pipe.stages])
    pipe.close()
    return values
