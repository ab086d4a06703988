"""A small module whose optimizers are run over random windows, beside torch's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.optim import SGD
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.stage_optimizer import StageOptimizer

STEPS = 12
torch_nadam = functools.partial(torch.optim.NAdam, decoupled_weight_decay=True)


def momentum_sgd(params: Any) -> SGD:
    return SGD(params, momentum=0.9)


def make_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(37, 50), nn.LayerNorm(50), nn.Linear(50, 11)).to(dtype)


def bind(optimizer: Any, module: nn.Module, **options: Any) -> StageOptimizer:
    return bind_optimizer(optimizer, dict(module.named_parameters()), **options)


def run_windows(
    bound: StageOptimizer, params: list[nn.Parameter], windows: list[list[list[Tensor]]], divisor: int | None = None
) -> None:
    """windows[k][m][i]: gradient of parameter i in micro-batch m of window k."""
    for window in windows:
        for micro_batch in window:
            for param, grad in zip(params, micro_batch, strict=True):
                bound.accumulate(param, grad)
        bound.update(divisor or len(window))


def random_windows(module: nn.Module, micro_batches: int, steps: int = STEPS) -> list[list[list[Tensor]]]:
    def scale() -> float:
        return 10 ** float(torch.empty(1).uniform_(-3, 1))

    return [
        [[torch.randn_like(param) * scale() for param in module.parameters()] for _ in range(micro_batches)]
        for _ in range(steps)
    ]


def run_torch(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], windows: list[list[list[Tensor]]]) -> None:
    """A plain accumulation loop in the dtype of ``params``."""
    for window in windows:
        for param, *grads in zip(params, *window, strict=True):
            param.grad = grads[0].to(param.dtype, copy=True)
            for grad in grads[1:]:
                param.grad += grad
            param.grad /= len(window)
        optimizer.step()


def distance(x: Tensor, reference: Tensor) -> float:
    return float((x.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())
