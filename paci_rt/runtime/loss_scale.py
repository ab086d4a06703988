"""Dynamic loss scaling, for fp16 parameters."""

from __future__ import annotations

import math
from typing import Any


class LossScaler:
    """Scales losses so that small gradients survive fp16, as ``torch.amp.GradScaler`` does, for a pipeline.

    Give each process of a run one of the same arguments. A window has one scale on all stages: the last stage begins
    its backwards with it, and every stage divides by it in its update. A window whose gradients are not finite is
    skipped on every stage (``on_nonfinite="skip-window"``) and lowers the scale; ``growth_interval`` windows without
    one raise it. Scales are powers of two, so that they change no bit of what is finite.

    Args:
        init_scale, growth_factor, backoff_factor, growth_interval: as there.

    Raises:
        ValueError: a scale or a factor is no power of two, or out of range.

    Example:
        >>> scaler = paci_rt.LossScaler(init_scale=2.0**16)
        >>> def loss_fn(output, target):
        ...     return nn.functional.mse_loss(output.float(), target)
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2).half()], n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW, loss_scale=scaler
        ... )
        >>> _ = pipeline.step(torch.full((4, 4), 8.0).half(), target=torch.full((4, 2), -99.0))
        >>> pipeline.drain()
        >>> pipeline.stats()["skipped_windows"], scaler.get_scale()
        ({0: 1}, 32768.0)
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        values = {"init_scale": init_scale, "growth_factor": growth_factor, "backoff_factor": backoff_factor}
        for name, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and LEAST <= value <= MOST) or math.frexp(value)[0] != 0.5:
                raise ValueError(
                    f"{name} is {value!r}: give a power of two from 2**-24 to 2**60, such as {_DEFAULTS[name]}"
                )
        if growth_factor < 1 or backoff_factor >= 1:
            raise ValueError(
                f"growth_factor is {growth_factor} and backoff_factor {backoff_factor}: the first must not be below 1, "
                "and the second must be"
            )
        if not isinstance(growth_interval, int) or isinstance(growth_interval, bool) or growth_interval < 1:
            raise ValueError(f"growth_interval is {growth_interval!r}: give an integer of at least 1")
        self.settings: dict[str, Any] = {**values, "growth_interval": growth_interval}
        self._scale, self._good = float(init_scale), 0

    def get_scale(self) -> float:
        """The scale of windows that begin now; meaningful where the last stage is."""
        return self._scale

    def update(self, *, bad: bool, scale: float) -> None:
        """A window that ran at ``scale`` is over. A bad one lowers the scale unless a lower one is in use already."""
        if bad:
            self._good = 0
            if scale <= self._scale:
                self._scale = max(self._scale * self.settings["backoff_factor"], LEAST)
            return
        self._good += 1
        if self._good >= self.settings["growth_interval"]:
            self._good = 0
            self._scale = min(self._scale * self.settings["growth_factor"], MOST)

    def state_dict(self) -> dict[str, Any]:
        """Scale and count of good windows, of the last stage's scaler. Checkpoints have it."""
        return {"scale": self._scale, "good_windows": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, on the process of the last stage or on all.

        Raises:
            ValueError: it is something else.
        """
        if not is_state(state):
            raise ValueError(f"{state!r} is no state of a LossScaler: give what its state_dict() returned")
        self._scale, self._good = state["scale"], state["good_windows"]


def is_state(state: Any) -> bool:
    """Whether :meth:`LossScaler.load_state_dict` can take ``state``."""
    if not isinstance(state, dict) or state.keys() != {"scale", "good_windows"}:
        return False
    scale, good = state["scale"], state["good_windows"]
    power = isinstance(scale, float) and LEAST <= scale <= MOST and math.frexp(scale)[0] == 0.5
    return power and type(good) is int and good >= 0


LEAST, MOST = 2.0**-24, 2.0**60
"""Of a scale."""
_DEFAULTS = {"init_scale": "2.0**16", "growth_factor": "2.0", "backoff_factor": "0.5"}
