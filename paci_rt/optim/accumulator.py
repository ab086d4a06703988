"""The double-buffered gradient accumulator of one flat group."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paci_rt import native
from paci_rt.errors import AccumulatorStateError
from paci_rt.optim.flat import FlatGroup

MERGED_ELEMENTS = 1024
"""Elements that must agree before a product is added in one pass: the few of a small matrix agree by chance."""


@lru_cache(maxsize=4096)
def merged_is_exact(rows: int, summed: int, columns: int, _threads: int) -> bool:
    """Whether ``c.addmm_(a, b)`` gives the bits of ``c + a @ b``: fp32, ``[rows, summed] @ [summed, columns]``."""
    rows, columns = min(rows, 4096), min(columns, 4096)  # larger ones are worked off in blocks
    generator = torch.Generator().manual_seed(summed)
    tries = -(-MERGED_ELEMENTS // max(1, rows * columns))
    return all(_merges(rows, summed, columns, generator) for _ in range(tries))


def _merges(rows: int, summed: int, columns: int, generator: torch.Generator) -> bool:
    left = torch.randn(summed, rows, generator=generator).t()
    right = torch.randn(summed, columns, generator=generator)
    apart = torch.mm(left, right, out=_pages(rows, columns))
    start = torch.mm(left, right, out=_pages(rows, columns))
    if not torch.equal(start, apart):
        return False
    start.normal_(generator=generator)
    apart += start
    return torch.equal(start.addmm_(left, right), apart)


def _pages(rows: int, columns: int) -> Tensor:
    """Memory for one try, which goes back to the system: malloc would keep it for as long as the process lives."""
    return torch.frombuffer(mmap.mmap(-1, 4 * max(1, rows * columns)), dtype=torch.float32)[: rows * columns].view(
        rows, columns
    )


class Window(NamedTuple):
    """What an update reads.

    Attributes:
        sums: flat fp32 sums of the window's gradients.
        positions: parameters that got one, ascending.
    """

    sums: Tensor
    positions: list[int]


class GradAccumulator:
    """Plain fp32 sums of gradients, one flat buffer for the window that fills and, with ``buffers=2``, one for the
    window that the optimizer consumes meanwhile.

    A buffer walks ``empty -> filling -> sealed -> consuming -> empty``; any other transition raises
    :class:`~paci_rt.errors.AccumulatorStateError`, which names both states. The first gradient of a parameter in a
    window overwrites what the buffer held, so no time goes into clearing. Squares and non-finite values are counted in
    the pass that adds.

    On a GPU :class:`paci_rt.optim.accumulator_triton.KernelAccumulator` adds; here the kernels are launched by the
    caller, between :meth:`lend` and :meth:`seal`. Every call takes the stream that its work is on: an integer handle or
    anything with ``__cuda_stream__``, 0 being CUDA's default stream; None is the one that is current in torch. A buffer
    that goes from one stream to another takes the order of its work along: the update's stream waits for the seal, and
    the first gradient of a later window waits for the release. The host waits for nothing but statistics.

        overwrite = accumulator.lend(range(n), stream=compute)      # as often as the window has micro-batches
        kernels.accumulate(layout, statistics, accumulator.front_flat, grads, overwrite=overwrite)
        accumulator.seal(stream=compute, totals=statistics.totals())
        accumulator.consume(stream=update)
        ...                                                         # the update reads sealed_flat
        accumulator.release(stream=update)

    Args:
        group: the parameters.
        buffers: 1 or 2.
        dtype: of the sums.
        counted: segments and buffers for the native core, where it only counts; None is the sums themselves.

    Raises:
        ValueError: ``buffers`` is neither 1 nor 2.

    Example:
        >>> from paci_rt.optim.accumulator import GradAccumulator
        >>> from paci_rt.optim.flat import FlatGroup
        >>> accumulator = GradAccumulator(FlatGroup([("weight", nn.Parameter(torch.zeros(3)))]))
        >>> for _ in range(2):  # as often as the window has micro-batches
        ...     accumulator.add(0, torch.ones(3))
        >>> accumulator.seal()
        >>> window = accumulator.consume()
        >>> accumulator.sealed_view(0)  # the sum, shaped like parameter 0
        tensor([2., 2., 2.])
        >>> accumulator.release()
    """

    agreed: tuple[bool, ...] | None = None
    """Which parameters got a gradient in the finished window on any replica; None where this one alone counts."""
    product_by: Callable[..., None] | None = None
    """Computes weight gradients on a GPU, such as a :class:`paci_rt.kernels.WgradRoutes`; None is the default route."""

    def __init__(
        self,
        group: FlatGroup,
        *,
        buffers: int = 1,
        dtype: torch.dtype = torch.float32,
        counted: tuple[list[tuple[int, int]], list[Tensor]] | None = None,
    ) -> None:
        if buffers not in (1, 2):
            raise ValueError(f"buffers={buffers}: an accumulator has 1 buffer (update in line) or 2")
        self.group = group
        self._tensors = [group.empty_like(dtype) for _ in range(buffers)]
        self._views = [group.views(tensor) for tensor in self._tensors]
        segments, self._counted = (group.segments, self._tensors) if counted is None else counted
        self._native = native.make_accumulator(segments, self._counted[0].numel(), self._counted)
        self._consuming: int | None = None
        self._totals: Tensor | None = None
        self._before: tuple[Tensor, tuple[bool, ...]] | None = None
        self._device = group.device

    @property
    def states(self) -> tuple[str, ...]:
        """State of every buffer: ``empty``, ``filling``, ``sealed`` or ``consuming``."""
        return tuple(self._native.states)

    @property
    def state(self) -> str:
        """State of the front buffer, the one that :meth:`add` fills."""
        return self._native.states[self._native.front]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def add(self, index: int, grad: Tensor) -> None:
        """Add a gradient to the front buffer; on the CPU only.

        Args:
            index: the parameter's position in the group.
            grad: fp32, bf16 or fp16, of the parameter's shape; made contiguous if it is not.

        Raises:
            AccumulatorStateError: the front buffer is sealed or being consumed.
            ValueError: wrong index, shape, dtype or device.
        """
        grad = self._checked(index, grad)
        code = native.DTYPE_CODES[grad.dtype]
        self._native.add(index, grad, code, grad.numel(), 0, native.get_num_threads())

    def add_product(
        self, index: int, left: Tensor, right: Tensor, bias: tuple[GradAccumulator, int] | None = None
    ) -> None:
        """Add ``left @ right`` to the front buffer's sum of a matrix; in one pass where that gives the bits of two.

        Args:
            index: the parameter's position in the group; its shape is [n, k].
            left: [n, rows]. right: [rows, k]; both of the parameter's dtype.
            bias: accumulator and position of a parameter of shape [n], to whose sum the row sums of ``left`` are added.

        Raises:
            AccumulatorStateError: the front buffer is sealed or being consumed.
        """
        sizes = left.shape[0], left.shape[1], right.shape[1]
        if left.dtype is torch.float32 and merged_is_exact(*sizes, torch.get_num_threads()):
            total, overwrite = self.front(index)
            if overwrite:
                torch.mm(left, right, out=total)
            else:
                total.addmm_(left, right)
        else:
            self.add(index, torch.mm(left, right))
        if bias is not None:
            bias[0].add(bias[1], left.t().sum(0))

    def put(self, index: int, total: Tensor) -> None:
        """Let the front buffer's sum of a parameter be ``total``, whatever it was; raises as :meth:`add` does."""
        total = self._checked(index, total)
        view, _ = self.front(index)
        view.copy_(total)

    def flush(self) -> None:
        """Issue what :meth:`add` may have put off; on the CPU it puts nothing off."""

    def _checked(self, index: int, grad: Tensor) -> Tensor:
        """A gradient that can be added, contiguous."""
        fits = self._known_dtype(grad.dtype) and grad.layout is torch.strided
        if not fits or grad.shape != self.group.params[index].shape or grad.device != self._device:
            self._refuse(index, grad)
        return grad if grad.is_contiguous() else grad.contiguous()

    def _known_dtype(self, dtype: torch.dtype) -> bool:
        return dtype in native.DTYPE_CODES

    def _on(self, stream: Any) -> Any:
        if stream is not None:
            return stream
        return 0 if self._device.type == "cpu" else native.current_stream(self._device)

    def front(self, index: int, *, stream: Any = None) -> tuple[Tensor, bool]:
        """For a caller that computes a parameter's gradient straight into the front buffer.

        Returns:
            The parameter's part of the front buffer, fp32 in its shape, and whether the caller must overwrite it (the
            first gradient of the window) rather than add to it. It must do so before the buffer is sealed.

        Raises:
            AccumulatorStateError: the front buffer is sealed or being consumed.
        """
        overwrite = self._native.lend(index, self._on(stream), native.get_num_threads())
        return self._views[self._native.front][index], overwrite

    def lend(self, indices: Sequence[int], *, stream: Any = None) -> list[bool]:
        """For a caller that adds many parameters' gradients itself, in work that it gives to ``stream`` next.

        Returns:
            For each of them whether it must overwrite what :attr:`front_flat` holds (the window's first gradient)
            rather than add to it.

        Raises:
            AccumulatorStateError: the front buffer is sealed or being consumed.
        """
        return self._native.lend_many(list(indices), self._on(stream))

    @property
    def front_flat(self) -> Tensor:
        """The flat fp32 buffer that the window in the making is summed up in."""
        return self._tensors[self._native.front]

    def sums(self, *, before: bool = False) -> tuple[Tensor, tuple[bool, ...]]:
        """What is known of a coming update: flat fp32 sums, and which parameters have one; other parts hold anything.

        Args:
            before: take the window before instead of the one in the making. Its sums are there until the first
                gradient of a new window overwrites them; before the first window nothing has any.

        Raises:
            AccumulatorStateError: the front buffer is sealed or being consumed.
        """
        touched = tuple(self._native.front_touched)
        if before:
            return self._before or (self._tensors[self._native.front], (False,) * len(touched))
        return self._tensors[self._native.front], touched

    def forget(self) -> None:
        """The window before says nothing about the next one, for example after a checkpoint was loaded."""
        self._before = None

    def _refuse(self, index: int, grad: Tensor) -> None:
        name, param = self.group.names[index], self.group.params[index]
        if grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of parameter {name!r} is sparse ({grad.layout}): the accumulator holds dense sums; "
                "build the module with sparse=False"
            )
        if grad.shape != param.shape:
            raise ValueError(
                f"the gradient of parameter {name!r} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}"
            )
        if grad.device != self._device:
            raise ValueError(f"the gradient of parameter {name!r} is on {grad.device}, the parameter on {self._device}")
        native.dtype_code(grad.dtype, f"the gradient of parameter {name!r}")

    def end_window(self) -> bool:
        """Seal the front buffer if it has a gradient; whether it had."""
        filling = self.state == "filling"
        if filling:
            self.seal()
        return filling

    def seal(self, *, stream: Any = None, totals: Tensor | None = None) -> None:
        """End the window: the front buffer is sealed, parameters that got no gradient read as zero, and with two
        buffers the other one becomes the front.

        Args:
            stream: whose work on the buffer ends here.
            totals: on a GPU fp64 [2], written by work that ``stream`` has already: sum of squares and number of
                non-finite elements. Without it those two are not known.

        Raises:
            AccumulatorStateError: nothing was added, or the other buffer has not been released.
            ValueError: ``totals`` is something else, or was passed on the CPU, where the core counts by itself.
        """
        if totals is not None:
            self._check_totals(totals)
        self._native.seal(self._on(stream), totals)
        self._totals = totals  # kept alive until the next seal

    def _check_totals(self, totals: Tensor) -> None:
        if self._device.type == "cpu":
            raise ValueError("totals= was passed for sums on the CPU, which are counted by the core: leave it out")
        if totals.dtype != torch.float64 or totals.numel() != 2 or totals.device != self._device:
            raise ValueError(
                f"totals= is {totals.dtype} of {totals.numel()} elements on {totals.device}: pass fp64 [2] on "
                f"{self._device}, as paci_rt.kernels.GradientStatistics.totals() returns it"
            )

    def consume(self, *, stream: Any = None) -> Window:
        """Begin to read the sealed buffer, in work that ``stream`` gets next.

        Raises:
            AccumulatorStateError: no buffer is sealed.
        """
        self._consuming = consuming = self._native.consume(self._on(stream))
        positions = [position for position, touched in enumerate(self.touched) if touched]
        return Window(self._tensors[consuming], positions)

    def continue_on(self, *, stream: Any = None) -> None:
        """Read on from another stream, behind what the last one got, for example the update after an all-reduce.

        Raises:
            AccumulatorStateError: no buffer is being consumed.
        """
        self._native.continue_on(self._on(stream))

    def release(self, *, stream: Any = None) -> None:
        """End reading: the consumed buffer is empty as soon as the work that ``stream`` has is done.

        Raises:
            AccumulatorStateError: no buffer is being consumed.
        """
        before = None if self._consuming is None else (self._tensors[self._consuming], self.touched)
        self._native.release(self._on(stream))
        self._consuming, self._before, self.agreed = None, before, None

    def sealed_views(self) -> list[tuple[int, Tensor]]:
        """Position and sum of each parameter that got a gradient in the window that is sealed or being consumed.

        Raises:
            AccumulatorStateError: no buffer is sealed or being consumed.
        """
        touched = self.touched
        views = self._views[self._finished]
        return [(position, view) for position, view in enumerate(views) if touched[position]]

    def finished_flat(self) -> Tensor:
        """The flat buffer of the window that is sealed or being consumed."""
        return self._tensors[self._finished]

    @property
    def _finished(self) -> int:
        return next(at for at, state in enumerate(self.states) if state in ("consuming", "sealed"))

    def measured(self) -> tuple[Any, Any]:
        """Sum of squares and number of non-finite elements of the sealed buffer: numbers, or on a GPU fp64 tensors of
        one element, for which nothing waits.

        Raises:
            AccumulatorStateError: no buffer is sealed or being consumed.
        """
        return self.sum_of_squares, self.nonfinite_count

    @property
    def sum_of_squares(self) -> float:
        """Sum of squares of the sealed or consumed buffer, summed in double precision; not finite if an element is not.

        On a GPU the first question in a window waits for its gradients, on a stream of its own.

        Raises:
            AccumulatorStateError: no buffer is sealed or being consumed; so with the next two.
        """
        return self._native.sum_of_squares

    @property
    def nonfinite_count(self) -> int:
        """Infinite and NaN elements of the sealed or consumed buffer."""
        return self._native.nonfinite_count

    @property
    def touched(self) -> tuple[bool, ...]:
        """Which parameters got a gradient in the sealed or consumed window."""
        return tuple(self._native.touched) if self.agreed is None else self.agreed

    @property
    def sealed_flat(self) -> Tensor:
        """The flat fp32 buffer being consumed.

        Raises:
            AccumulatorStateError: outside of consume and release.
        """
        if self._consuming is None:
            raise AccumulatorStateError(
                f"no buffer is being consumed (states: {', '.join(self.states)}): read between consume() and release()"
            )
        return self._tensors[self._consuming]

    def sealed_view(self, index: int) -> Tensor:
        """The sum for one parameter, fp32, in its shape; valid between :meth:`consume` and :meth:`release`."""
        return self.group.view(self.sealed_flat, index)
