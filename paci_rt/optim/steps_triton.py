"""Optimizer steps of a flat group by the Triton kernels, called as those of the native core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paci_rt.kernels.adamw import adamw_ahead, adamw_step
from paci_rt.kernels.layout import FlatLayout
from paci_rt.kernels.lion import lion_ahead, lion_step
from paci_rt.kernels.nadam import nadam_ahead, nadam_step
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.sgd import sgd_ahead, sgd_step

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from paci_rt.optim import steps_native

_TENSORS = ("master", "weight", "grad_sum", "exp_avg", "exp_avg_sq", "momentum_buffer")


class TritonSteps:
    """Steps over one flat group, on the stream that is current in torch.

    Args:
        layout: the group's.
    """

    def __init__(self, layout: FlatLayout) -> None:
        self._layout = layout
        self._rows: dict[int, ScalarRows] = {}

    def adamw_step(self, **step: Unpack[steps_native.AdamWStep]) -> None:
        """AdamW or NAdam; see :func:`paci_rt.optim.steps_native.adamw_step`."""
        rows, scalars = self._scalars(step)
        scalars |= {"betas": step["betas"], "eps": step["eps"]}
        if sizes := step.get("step_sizes"):
            rows.set_nadam(**scalars, step_sizes=sizes)
            self._launch(nadam_step, nadam_ahead, rows, step, scalars["steps"])
        else:
            rows.set_adamw(**scalars)
            self._launch(adamw_step, adamw_ahead, rows, step, scalars["steps"])

    def sgd_step(self, **step: Unpack[steps_native.SGDStep]) -> None:
        """SGD; see :func:`paci_rt.optim.steps_native.sgd_step`."""
        rows, scalars = self._scalars(step)
        rows.set_sgd(**scalars, momentum=step["momentum"], dampening=step["dampening"], nesterov=step["nesterov"])
        self._launch(sgd_step, sgd_ahead, rows, step, scalars["steps"])

    def lion_step(self, **step: Unpack[steps_native.LionStep]) -> None:
        """Lion; see :func:`paci_rt.optim.steps_native.lion_step`."""
        rows, scalars = self._scalars(step)
        rows.set_lion(**scalars, betas=step["betas"])
        self._launch(lion_step, lion_ahead, rows, step, scalars["steps"])

    def _scalars(self, step: steps_native.FlatStep) -> tuple[ScalarRows, dict[str, Any]]:
        """Rows in device memory, and what all optimizers are told through them: one entry for each parameter.

        Updates and each depth of look-ahead have rows of their own, since they are read on streams of their own.
        """
        segments, ahead = self._layout.segments, step.get("ahead")
        numbers: list[int | None] = [None] * len(segments)
        known = [False] * len(segments)
        position = -1
        for index, (offset, numel, number) in enumerate(step["pieces"]):  # some of the segments, in their order
            position = segments.index((offset, numel), position + 1)
            numbers[position] = number
            known[position] = ahead is not None and ahead.known[index]
        repeats = 0 if ahead is None else ahead.repeats
        if repeats not in self._rows:
            self._rows[repeats] = ScalarRows(self._layout, max(1, repeats))
        return self._rows[repeats], {
            "steps": numbers,
            "known": None if ahead is None else known,
            **{name: step[name] for name in ("lr", "weight_decay", "divisor")},
        }

    def _launch(self, take: Any, look: Any, rows: ScalarRows, step: Mapping[str, Any], steps: list[int | None]) -> None:
        tensors = {name: step[name] for name in _TENSORS if name in step}
        positions = [position for position, number in enumerate(steps) if number is not None]
        only = None if len(positions) == len(steps) else positions
        ahead: steps_native.Ahead | None = step.get("ahead")
        if ahead is None:
            take(self._layout, rows, **tensors, clip=step.get("clip"), only=only)
        else:
            look(self._layout, rows, **tensors, kept=ahead.kept, only=only)
