"""Gradients of a micro-batch into the flat fp32 sums of its window, all parameters in one launch.

Floor, in bytes per parameter for 16-bit gradients: 10 (read 2, read and write 4 of the sum), and 6 for the first
micro-batch of a window, which overwrites; 12 and 8 for fp32 gradients. Sums of squares and non-finite elements are
counted in the same pass and cost 12 bytes a chunk of 4096 elements.

Limits: one dtype a call (bf16, fp16 or fp32), contiguous gradients. Gradients that do not begin at a multiple of four
elements take narrower loads for the whole call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.kernels.device.accumulate import accumulate_kernel, measure_kernel, totals_kernel
from paci_rt.kernels.elements import element
from paci_rt.kernels.launch import BLOCK, OPTIONS, TOTALS_BLOCK, TOTALS_WARPS, check_flat, on_device, operator, options
from paci_rt.kernels.layout import ABSENT, Entries, FlatLayout


class GradientStatistics:
    """Sum of squares and number of non-finite elements of a flat sum, kept chunk by chunk on the device.

    :func:`accumulate` replaces the slots of the chunks that it writes, so that at the end of a window they describe the
    sums, provided that parameters without a gradient in the window were cleared (:meth:`clear`) and those that
    something else wrote were measured (:meth:`measure`).

    Attributes:
        squares: fp64 [chunks].
        nonfinite: int32 [chunks].

    Args:
        layout: the flat group.

    Example:
        >>> from paci_rt.kernels import FlatLayout, GradientStatistics
        >>> layout = FlatLayout([(0, 3)], numel=16, device=device)
        >>> statistics, sums = GradientStatistics(layout), torch.zeros(16, device=device)
        >>> sums[:3] = torch.tensor([3.0, 4.0, 0.0])
        >>> statistics.measure(sums, [0])
        >>> statistics.totals().tolist()  # sum of squares, number of non-finite elements
        [25.0, 0.0]
    """

    def __init__(self, layout: FlatLayout) -> None:
        self.layout = layout
        count = layout.chunks.shape[0]
        self.squares = torch.zeros(count, dtype=torch.float64, device=layout.device)
        self.nonfinite = torch.zeros(count, dtype=torch.int32, device=layout.device)

    def totals(self) -> Tensor:
        """fp64 [2] on the device: sum of squares, not finite if an element is not, and number of non-finite elements.

        Added up in an order that depends on the layout alone, so equal sums give equal bits. Nothing waits for it.
        """
        totals = torch.empty(2, dtype=torch.float64, device=self.layout.device)
        if torch.compiler.is_compiling():
            _totals_op(totals, self.squares, self.nonfinite)
        else:
            _launch_totals(totals, self.squares, self.nonfinite)
        return totals

    def measure(self, front: Tensor, positions: Sequence[int]) -> None:
        """Statistics of sums that something else than :func:`accumulate` wrote, such as weight gradients; reads them
        once, 4 bytes per parameter."""
        check_flat(front, "the front buffer", self.layout.numel, (torch.float32,), self.layout.device)
        numbers = self.layout.part(positions).numbers
        if numbers.shape[0] == 0:
            return
        with on_device(front):
            measure_kernel[(numbers.shape[0],)](
                front, self.squares, self.nonfinite, numbers, self.layout.chunks, BLOCK=BLOCK, **options()
            )

    def clear(self, front: Tensor, positions: Sequence[int]) -> None:
        """Zero the sums of parameters that got no gradient in the window, and their statistics."""
        check_flat(front, "the front buffer", self.layout.numel, (torch.float32,), self.layout.device)
        for position in positions:
            offset, length = self.layout.segments[position]
            first, end = self.layout.ranges[position]
            front[offset : offset + length].zero_()
            self.squares[first:end].zero_()
            self.nonfinite[first:end].zero_()


def accumulate(
    layout: FlatLayout,
    statistics: GradientStatistics,
    front: Tensor,
    grads: Sequence[Tensor | None],
    *,
    overwrite: bool | Sequence[bool],
) -> None:
    """Add gradients to the sums, or overwrite them.

    Args:
        layout: the flat group.
        statistics: of ``front``; slots of the chunks that are written are replaced.
        front: flat fp32 sums, as long as the layout. Padding stays zero.
        grads: one a parameter, None where there is none: those sums are left alone.
        overwrite: for all, or one flag a parameter; the first gradient of a window overwrites, whatever was there.

    Raises:
        ValueError: a tensor does not fit the layout; see the limits above.

    Example:
        >>> from paci_rt.kernels import FlatLayout, GradientStatistics, accumulate
        >>> layout = FlatLayout([(0, 3)], numel=16, device=device)
        >>> statistics, sums = GradientStatistics(layout), torch.full((16,), float("nan"), device=device)
        >>> grad = torch.ones(3, dtype=torch.float16, device=device)
        >>> accumulate(layout, statistics, sums, [grad], overwrite=True)  # the first micro-batch of a window
        >>> accumulate(layout, statistics, sums, [grad], overwrite=False)
        >>> sums[:3].tolist()
        [2.0, 2.0, 2.0]
    """
    check_flat(front, "the front buffer", layout.numel, (torch.float32,), layout.device)
    if statistics.layout is not layout:
        raise ValueError("the statistics belong to another layout: make GradientStatistics(layout) of this one")
    codes = layout.codes(grads, overwrite)
    if all(code == ABSENT for code in codes):
        return
    if torch.compiler.is_compiling():
        present = [grad for grad in grads if grad is not None]
        _accumulate_op(front, statistics.squares, statistics.nonfinite, layout.chunks, present, codes)
        return
    _launch(front, statistics.squares, statistics.nonfinite, layout.chunks, layout.entries(grads, codes))


def clip_coefficient(totals: Sequence[Tensor], max_norm: float, divisor: float = 1.0) -> Tensor:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients with, computed on the device without waiting.

    Args:
        totals: :meth:`GradientStatistics.totals` of every flat group on one device; their norms are taken together.
        max_norm: largest norm.
        divisor: what the sums will be divided by.

    Returns:
        fp32 [1], for ``clip=`` of the update: ``min(1, max_norm / (norm + 1e-6))``; NaN where the norm is, which leaves
        all weights as they are.

    Raises:
        ValueError: ``max_norm`` is negative, ``divisor`` is 0, or there are no totals.

    Example:
        A norm of 5, to be at most 1:

        >>> from paci_rt.kernels import clip_coefficient
        >>> totals = torch.tensor([25.0, 0.0], dtype=torch.float64, device=device)
        >>> round(clip_coefficient([totals], max_norm=1.0).item(), 4)
        0.2
    """
    if max_norm < 0 or divisor == 0 or not totals:
        raise ValueError(
            f"max_norm={max_norm} with divisor={divisor} and {len(totals)} totals: the norm must not be negative, the "
            "divisor not 0, and there must be at least one group"
        )
    square = torch.stack([pair[0] for pair in totals]).sum()
    norm = square.sqrt() / abs(divisor)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32).reshape(1)


def _launch(front: Tensor, squares: Tensor, nonfinite: Tensor, chunks: Tensor, entries: Entries) -> None:
    with on_device(front):
        accumulate_kernel[(chunks.shape[0],)](
            front,
            squares,
            nonfinite,
            entries.table,
            chunks,
            ELEMENT=element(entries.dtype),
            ALIGNED=entries.aligned,
            BLOCK=BLOCK,
            **options(),
        )


def _launch_totals(totals: Tensor, squares: Tensor, nonfinite: Tensor) -> None:
    with on_device(totals):
        totals_kernel[(1,)](
            totals, squares, nonfinite, squares.shape[0], BLOCK=TOTALS_BLOCK, num_warps=TOTALS_WARPS, **OPTIONS
        )


def _run(
    front: Tensor, squares: Tensor, nonfinite: Tensor, chunks: Tensor, grads: list[Tensor], codes: list[int]
) -> None:
    _launch(front, squares, nonfinite, chunks, Entries.fresh(grads, codes))


_accumulate_op = operator(
    "paci_rt::accumulate",
    _run,
    ("front", "squares", "nonfinite"),
    "(Tensor(a!) front, Tensor(b!) squares, Tensor(c!) nonfinite, Tensor chunks, Tensor[] grads, int[] codes) -> ()",
)
_totals_op = operator(
    "paci_rt::gradient_totals",
    _launch_totals,
    ("totals",),
    "(Tensor(a!) totals, Tensor squares, Tensor nonfinite) -> ()",
)
