"""Which route computes a weight gradient fastest: measured once a shape, then remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from paci_rt.kernels.wgrad import routes_for, wgrad


class Shape(NamedTuple):
    """What the choice depends on.

    Attributes:
        rows: rows of both factors.
        n: columns of dY, rows of dW.
        k: columns of X and of dW.
        dtype: of the factors.
        device: where they are.
        bias: whether the bias' gradient is computed too.
    """

    rows: int
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    bias: bool


def measure_ms(run: Callable[[], None]) -> float:
    """Median milliseconds of a launch on the current device; waits for it."""
    return float(triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median"))


class WgradRoutes:
    """Calls :func:`paci_rt.kernels.wgrad.wgrad` with the fastest route of each shape.

    The first call with a shape measures, and waits for the device.

    Attributes:
        times_ms: milliseconds by shape and route, of all that was measured.

    Args:
        measure: gives the milliseconds of a call.

    Example:
        >>> from paci_rt.kernels import WgradRoutes
        >>> def once(run):  # in place of the default, the median of many launches
        ...     run()
        ...     return 1.0
        >>> routes = WgradRoutes(measure=once)
        >>> front, dy, x = (torch.ones(size, device=device) for size in ((2, 3), (6, 2), (6, 3)))
        >>> routes(front, dy, x, overwrite=False)
        >>> front[0].tolist(), list(routes.times_ms.values())
        ([7.0, 7.0, 7.0], [{'cublas': 1.0}])
    """

    def __init__(self, measure: Callable[[Callable[[], None]], float] = measure_ms) -> None:
        self.times_ms: dict[Shape, dict[str, float]] = {}
        self._measure = measure
        self._best: dict[Shape, str] = {}

    def best(self, shape: Shape) -> str:
        """The fastest route of a shape, measured now if it was not before, on random factors of its own.

        Raises:
            ValueError: no route can run it, or it was not measured and a CUDA graph is being captured.
        """
        if shape.device.type == "cuda" and shape.device.index is None:
            shape = shape._replace(device=torch.device("cuda", torch.cuda.current_device()))
        known = self._best.get(shape)
        if known is not None:
            return known
        if shape.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{shape} was not measured before the capture of a CUDA graph, and measuring waits for the device: "
                "call best() with it, or run one micro-batch, before the capture"
            )
        choices = routes_for(shape.dtype, shape.device)
        if not choices:
            raise ValueError(f"no route computes weight gradients of {shape.dtype} on {shape.device}: use bf16 or fp16")
        times = self._time(shape, choices)
        self.times_ms[shape] = times
        self._best[shape] = min(times, key=lambda route: times[route])
        return self._best[shape]

    def _time(self, shape: Shape, choices: tuple[str, ...]) -> dict[str, float]:
        # A generator of its own: measuring must not change what a model draws next.
        generator = torch.Generator(shape.device).manual_seed(0)
        dy = torch.randn(shape.rows, shape.n, generator=generator, device=shape.device).to(shape.dtype)
        x = torch.randn(shape.rows, shape.k, generator=generator, device=shape.device).to(shape.dtype)
        front = torch.zeros(shape.n, shape.k, device=shape.device)
        bias = torch.zeros(shape.n, device=shape.device) if shape.bias else None

        def call(route: str) -> Callable[[], None]:
            return lambda: wgrad(front, dy, x, overwrite=False, bias=bias, route=route)

        return {route: self._measure(call(route)) for route in choices}

    def __call__(
        self,
        front: Tensor,
        dy: Tensor,
        x: Tensor,
        *,
        overwrite: bool,
        bias: Tensor | None = None,
        overwrite_bias: bool | None = None,
    ) -> None:
        """As :func:`~paci_rt.kernels.wgrad.wgrad`, by the fastest route.

        Raises:
            ValueError: as there and in :meth:`best`.
        """
        shape = Shape(dy.shape[0], dy.shape[-1], x.shape[-1], dy.dtype, dy.device, bias is not None)
        route = self.best(shape)
        wgrad(front, dy, x, overwrite=overwrite, bias=bias, overwrite_bias=overwrite_bias, route=route)
