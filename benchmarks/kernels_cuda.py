"""Cases of ``kernels.py --device cuda``: the Triton kernels against torch's sequences, CuPy, and plain copying.

A case's bandwidth is what its kernel must move at least (``paci_rt.kernels.*_bytes``) over its time; the yardstick is a
device-to-device copy in the same run. Buffers hold parameters of the shapes of GPT-2 Medium's blocks, as many as fill
``--megabytes`` of fp32, and every side works on its own.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paci_rt import kernels
from paci_rt.flat import ALIGNMENT_BYTES
from paci_rt.kernels.wgrad import CUBLAS

WIDTH = 1024
BLOCK_SHAPES = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,)]
BLOCK_SHAPES += [(WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,)]
LINEAR_SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
WINDOW = 8
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class CudaCase:
    """One job done by us and by others.

    Attributes:
        name: what is done.
        bytes_moved: bytes that our side must move at least.
        ours: does it once.
        rivals: the others, by name.
        copy_share: least share of the copy bandwidth that is asked of our side, None where none is.
        ratio: least time of ``ratio_to`` over ours that is asked, None where none is.
        ratio_to: names of the rivals that it is asked against; the fastest of them counts.
    """

    name: str
    bytes_moved: int
    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
    copy_share: float | None = None
    ratio: float | None = None
    ratio_to: tuple[str, ...] = ()


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
        self.rows = kernels.ScalarRows(self.layout)
        self.rows.set_adamw([10] * len(segments), divisor=float(WINDOW), **OPTIONS)

    def accumulate(self, *, overwrite: bool = False) -> None:
        """One micro-batch, ours."""
        kernels.accumulate(self.layout, self.statistics, self.flat["grad_sum"], self.grads, overwrite=overwrite)

    def step(self, clip: Tensor | None = None, *, fused: bool = False) -> None:
        """The update, ours; ``fused`` folds the last micro-batch in."""
        grads = self.grads if fused else None
        kernels.adamw_step(self.layout, self.rows, weight=self.weight, clip=clip, grads=grads, **self.flat)

    def window(self) -> None:
        """All micro-batches, norm, clipped update; nothing has to be reset."""
        for number in range(WINDOW):
            self.accumulate(overwrite=number == 0)
        self.step(kernels.clip_coefficient([self.statistics.totals()], MAX_NORM, float(WINDOW)))


class TorchSide:
    """The best sequence of torch's own: fp32 masters whose ``.grad`` sums up, a fused AdamW, a cast back to bf16."""

    def __init__(self, shapes: list[tuple[int, ...]], grads: list[Tensor | None], device: str) -> None:
        self.grads = [grad.view(shape) for grad, shape in zip(grads, shapes, strict=True) if grad is not None]
        self.params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        self.weights = [param.detach().bfloat16() for param in self.params]
        for param in self.params:
            param.grad = torch.randn_like(param) * 1e-2
        self.sums = [param.grad for param in self.params if param.grad is not None]
        self.optimizer = torch.optim.AdamW(self.params, fused=True, **OPTIONS)
        self.optimizer.step()  # makes the state

    def accumulate(self) -> None:
        """One micro-batch."""
        torch._foreach_add_(self.sums, self.grads)

    def step(self) -> None:
        """Mean, update, cast and reset."""
        torch._foreach_mul_(self.sums, 1.0 / WINDOW)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, [param.detach() for param in self.params])
        torch._foreach_zero_(self.sums)

    def window(self) -> None:
        """All micro-batches, norm, clipped update, cast and reset, without waiting either."""
        for _ in range(WINDOW):
            self.accumulate()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.sums))) / WINDOW
        torch._foreach_mul_(self.sums, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        self.step()


def cupy_rivals(buffers: Buffers) -> dict[str, Callable[[], object]]:
    """``accumulate`` and ``adamw`` as CuPy ElementwiseKernels over the flat buffers, which it sees without a copy;
    empty where CuPy is not installed."""
    if importlib.util.find_spec("cupy") is None or not torch.cuda.is_available():
        return {}
    import cupy  # type: ignore[import-not-found, unused-ignore]

    grad_bits = torch.randn(buffers.layout.numel, device="cuda").bfloat16().view(torch.int16)
    low = buffers.weight.clone().view(torch.int16)
    flat = {name: cupy.from_dlpack(tensor.clone()) for name, tensor in buffers.flat.items()}
    grads, weight = cupy.from_dlpack(grad_bits), cupy.from_dlpack(low)
    widen = "__uint_as_float(((unsigned int)(unsigned short)g) << 16)"
    add = cupy.ElementwiseKernel("int16 g", "float32 total", f"total = total + {widen}", "paci_rt_add")
    body = """
        float gradient = total / divisor;
        m = m + c1 * (gradient - m);
        v = v * b2 + (c2 * gradient) * gradient;
        w = w * decay - step * m / (sqrtf(v) * unbias + eps);
        unsigned int bits = __float_as_uint(w);
        low = (short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);"""
    scalars = "float32 divisor, float32 decay, float32 c1, float32 b2, float32 c2, float32 unbias, float32 eps"
    update = cupy.ElementwiseKernel(
        f"float32 total, {scalars}, float32 step", "float32 w, float32 m, float32 v, int16 low", body, "paci_rt_adamw"
    )

    def step() -> None:
        values = (WINDOW, 1 - 1e-5, 0.1, 0.999, 0.001, 10.0, 1e-8, 1.5e-3)
        state = (flat["master"], flat["exp_avg"], flat["exp_avg_sq"], weight)
        update(flat["grad_sum"], *map(cupy.float32, values), *state)

    def window() -> None:
        for _ in range(WINDOW):
            add(grads, flat["grad_sum"])
        cupy.multiply(flat["grad_sum"], 1 / (1 + cupy.linalg.norm(flat["grad_sum"])), out=flat["grad_sum"])
        step()
        flat["grad_sum"].fill(0)

    return {"accumulate": lambda: add(grads, flat["grad_sum"]), "adamw": step, "window": window}


def flat_cases(numel: int, device: str) -> list[CudaCase]:
    """Accumulation and updates."""
    buffers = Buffers(numel, device)
    torch_side = TorchSide(buffers.shapes, buffers.grads, device)
    cupy_side = cupy_rivals(buffers)
    count, low = buffers.count, torch.bfloat16
    adding = kernels.accumulate_bytes(count, low, overwrite=False)
    first = kernels.accumulate_bytes(count, low, overwrite=True)
    update = kernels.adamw_bytes(count, low)

    def rivals(job: str, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
        return {"torch": run, **({"cupy": cupy_side[job]} if job in cupy_side else {})}

    def clear_and_add() -> None:
        torch._foreach_zero_(torch_side.sums)
        torch_side.accumulate()

    return [
        CudaCase(
            name="accumulate bf16",
            bytes_moved=adding,
            ours=buffers.accumulate,
            rivals=rivals("accumulate", torch_side.accumulate),
            copy_share=0.92,
        ),
        CudaCase(
            name="overwrite bf16",
            bytes_moved=first,
            ours=lambda: buffers.accumulate(overwrite=True),
            rivals={"torch": clear_and_add},
        ),
        CudaCase(
            name="adamw bf16",
            bytes_moved=update,
            ours=buffers.step,
            rivals=rivals("adamw", torch_side.step),
            copy_share=0.92,
        ),
        CudaCase(
            name="adamw bf16 + last gradients",
            bytes_moved=kernels.adamw_bytes(count, low, fused_gradient=True),
            ours=lambda: buffers.step(fused=True),
        ),
        CudaCase(
            name=f"window of {WINDOW}",
            bytes_moved=first + (WINDOW - 1) * adding + update,
            ours=buffers.window,
            rivals=rivals("window", torch_side.window),
            ratio=1.5,
            ratio_to=("torch",),
        ),
    ]


def wgrad_case(rows: int, n: int, k: int, device: str) -> CudaCase:
    """The fused weight gradient by its fastest route, against a bf16 product that is accumulated, and cuBLAS alone."""
    dy = torch.randn(rows, n, device=device).bfloat16()
    x = torch.randn(rows, k, device=device).bfloat16()
    front, total = torch.zeros(n, k, device=device), torch.zeros(n, k, device=device)
    routes = kernels.WgradRoutes()
    routes(front, dy, x, overwrite=True)
    rivals: dict[str, Callable[[], object]] = {"torch": lambda: total.add_(dy.t() @ x)}
    for route in kernels.routes_for(dy.dtype, dy.device):
        name = CUBLAS if route == CUBLAS else "triton"
        if name not in rivals:
            rivals[name] = lambda route=route: kernels.wgrad(front, dy, x, overwrite=False, route=route)  # type: ignore[misc]
    return CudaCase(
        name=f"wgrad {rows}x{n}x{k}",
        bytes_moved=kernels.wgrad_bytes(rows, n, k, dy.dtype, overwrite=False, bias=False),
        ours=lambda: routes(front, dy, x, overwrite=False),
        rivals=rivals,
        ratio=1.10,
        ratio_to=("torch",),
    )


def time_ms(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, by events on the device."""
    if device == "cpu":
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth(numel: int, rounds: int, device: str) -> float:
    """GB/s of a device-to-device copy of ``numel`` fp32, counting what is read and what is written."""
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    times = [time_ms(lambda: target.copy_(source), device) for _ in range(rounds + 3)][3:]
    return 2 * source.nbytes / statistics.median(times) / 1e6


def run_case(case: CudaCase, rounds: int, copy_gb_per_s: float, device: str) -> dict[str, Any]:
    """All sides in turn, ``rounds`` times; medians, and medians of the ratios within a round."""
    sides = {"ours": case.ours, **case.rivals}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 3):
        for name, run in sides.items():
            elapsed = time_ms(run, device)
            if number >= 3:  # the first ones compile and fill caches of addresses
                times[name].append(elapsed)
    ours_ms = statistics.median(times["ours"])
    ratios = {
        name: statistics.median(theirs / ours for ours, theirs in zip(times["ours"], times[name], strict=True))
        for name in case.rivals
    }
    share = case.bytes_moved / ours_ms / 1e6 / copy_gb_per_s
    asked = min((ratios[name] for name in case.ratio_to if name in ratios), default=None)
    ok = (case.copy_share is None or share >= case.copy_share) and (
        case.ratio is None or asked is None or asked >= case.ratio
    )
    return {
        "case": case.name,
        "ours_ms": ours_ms,
        "rivals_ms": {name: statistics.median(times[name]) for name in case.rivals},
        "gb_per_s": case.bytes_moved / ours_ms / 1e6,
        "copy_share": share,
        "copy_share_target": case.copy_share,
        "ratios": ratios,
        "ratio_target": case.ratio,
        "ok": ok,
    }


def run_all(numel: int, rounds: int, *, only: str = "", rows: int = 8192, device: str = "cuda") -> list[dict[str, Any]]:
    """Run and print every case whose name contains ``only``; returns a row a case, the copy first."""
    bandwidth = copy_bandwidth(numel, rounds, device)
    print(f"{'device-to-device copy':30s} {bandwidth:29.1f} GB/s")
    print(f"{'case':30s} {'ours ms':>9s} {'GB/s':>8s} {'of copy':>8s}  rivals: time over ours")
    done: list[dict[str, Any]] = [{"case": "copy", "gb_per_s": bandwidth, "ok": True}]

    def judge(case: CudaCase) -> None:
        if only not in case.name:
            return
        row = run_case(case, rounds, bandwidth, device)
        done.append(row)
        others = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        print(
            f"{row['case']:30s} {row['ours_ms']:9.3f} {row['gb_per_s']:8.1f} {row['copy_share']:8.2f}  {others}"
            f"{'' if row['ok'] else '  MISSED'}",
            flush=True,
        )

    for case in flat_cases(numel, device):
        judge(case)
    for n, k in LINEAR_SHAPES:
        if only in f"wgrad {rows}x{n}x{k}":
            judge(wgrad_case(rows, n, k, device))
    return done
