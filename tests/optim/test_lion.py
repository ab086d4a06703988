"""Lion against its definition, written as a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import paci_rt
from paci_rt import native
from support.optimizers import bind, make_module, random_windows, run_windows

ISAS = native.info()["isas"]


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    native.set_isa("auto")
    native.set_num_threads(None)


def plain_lion(
    weights: list[Tensor],
    windows: list[list[list[Tensor]]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momenta after ``windows``; one rounding an operation, as in the kernel."""
    weights = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for window in windows:
        for at, grads in enumerate(zip(*window, strict=True)):
            total = grads[0].clone()
            for grad in grads[1:]:
                total += grad
            mean = total / (-len(window) if maximize else len(window))
            sign = (betas[0] * momenta[at] + (1 - betas[0]) * mean).sign()
            weights[at] = weights[at] * (1 - lr * weight_decay) - lr * sign
            momenta[at] = betas[1] * momenta[at] + (1 - betas[1]) * mean
    return weights, momenta


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3},
        {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.3},
        {"lr": 1e-2, "betas": (0.0, 0.5), "weight_decay": 0.1, "maximize": True},
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 3, 4])
@pytest.mark.parametrize("isa", ISAS)
def test_bits_are_those_of_the_definition(isa: str, micro_batches: int, options: dict[str, Any]) -> None:
    native.set_isa(isa)
    native.set_num_threads(2)
    module = make_module()
    params = list(module.parameters())
    windows = random_windows(module, micro_batches)
    weights, momenta = plain_lion(params, windows, **options)
    optimizer = paci_rt.Lion(params, **options)
    run_windows(bind(optimizer, module), params, windows)
    for param, weight, momentum in zip(params, weights, momenta, strict=True):
        assert torch.equal(param, weight)
        assert set(optimizer.state[param]) == {"exp_avg"}
        assert torch.equal(optimizer.state[param]["exp_avg"], momentum)


def test_zero_has_no_sign_and_nan_is_not_hidden() -> None:
    module = make_module()
    params = list(module.parameters())
    before = [param.detach().clone() for param in params]
    bound = bind(paci_rt.Lion(params, lr=0.1), module)
    grads = [torch.zeros_like(param) for param in params]
    grads[0][3, 5] = torch.nan
    run_windows(bound, params, [[grads]])
    assert params[0].isnan().nonzero().tolist() == [[3, 5]]
    assert all(torch.equal(param, old) for param, old in zip(params[1:], before[1:], strict=True))
