"""CuPy as a rival of ``kernels_cuda.py``: accumulation, AdamW and a whole window over flat buffers.

Twice: ``ElementwiseKernel``, as one writes it in a few lines, and ``RawKernel``, CUDA C++ with accesses as wide as
ours.
Both get what we give ourselves: the first micro-batch overwrites, the clip coefficient stays on the device. CuPy sees
torch's buffers by DLPack, without a copy; bf16 travels as the integers of its bits, since not every CuPy has it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

INSTALL = "cupy not installed: pip install cupy-cuda{major}x"
THREADS, BLOCKS = 256, 4096

WIDEN = "__uint_as_float(((unsigned int)(unsigned short)g) << 16)"
STEP = """
    float gradient = total * clip[0] / divisor;
    m = m + c1 * (gradient - m);
    v = v * b2 + (c2 * gradient) * gradient;
    w = w * decay - step * m / (sqrtf(v) * unbias + eps);
    unsigned int bits = __float_as_uint(w);
    low = (short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
"""
SCALARS = ("divisor", "decay", "c1", "b2", "c2", "unbias", "eps", "step")

SOURCE = r"""
__device__ float high(unsigned int pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ float low(unsigned int pair) { return __uint_as_float(pair << 16); }
__device__ unsigned int rounded(float x) {
  unsigned int bits = __float_as_uint(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

extern "C" __global__ void accumulate(const uint2* g, float4* total, long long quads, int overwrite) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < quads; i += stride) {
    const uint2 pairs = g[i];
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!overwrite) sum = total[i];
    sum.x += low(pairs.x);
    sum.y += high(pairs.x);
    sum.z += low(pairs.y);
    sum.w += high(pairs.y);
    total[i] = sum;
  }
}

struct Scalars { float divisor, decay, c1, b2, c2, unbias, eps, step; };

__device__ void update(float total, float& w, float& m, float& v, float clip, const Scalars& s) {
  const float gradient = total * clip / s.divisor;
  m = m + s.c1 * (gradient - m);
  v = v * s.b2 + (s.c2 * gradient) * gradient;
  w = w * s.decay - s.step * m / (sqrtf(v) * s.unbias + s.eps);
}

extern "C" __global__ void adamw(const float4* total, const float* clip, float4* w, float4* m, float4* v, uint2* out,
                                 long long quads, float divisor, float decay, float c1, float b2, float c2,
                                 float unbias, float eps, float step) {
  const Scalars s = {divisor, decay, c1, b2, c2, unbias, eps, step};
  const float coefficient = clip[0];
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < quads; i += stride) {
    const float4 t = total[i];
    float4 weight = w[i], first = m[i], second = v[i];
    update(t.x, weight.x, first.x, second.x, coefficient, s);
    update(t.y, weight.y, first.y, second.y, coefficient, s);
    update(t.z, weight.z, first.z, second.z, coefficient, s);
    update(t.w, weight.w, first.w, second.w, coefficient, s);
    w[i] = weight;
    m[i] = first;
    v[i] = second;
    uint2 low16;
    low16.x = rounded(weight.x) | (rounded(weight.y) << 16);
    low16.y = rounded(weight.z) | (rounded(weight.w) << 16);
    out[i] = low16;
  }
}
"""
"""Buffers of a multiple of four elements, at addresses that are multiples of 16."""


def why_not() -> str | None:
    """Why CuPy cannot be a rival here, None where it can."""
    major = (torch.version.cuda or "13").split(".")[0]
    for name in (f"cupy-cuda{major}x", "cupy-cuda13x", "cupy-cuda12x", "cupy"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        break
    else:
        return INSTALL.format(major=major)
    try:
        import cupy  # type: ignore[import-not-found, unused-ignore]

        cupy.zeros(1)
    except Exception as error:  # whatever keeps it from running is the reason
        return f"{name} does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def scalars(step: int, divisor: float, options: dict[str, Any]) -> list[float]:
    """Of AdamW, in the order of ``SCALARS``."""
    (beta1, beta2), lr = options["betas"], options["lr"]
    return [
        divisor,
        1.0 - lr * options["weight_decay"],
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        (1.0 - beta2**step) ** -0.5,
        options["eps"],
        lr / (1.0 - beta1**step),
    ]


class CupySide:
    """Flat buffers and their kernels.

    Args:
        grads: bf16 [n], of one micro-batch.
        flat: fp32 [n] each: ``grad_sum``, ``master``, ``exp_avg``, ``exp_avg_sq``.
        weight: bf16 [n].
        values: see :func:`scalars`.
        max_norm: the whole gradient is clipped to it, in :meth:`window`.
        micro_batches: of a window.
        raw: ``RawKernel`` in place of ``ElementwiseKernel``.
    """

    def __init__(
        self,
        grads: Tensor,
        flat: dict[str, Tensor],
        weight: Tensor,
        *,
        values: list[float],
        max_norm: float,
        micro_batches: int,
        raw: bool,
    ) -> None:
        import cupy

        self._grads, self._weight = (cupy.from_dlpack(tensor.view(torch.int16)) for tensor in (grads, weight))
        self._flat = {name: cupy.from_dlpack(tensor) for name, tensor in flat.items()}
        self._state = [self._flat[name] for name in ("master", "exp_avg", "exp_avg_sq")]
        self._scalars = [cupy.float32(value) for value in values]
        self._micro_batches = micro_batches
        self._quads = cupy.int64(grads.numel() // 4)
        self._one, self._clip = cupy.ones(1, dtype=cupy.float32), cupy.empty(1, dtype=cupy.float32)
        self._squares = cupy.ReductionKernel(
            "float32 x", "float64 y", "(double)x * (double)x", "a + b", "y = a", "0", "paci_rt_squares"
        )
        self._coefficient = cupy.ElementwiseKernel(
            "float64 square, float32 most, float32 divisor",
            "float32 clip",
            "clip = fminf(1.0f, most / ((float)sqrt(square) / divisor + 1e-6f))",
            "paci_rt_clip",
        )
        self._limits = (cupy.float32(max_norm), self._scalars[0])
        self.accumulate: Callable[..., None] = self._accumulate_raw if raw else self._accumulate_elementwise
        self._update: Callable[[Any], None] = self._update_raw if raw else self._update_elementwise
        if raw:
            module = cupy.RawModule(code=SOURCE)
            self._add_raw, self._adamw_raw = module.get_function("accumulate"), module.get_function("adamw")
            self._flags = cupy.int32(0), cupy.int32(1)
            return
        self._put = cupy.ElementwiseKernel("int16 g", "float32 total", f"total = {WIDEN}", "paci_rt_put")
        self._add = cupy.ElementwiseKernel("int16 g", "float32 total", f"total = total + {WIDEN}", "paci_rt_add")
        self._adamw = cupy.ElementwiseKernel(
            "float32 total, raw float32 clip, " + ", ".join(f"float32 {name}" for name in SCALARS),
            "float32 w, float32 m, float32 v, int16 low",
            STEP,
            "paci_rt_adamw",
        )

    def _accumulate_elementwise(self, *, overwrite: bool = False) -> None:
        (self._put if overwrite else self._add)(self._grads, self._flat["grad_sum"])

    def _accumulate_raw(self, *, overwrite: bool = False) -> None:
        arguments = (self._grads, self._flat["grad_sum"], self._quads, self._flags[overwrite])
        self._add_raw((BLOCKS,), (THREADS,), arguments)

    def _update_elementwise(self, clip: Any) -> None:
        self._adamw(self._flat["grad_sum"], clip, *self._scalars, *self._state, self._weight)

    def _update_raw(self, clip: Any) -> None:
        arguments = (self._flat["grad_sum"], clip, *self._state, self._weight, self._quads, *self._scalars)
        self._adamw_raw((BLOCKS,), (THREADS,), arguments)

    def step(self) -> None:
        """The update."""
        self._update(self._one)

    def window(self) -> None:
        """All micro-batches, norm, clipped update; nothing waits and nothing has to be reset."""
        for number in range(self._micro_batches):
            self.accumulate(overwrite=number == 0)
        square = self._squares(self._flat["grad_sum"])
        self._coefficient(square.reshape(1), *self._limits, self._clip)
        self._update(self._clip)
