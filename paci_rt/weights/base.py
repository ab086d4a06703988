"""A stage's weights under its consistency policy: which version a forward and a backward see."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

_CURRENT = nullcontext()


class StageWeights:
    """Policies ``bounded`` and ``recompute``: there is one version, the current one.

    Attributes:
        extra_bytes: of whole weights besides the current ones.
        whole: a forward reads weights in other ways than by its layers, so the update must be over before it.
        ahead_s, ahead_forwards: seconds spent on look-ahead, and forwards that ran ahead.
    """

    extra_bytes = 0
    whole = False
    ahead_s, ahead_forwards = 0.0, 0

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        """Version for the forward of a micro-batch of ``window``, and a context in which the parameters have it.

        Args:
            window: the micro-batch's.
            current: updates applied so far.
            start: window before which the pipeline was last empty.
        """
        return current, _CURRENT

    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        """Version for the backward of a micro-batch whose forward used version ``at_forward``, and its context."""
        return current, _CURRENT

    def before_seal(self, window: int, current: int) -> None:
        """All gradients of ``window`` are in, and its update may come later."""

    def begin_update(self, current: int) -> None:
        """Called before the update that makes version ``current + 1``."""

    def restart(self, current: int) -> None:
        """The parameters hold version ``current`` now, and no other version is of any use."""

    def reset_stats(self) -> None:
        """Count seconds and forwards of look-ahead anew."""

    def clipped(self, factor: float) -> None:
        """The gradients of the update that comes now are multiplied by ``factor``."""

    def scaled(self, scale: float) -> None:
        """The sums of the window in the making are ``scale`` times those of its gradients."""

    def taken_back(self) -> None:
        """An update was taken back: the current weights are others than the last ones that a forward saw."""
