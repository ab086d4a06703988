"""Triton kernels over flat buffers: gradient accumulation, AdamW, NAdam, Lion and SGD, and weight gradients.

They do on a GPU what the native core does on the CPU, to the bit where no sum is reordered. ``import paci_rt`` does
not import this package, and this package is the only one that imports Triton.

    layout = FlatLayout(group.segments, group.numel, group.device)
    sums, statistics, rows = group.empty_like(torch.float32), GradientStatistics(layout), ScalarRows(layout)
    accumulate(layout, statistics, sums, grads, overwrite=True)      # first micro-batch of a window
    accumulate(layout, statistics, sums, grads, overwrite=False)     # the others
    rows.set_adamw(steps, lr=lr, betas=betas, eps=eps, weight_decay=0.01, divisor=a)
    adamw_step(layout, rows, master=master, weight=weight, grad_sum=sums, exp_avg=m, exp_avg_sq=v)

Nothing here waits for the device. All of it can be captured in CUDA graphs, and under ``torch.compile`` the calls
become operators ``paci_rt::...``; outside of it they launch directly, which leaves version counters alone.
"""

from __future__ import annotations

from paci_rt.errors import TritonMissingError

try:
    import triton as _triton
except ImportError as error:
    raise TritonMissingError(
        f"paci_rt.kernels needs Triton, which could not be imported ({error}): pip install 'paci-rt[cuda13]', or "
        "'paci-rt[cuda12]' for CUDA 12"
    ) from error
if tuple(int(part) for part in _triton.__version__.split(".")[:2]) < (3, 6):
    # Earlier ones flush subnormal numbers in the divisions that are asked for as correctly rounded.
    raise TritonMissingError(
        f"paci_rt.kernels needs Triton 3.6 or later, this is {_triton.__version__}: pip install --upgrade torch triton"
    )

from paci_rt.kernels.accumulate import GradientStatistics, accumulate, clip_coefficient
from paci_rt.kernels.adamw import adamw_ahead, adamw_step
from paci_rt.kernels.layout import FlatLayout
from paci_rt.kernels.lion import lion_ahead, lion_step
from paci_rt.kernels.nadam import nadam_ahead, nadam_step
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.sgd import sgd_ahead, sgd_step
from paci_rt.kernels.traffic import (
    accumulate_bytes,
    adamw_ahead_bytes,
    adamw_bytes,
    lion_ahead_bytes,
    lion_bytes,
    nadam_ahead_bytes,
    nadam_bytes,
    sgd_ahead_bytes,
    sgd_bytes,
    wgrad_bytes,
)
from paci_rt.kernels.wgrad import routes_for, wgrad
from paci_rt.kernels.wgrad_routes import WgradRoutes

__all__ = [
    "FlatLayout",
    "GradientStatistics",
    "ScalarRows",
    "WgradRoutes",
    "accumulate",
    "accumulate_bytes",
    "adamw_ahead",
    "adamw_ahead_bytes",
    "adamw_bytes",
    "adamw_step",
    "clip_coefficient",
    "lion_ahead",
    "lion_ahead_bytes",
    "lion_bytes",
    "lion_step",
    "nadam_ahead",
    "nadam_ahead_bytes",
    "nadam_bytes",
    "nadam_step",
    "routes_for",
    "sgd_ahead",
    "sgd_ahead_bytes",
    "sgd_bytes",
    "sgd_step",
    "wgrad",
    "wgrad_bytes",
]
