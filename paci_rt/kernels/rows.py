"""Scalars of an update in device memory: 16 fp32 a parameter and step.

They are derived in double precision and rounded once, as ``csrc/fused_step.cpp`` does. Because the kernels read them
from memory, a new learning rate or step number compiles nothing, and a captured CUDA graph stays valid: call ``set``
before each replay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paci_rt.kernels.layout import FlatLayout

WIDTH = 16


class ScalarRows:
    """Rows of one flat group, at one address for as long as the object lives.

    Attributes:
        tensor: fp32 [parameters * repeats, 16] on the device.
        repeats: steps a parameter.

    Args:
        layout: the flat group.
        repeats: 1 for an update, the number of updates to look ahead for the others.

    Raises:
        ValueError: ``repeats`` is below 1.
    """

    def __init__(self, layout: FlatLayout, repeats: int = 1) -> None:
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: a step or a look ahead takes at least one")
        self.repeats = repeats
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
        rows: dict[tuple[int, bool], list[float]] = {}
        for first, is_known in zip(steps, known, strict=True):
            if first is None:
                continue
            if first == 1 and not is_known:
                raise ValueError("step 1 of a parameter without a gradient has no mean of past ones: leave it out")
            for step in range(first, first + self.repeats):
                rows[step, is_known] = [
                    1.0,
                    divisor if is_known else 1.0,
                    1.0 - lr * weight_decay,
                    betas[0],
                    1.0 - betas[0],
                    betas[1],
                    1.0 - betas[1],
                    1.0 / math.sqrt(1.0 - betas[1] ** step),
                    eps,
                    -(lr / (1.0 - betas[0] ** step)),
                    float(is_known),
                    1.0 if is_known else 1.0 / (1.0 - betas[0] ** (step - 1)),
                    float(1.0 - betas[0] < 0.5),
                ]
        self._upload(steps, known, rows)

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
        rows: dict[tuple[int, bool], list[float]] = {}
        for first, is_known in zip(steps, known, strict=True):
            if first is None:
                continue
            if not is_known and momentum == 0:
                raise ValueError("momentum=0 says nothing about a parameter without a gradient: leave it out")
            for step in range(first, first + self.repeats):
                rows[step, is_known] = [
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
        self._upload(steps, known, rows)

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

    def _upload(
        self, steps: Sequence[int | None], known: Sequence[bool], rows: dict[tuple[int, bool], list[float]]
    ) -> None:
        idle = [0.0] * WIDTH
        padded = {key: row + [0.0] * (WIDTH - len(row)) for key, row in rows.items()}
        table = [
            idle if first is None else padded[first + repeat, is_known]
            for first, is_known in zip(steps, known, strict=True)
            for repeat in range(self.repeats)
        ]
        # Pinned, so that the copy does not wait; torch keeps the memory until the copy is done.
        host = torch.tensor(table, dtype=torch.float32, pin_memory=self.tensor.is_cuda)
        self.tensor.copy_(host, non_blocking=True)


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
