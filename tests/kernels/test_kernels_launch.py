"""Launches as on a GPU, up to the driver: Triton binds the wrappers' own arguments, specialises and compiles.

The interpreter binds arguments in another way, and compiling ahead of time makes them up. Here a driver stands in that
only says what it is, a GPU of compute capability 9.0; tensors are on the CPU, and nothing reads them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from paci_rt.kernels import (
    GradientStatistics,
    ScalarRows,
    accumulate,
    adamw_ahead,
    adamw_step,
    lion_step,
    nadam_step,
    sgd_step,
    wgrad,
)
from paci_rt.kernels.layout import Entries
from paci_rt.kernels.wgrad import TRITON_ROUTES
from support.flat_toy import Flat
from support.groups import Group

LENGTHS = (5000, 1, 48, 1023)
BETAS = (0.9, 0.95)


class Launches(list[str]):
    """Names of the kernels that were launched, and the compilations behind them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, dict[int, Any]] = {}

    def counts(self) -> dict[str, int]:
        return {name: len(made) for name, made in self.made.items()}


class FakeDriver:
    """Of a device with a number that no real one has, whose compilations would be mixed with those here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 7001

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    seen, run = Launches(), JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert len(grid) == 1 and 0 < grid[0] < 1 << 31
        made = run(self, *args, grid=grid, warmup=True, **options)
        seen.append(self.fn.__name__)
        seen.made.setdefault(self.fn.__name__, {})[id(made)] = made

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for name in ("layout", "wgrad"):
        module = importlib.import_module(f"paci_rt.kernels.{name}")
        monkeypatch.setattr(module, "check_runs_on", lambda device, what: None)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(FakeDriver())
    try:
        yield seen
    finally:
        triton.runtime.driver._active = before


def test_steps_compile_nothing_new(launches: Launches) -> None:
    """Learning rates, step numbers, divisors, coefficients, overwriting, addresses and the parameters that take part
    change from step to step, and none of them reaches the compiler."""
    group = Group("cpu", torch.bfloat16, LENGTHS)
    layout, count = group.flat.layout, len(LENGTHS)
    rows, ahead, state = ScalarRows(layout), ScalarRows(layout, 3), group.buffers()
    statistics, front = GradientStatistics(layout), group.flat.random()
    momenta = {name: value for name, value in state.items() if name != "exp_avg_sq"}
    for step in (1, 2, 16, 17):
        steps, scalars = [step + 1] * count, {"weight_decay": 0.1 / step, "divisor": float(step), "lr": 1.0 / step}
        grads = group.flat.grads(torch.bfloat16)
        accumulate(layout, statistics, front, grads, overwrite=step == 1)
        clip, only = (torch.ones(1), None) if step % 2 else (None, [0, 2])
        rows.set_adamw(steps, betas=BETAS, eps=1e-8, **scalars)
        adamw_step(layout, rows, clip=clip, only=only, **state)
        adamw_step(layout, rows, clip=clip, only=only, grads=grads, overwrite=step == 2, **state)
        ahead.set_adamw(steps, betas=BETAS, eps=1e-8, **scalars)
        adamw_ahead(layout, ahead, kept=None, only=only, **state)
        rows.set_nadam(steps, step_sizes=[(1.0, 1.0)] * count, betas=BETAS, eps=1e-8, **scalars)
        nadam_step(layout, rows, clip=clip, only=only, **state)
        rows.set_lion(steps, betas=BETAS, **scalars)
        lion_step(layout, rows, clip=clip, only=only, **momenta)
        rows.set_sgd(steps, momentum=0.9, dampening=0.0, nesterov=False, **scalars)
        buffers = {"momentum_buffer" if name == "exp_avg" else name: value for name, value in momenta.items()}
        sgd_step(layout, rows, clip=clip, only=only, **buffers)
        statistics.totals()
    assert launches.counts() == {
        "entries_kernel": 1,
        "accumulate_kernel": 1,
        "adamw_kernel": 3,  # alone, with last gradients, NAdam's
        "adamw_ahead_kernel": 1,
        "lion_kernel": 1,
        "sgd_kernel": 1,
        "totals_kernel": 1,
    }


def test_addresses_go_as_64_bits(launches: Launches) -> None:
    """Whatever they are: 0 where there is no gradient, 1 where none is but the flag, beyond 32 and 47 bits."""
    present = [torch.zeros(1) for _ in range(2)]
    Entries.fresh(present, [1, 0, 2])
    Entries.fresh(present[:1], [0] * 40 + [1])
    assert launches == ["entries_kernel"] * 3
    (made,) = launches.made["entries_kernel"].values()
    signature = dict(made.src.signature)
    assert {signature[f"p{index}"] for index in range(32)} == {"i64"}
    assert (signature["first"], signature["count"]) == ("i32", "i32")


@pytest.mark.parametrize("route", TRITON_ROUTES)
def test_weight_gradients_compile_once_a_shape(launches: Launches, route: str) -> None:
    """For any number of rows, overwriting or adding; rows and strides are those that the kernel takes as wide ones."""
    front, bias = torch.zeros(64, 32), torch.zeros(64)
    for rows, overwrite in ((1, True), (16, False), (77, True)):
        dy, x = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(rows, 32, dtype=torch.bfloat16)
        wgrad(front, dy, x, overwrite=overwrite, bias=bias, route=route)
    assert launches.counts() == {"wgrad_kernel": 1}
    (made,) = launches.made["wgrad_kernel"].values()
    signature = dict(made.src.signature)
    assert (signature["stride_dy"], signature["stride_x"], signature["rows"]) == ("i64", "i64", "i32")
    assert "wgmma" in made.asm["ptx"]


def test_gradients_at_odd_addresses_compile_a_second_kernel(launches: Launches) -> None:
    flat = Flat(LENGTHS, "cpu")
    statistics, front = GradientStatistics(flat.layout), flat.random()
    grads = flat.grads(torch.bfloat16)
    for shift in (0, 1, 3):
        grads[-1] = torch.zeros(LENGTHS[-1] + shift, dtype=torch.bfloat16)[shift:]
        accumulate(flat.layout, statistics, front, grads, overwrite=False)
    assert launches.counts()["accumulate_kernel"] == 2
