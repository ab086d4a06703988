"""Scalars of an update in device memory: 16 fp32 a parameter and step.

They are derived in double precision and rounded once, as ``csrc/cpu/optimizer_step.cpp`` does. Because the kernels
read them from memory, a new learning rate or step number compiles nothing, and a captured CUDA graph stays valid: call
``set`` before each replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from paci_rt.kernels.layout import FlatLayout

WIDTH = 16
MEAN_SIZE = 9
"""Where AdamW and NAdam find what the first moment is multiplied by."""


class ScalarRows:
    """Rows of one flat group, at one address for as long as the object lives.

    Attributes:
        tensor: fp32 [parameters * repeats, 16] on the device.
        repeats: steps a parameter.
        optimizer: whose scalars they are: ``adamw``, ``nadam``, ``sgd`` or ``lion``; None before they are set.

    Args:
        layout: the flat group.
        repeats: 1 for an update, the number of updates to look ahead for the others.

    Raises:
        ValueError: ``repeats`` is below 1.

    Example:
        >>> from paci_rt.kernels import FlatLayout, ScalarRows
        >>> layout = FlatLayout([(0, 5), (16, 3)], numel=32, device=device)
        >>> rows = ScalarRows(layout)
        >>> rows.set_lion([1, None], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, divisor=8)  # the second rests
        >>> rows.optimizer, rows.tensor.shape
        ('lion', torch.Size([2, 16]))
    """

    def __init__(self, layout: FlatLayout, repeats: int = 1) -> None:
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: a step or a look ahead takes at least one")
        self.repeats = repeats
        self.optimizer: str | None = None
        self._count = len(layout.segments)
        self.tensor = torch.zeros(self._count * repeats, WIDTH, dtype=torch.float32, device=layout.device)

    def set_adamw(
        self,
        steps: Sequence[int | None],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        divisor: float,
        known: Sequence[bool] | None = None,
    ) -> None:
        """Scalars of AdamW for the next launches.

        Args:
            steps: number of the (first) step of every parameter, from 1; None leaves the parameter alone.
            lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
            divisor: gradients are divided by it; a negative one maximises.
            known: looking ahead: whether the sum has a gradient of the parameter; without one the mean of past
                gradients stands in. None: all of them.

        Raises:
            ValueError: a number of rows, a step or the divisor is wrong, or a CUDA graph is being captured.
        """
        known = self._check(steps, divisor, known)
        row = partial(_adam_row, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, divisor=divisor)
        self._upload("adamw", self._table(steps, known, row))

    def set_nadam(
        self,
        steps: Sequence[int | None],
        *,
        step_sizes: Sequence[tuple[float, float]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        divisor: float,
        known: Sequence[bool] | None = None,
    ) -> None:
        """Scalars of NAdam, whose weight decay is decoupled; other arguments and errors as for :meth:`set_adamw`.

        Args:
            step_sizes: what first moment and gradient are multiplied by, a pair for each parameter that takes a step,
                in order, and within it for each of the ``repeats``.
            lr: of the weight decay; the step sizes have it in them.
        """
        known = self._check(steps, divisor, known)
        row = partial(_adam_row, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, divisor=divisor)
        table = self._table(steps, known, row)
        taken = [line for line in table if line]
        if len(step_sizes) != len(taken):
            raise ValueError(
                f"{len(step_sizes)} step sizes for {len(taken) // self.repeats} parameters that take {self.repeats} "
                "steps each: give a pair for every step"
            )
        for line, (mean, fresh) in zip(taken, step_sizes, strict=True):
            line[MEAN_SIZE] = -mean
            line.append(-fresh)
        self._upload("nadam", table)

    def set_sgd(
        self,
        steps: Sequence[int | None],
        *,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        divisor: float,
        known: Sequence[bool] | None = None,
    ) -> None:
        """Scalars of SGD; arguments and errors as for :meth:`set_adamw`. Step 1 sets the momentum buffer."""
        known = self._check(steps, divisor, known)

        def row(step: int, is_known: bool) -> list[float]:
            if not is_known and momentum == 0:
                raise ValueError("momentum=0 says nothing about a parameter without a gradient: leave it out")
            return [
                1.0,
                divisor if is_known else 1.0,
                -lr,
                # The buffer of past gradients includes their weight decay.
                weight_decay if is_known else 0.0,
                momentum,
                1.0 - dampening,
                float(step == 1),
                float(is_known),
                1.0 if is_known else (1.0 - momentum) / (1.0 - dampening),
                float(nesterov),
            ]

        self._upload("sgd", self._table(steps, known, row))

    def set_lion(
        self,
        steps: Sequence[int | None],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        divisor: float,
        known: Sequence[bool] | None = None,
    ) -> None:
        """Scalars of Lion; arguments and errors as for :meth:`set_adamw`. What number a step has does not matter, and
        looking ahead the momentum stands in for unknown gradients."""
        known = self._check(steps, divisor, known)

        def row(_: int, is_known: bool) -> list[float]:
            return [*_decay_and_betas(lr, betas, weight_decay, divisor, is_known), -lr, float(is_known)]

        self._upload("lion", self._table(steps, known, row))

    def require(self, optimizer: str) -> None:
        """What every launch begins with.

        Raises:
            ValueError: the scalars are those of another optimizer.
        """
        if self.optimizer != optimizer:
            state = "not set" if self.optimizer is None else f"those of {self.optimizer}"
            raise ValueError(f"the scalars are {state}: call set_{optimizer}() before a launch of {optimizer}")

    def _check(self, steps: Sequence[int | None], divisor: float, known: Sequence[bool] | None) -> Sequence[bool]:
        flags = [True] * self._count if known is None else known
        if len(steps) != self._count or len(flags) != self._count:
            raise ValueError(
                f"{len(steps)} steps and {len(flags)} known flags for {self._count} parameters: one of each is needed"
            )
        wrong = [step for step in steps if step is not None and step < 1]
        if wrong:
            raise ValueError(f"step {wrong[0]} of a parameter is no step number: they start at 1")
        if divisor == 0:
            raise ValueError("divisor=0: gradients cannot be divided by 0")
        if self.tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "scalars are set while a CUDA graph is captured, which would freeze them: set them before the capture "
                "and before every replay"
            )
        return flags

    def _table(
        self, steps: Sequence[int | None], known: Sequence[bool], row: Callable[[int, bool], list[float]]
    ) -> list[list[float]]:
        """A row for each parameter and repeat, empty where the parameter is left alone."""
        made: dict[tuple[int, bool], list[float]] = {}
        table: list[list[float]] = []
        for first, is_known in zip(steps, known, strict=True):
            for repeat in range(self.repeats):
                key = None if first is None else (first + repeat, is_known)
                if key is not None and key not in made:
                    made[key] = row(*key)
                table.append([] if key is None else list(made[key]))
        return table

    def _upload(self, optimizer: str, table: list[list[float]]) -> None:
        padded = [row + [0.0] * (WIDTH - len(row)) for row in table]
        # Pinned, so that the copy does not wait; torch keeps the memory until the copy is done.
        host = torch.tensor(padded, dtype=torch.float32, pin_memory=self.tensor.is_cuda)
        self.tensor.copy_(host, non_blocking=True)
        self.optimizer = optimizer


def _decay_and_betas(
    lr: float, betas: tuple[float, float], weight_decay: float, divisor: float, is_known: bool
) -> list[float]:
    """What the rows of AdamW, NAdam and Lion begin with: 7 scalars."""
    decay = 1.0 - lr * weight_decay
    return [1.0, divisor if is_known else 1.0, decay, betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1]]


def _adam_row(
    step: int,
    is_known: bool,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: float,
) -> list[float]:
    if step == 1 and not is_known:
        raise ValueError("step 1 of a parameter without a gradient has no mean of past ones: leave it out")
    return [
        *_decay_and_betas(lr, betas, weight_decay, divisor, is_known),
        1.0 / math.sqrt(1.0 - betas[1] ** step),
        eps,
        -(lr / (1.0 - betas[0] ** step)),
        float(is_known),
        1.0 if is_known else 1.0 / (1.0 - betas[0] ** (step - 1)),
        float(1.0 - betas[0] < 0.5),
    ]


def check_rows(rows: ScalarRows, layout: FlatLayout) -> Tensor:
    """The rows of a layout.

    Raises:
        ValueError: they are another layout's.
    """
    if rows.tensor.shape[0] != len(layout.segments) * rows.repeats or rows.tensor.device != layout.device:
        raise ValueError(
            f"the scalars are for {rows.tensor.shape[0] // rows.repeats} parameters on {rows.tensor.device}, the "
            f"layout has {len(layout.segments)} on {layout.device}: make ScalarRows(layout) of this one"
        )
    return rows.tensor
