"""What a pipeline was asked to do about gradients that are not finite, or large."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from paci_rt.runtime.loss_scale import LossScaler
from paci_rt.schedules import ScheduleFamily, Shape
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.wording import unknown

SKIPPING = ("skip-window", "skip-local")
POLICIES = ("raise", *SKIPPING)
KNOWN_WINDOWS = 48
"""Windows that a stage can tell others about at once."""


@dataclass(frozen=True, kw_only=True)
class Safety:
    """The options of a pipeline about gradients that are not finite, or large.

    They need an optimizer: without one, gradients are left in ``.grad`` as they are, as torch leaves them.

    Attributes:
        on_nonfinite: what to do about a window whose gradients have NaN or infinite values. ``"raise"``, the default,
            ends the run with a :class:`~paci_rt.NonFiniteError` before the stage's weights have taken any of it.
            ``"skip-window"`` drops the window on every stage: optimizers take no step and count none, learning-rate
            schedulers go on. A stage that has updated before it could hear of it takes that update back, exactly, for
            which it keeps a copy of weights and optimizer state (``versions`` of ``stats()["memory"]``).
            ``"skip-local"`` drops it on the stage that has such values alone.
        max_grad_norm: largest 2-norm of the whole model's mean gradient, all stages together. Under schedules that
            flush it is exact, as ``torch.nn.utils.clip_grad_norm_`` on the uncut model; others foretell the norms that
            have not come yet (``norm_lags`` of ``stats()``) from their own.
        skip_spikes: also skip windows whose gradient norm is so many standard deviations above the mean of those
            before it (at most 64, once there are 16), as ``on_nonfinite`` says. Under a flush with clipping or
            ``skip-window`` it is the norm of all stages, otherwise each stage's own.
        loss_scale: a :class:`~paci_rt.LossScaler`, for fp16 parameters.

    Raises:
        ValueError: a value that means nothing.
    """

    on_nonfinite: str | None = None
    max_grad_norm: float | None = None
    skip_spikes: float | None = None
    loss_scale: LossScaler | None = None

    def __post_init__(self) -> None:
        if self.on_nonfinite is not None and self.on_nonfinite not in POLICIES:
            raise unknown("on_nonfinite", self.on_nonfinite, POLICIES)
        check_positive("max_grad_norm", self.max_grad_norm, "such as 1.0, or leave it out to clip nothing")
        check_positive("skip_spikes", self.skip_spikes, "of standard deviations such as 6.0, or leave it out")
        for name in ("max_grad_norm", "skip_spikes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.loss_scale is not None:
            if not isinstance(self.loss_scale, LossScaler):
                raise ValueError(f"loss_scale is {self.loss_scale!r}: give a paci_rt.LossScaler")
            if self.on_nonfinite not in (None, "skip-window"):
                raise ValueError(
                    f"loss_scale was given and on_nonfinite is {self.on_nonfinite!r}: a scale that is too large shows "
                    "in gradients that are not finite, whose window all stages must skip; use 'skip-window'"
                )
        if self.skip_spikes is not None and self.on_nonfinite not in SKIPPING:
            raise ValueError(
                f"skip_spikes is {self.skip_spikes} and on_nonfinite {self.on_nonfinite!r}: how to skip a window is "
                "said by on_nonfinite='skip-window' or 'skip-local'; give one of them"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """The options as JSON-ready values, for a comparison between processes."""
        scaler = self.loss_scale
        return {**vars(self), "loss_scale": None if scaler is None else scaler.settings}

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not left out."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def settles(self, family: ScheduleFamily, stages: int) -> bool:
        """Whether all stages tell each other what they found in a window before anybody goes on: before the updates of
        a flush, and at the end of a drain."""
        together = self.on_nonfinite == "skip-window" or (family.flush and self.max_grad_norm is not None)
        return stages > 1 and together

    def travels(self, family: ScheduleFamily, stages: int) -> bool:
        """Whether news of norms and windows ride on the messages between stages."""
        wanted = self.on_nonfinite == "skip-window" or self.max_grad_norm is not None
        return not family.flush and stages > 1 and wanted


def check_positive(name: str, value: Any, remedy: str) -> None:
    """Raise ValueError unless ``value`` is None or a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= sys.float_info.max):
        raise ValueError(f"{name} is {value!r}: give a finite number above 0 {remedy}")


def resolve_safety(
    asked: Safety | None,
    optimizers: Sequence[Any],
    family: ScheduleFamily,
    shape: Shape,
    policy: str,
    ties: Sequence[TiedWeight],
) -> Safety:
    """What a pipeline does, defaults filled in: ``raise`` where the schedule takes the steps.

    Raises:
        ValueError: an option that the pipeline cannot keep.
    """
    safety = Safety() if asked is None else asked
    if any(optimizer is None for optimizer in optimizers):
        if safety.given:
            raise ValueError(
                f"{', '.join(safety.given)} was given and optimizer is None: the schedule takes no step that it could "
                "clip or skip; pass optimizer= too, or look at .grad yourself"
            )
        return replace(safety, on_nonfinite="raise")  # for stages that have one
    if safety.on_nonfinite is None:
        safety = replace(safety, on_nonfinite="raise" if safety.loss_scale is None else "skip-window")
    if safety.on_nonfinite != "skip-window" or family.flush or shape.num_stages == 1:
        return safety
    if policy in ("stash", "2bw"):
        raise ValueError(
            f"on_nonfinite='skip-window' under policy {policy!r}: micro-batches in flight still need the weights of an "
            "update that would be taken back; use on_nonfinite='skip-local' or 'raise', or another policy"
        )
    if any(tie.owner_stage > 0 for tie in ties):
        raise ValueError(
            "on_nonfinite='skip-window' with a tied weight whose owner is not the first stage: the reader would have "
            "weights of an update that is taken back; use on_nonfinite='skip-local' or 'raise'"
        )
    undecided = shape.num_stages + shape.most_ahead
    if family.early is not None:  # gradients of the first stage until its own, and as many until all have heard of them
        undecided = 2 * (1 + max(family.early(shape, stage) for stage in range(shape.num_stages)))
    if undecided > KNOWN_WINDOWS * shape.accumulation:
        raise ValueError(
            f"on_nonfinite='skip-window' with {shape.num_stages} stages and {shape.accumulation} micro-batches a "
            f"window: more than {KNOWN_WINDOWS} windows could be undecided; use a larger accumulation, or 'skip-local'"
        )
    return safety
