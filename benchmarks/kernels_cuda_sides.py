"""Both sides of ``kernels_cuda.py``: our buffers and kernels, and torch's sequences over the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_cupy import CupySide, scalars, why_not
from kernels_lion import ForeachLion
from paci_rt import kernels
from paci_rt.optim.flat import ALIGNMENT_BYTES

WIDTH = 1024
BLOCK_SHAPES = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,)]
BLOCK_SHAPES += [(WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,)]
WINDOW = 8
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
LION_OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
MOMENTUM_DECAY = 4e-3
MAX_NORM = 1.0
FIRST_STEP = 10
CUPY = ("cupy", "cupy raw")


class Buffers:
    """A flat group with gradients and optimizer state on a device, and the same for torch's optimizer, tensor by
    tensor."""

    def __init__(self, numel: int, device: str) -> None:
        step = ALIGNMENT_BYTES // 2
        self.shapes: list[tuple[int, ...]] = []
        segments, end = [], 0
        while end < numel or not segments:
            shape = BLOCK_SHAPES[len(segments) % len(BLOCK_SHAPES)]
            length = torch.Size(shape).numel()
            self.shapes.append(shape)
            segments.append((end, length))
            end += -(-length // step) * step
        self.count = sum(length for _, length in segments)
        self.layout = kernels.FlatLayout(segments, end, torch.device(device))
        self.grads: list[Tensor | None] = [torch.randn(n, device=device).bfloat16() * 1e-2 for _, n in segments]
        self.flat = {name: torch.randn(end, device=device) for name in ("master", "grad_sum", "exp_avg")}
        self.flat["exp_avg_sq"] = torch.rand(end, device=device)
        self.weight = self.flat["master"].bfloat16()
        self.statistics = kernels.GradientStatistics(self.layout)
        self.rows = {name: kernels.ScalarRows(self.layout) for name in ("adamw", "nadam", "lion")}
        steps, divisor = [FIRST_STEP] * len(segments), float(WINDOW)
        sizes = [nadam_sizes(FIRST_STEP)] * len(segments)
        self.rows["adamw"].set_adamw(steps, divisor=divisor, **OPTIONS)
        self.rows["nadam"].set_nadam(steps, step_sizes=sizes, divisor=divisor, **OPTIONS)
        self.rows["lion"].set_lion(steps, divisor=divisor, **LION_OPTIONS)

    def accumulate(self, *, overwrite: bool = False) -> None:
        """One micro-batch, ours."""
        kernels.accumulate(self.layout, self.statistics, self.flat["grad_sum"], self.grads, overwrite=overwrite)

    def step(self, clip: Tensor | None = None, *, fused: bool = False) -> None:
        """The update, ours; ``fused`` folds the last micro-batch in."""
        grads = self.grads if fused else None
        kernels.adamw_step(self.layout, self.rows["adamw"], weight=self.weight, clip=clip, grads=grads, **self.flat)

    def nadam(self) -> None:
        """NAdam's update, ours."""
        kernels.nadam_step(self.layout, self.rows["nadam"], weight=self.weight, **self.flat)

    def lion(self) -> None:
        """Lion's update, ours."""
        state = {name: self.flat[name] for name in ("master", "grad_sum", "exp_avg")}
        kernels.lion_step(self.layout, self.rows["lion"], weight=self.weight, **state)

    def window(self) -> None:
        """All micro-batches, norm, clipped update; nothing has to be reset."""
        for number in range(WINDOW):
            self.accumulate(overwrite=number == 0)
        self.step(kernels.clip_coefficient([self.statistics.totals()], MAX_NORM, float(WINDOW)))


def nadam_sizes(step: int) -> tuple[float, float]:
    """What NAdam multiplies first moment and gradient with in a step, by torch's formulas."""
    beta1, lr = OPTIONS["betas"][0], OPTIONS["lr"]
    momenta = [beta1 * (1.0 - 0.5 * 0.96 ** (number * MOMENTUM_DECAY)) for number in range(1, step + 2)]
    product = math.prod(momenta[:-1])
    return lr * momenta[-1] / (1.0 - product * momenta[-1]), lr * (1.0 - momenta[-2]) / (1.0 - product)


def torch_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **OPTIONS)


def torch_nadam(params: list[Tensor]) -> torch.optim.Optimizer:
    options = {**OPTIONS, "momentum_decay": MOMENTUM_DECAY, "decoupled_weight_decay": True}
    return torch.optim.NAdam(params, foreach=True, **options)


def foreach_lion(params: list[Tensor]) -> torch.optim.Optimizer:
    return ForeachLion(params, **LION_OPTIONS)


class TorchSide:
    """The best sequence of torch's own: fp32 masters whose ``.grad`` sums up, an optimizer, a cast back to bf16."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        grads: list[Tensor | None],
        device: str,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = torch_adamw,
    ) -> None:
        self.grads = [grad.view(shape) for grad, shape in zip(grads, shapes, strict=True) if grad is not None]
        self.params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        self.weights = [param.detach().bfloat16() for param in self.params]
        for param in self.params:
            param.grad = torch.randn_like(param) * 1e-2
        self.sums = [param.grad for param in self.params if param.grad is not None]
        self.optimizer = make_optimizer([*self.params])
        self.optimizer.step()  # makes the state

    def accumulate(self) -> None:
        """One micro-batch."""
        torch._foreach_add_(self.sums, self.grads)

    def step(self, scale: Any = 1.0 / WINDOW) -> None:
        """Mean, or whatever the sums are to be multiplied by; update, cast and reset."""
        torch._foreach_mul_(self.sums, scale)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, [param.detach() for param in self.params])
        torch._foreach_zero_(self.sums)

    def window(self) -> None:
        """All micro-batches, norm, clipped update, cast and reset, without waiting either."""
        for _ in range(WINDOW):
            self.accumulate()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.sums))) / WINDOW
        self.step((MAX_NORM / (norm + 1e-6)).clamp(max=1.0) / WINDOW)


def cupy_sides(buffers: Buffers) -> tuple[dict[str, CupySide], str | None]:
    """CuPy's two sides over copies of the buffers, or the reason why there are none."""
    reason = why_not() if buffers.layout.device.type == "cuda" else "CuPy has no arrays on the CPU"
    if reason is not None:
        return {}, reason

    def side(*, raw: bool) -> CupySide:
        grads = torch.randn(buffers.layout.numel, device=buffers.layout.device).bfloat16() * 1e-2
        flat = {name: tensor.clone() for name, tensor in buffers.flat.items()}
        values = scalars(FIRST_STEP, float(WINDOW), OPTIONS)
        limits: dict[str, Any] = {"max_norm": MAX_NORM, "micro_batches": WINDOW}
        return CupySide(grads, flat, buffers.weight.clone(), values=values, raw=raw, **limits)

    try:
        return {CUPY[0]: side(raw=False), CUPY[1]: side(raw=True)}, None
    except Exception as error:  # another CuPy than ours: its failure costs its own rows
        return {}, f"CuPy failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
