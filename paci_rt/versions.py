"""A stage's weights under its consistency policy: which version a forward and a backward see.

``stash`` and ``2bw`` keep whole flat buffers, allocated once. An update copies the current version into the buffer of
the oldest one, which nobody needs any more, and steps there; parameters are then views of that buffer. What autograd
saved in a forward is either a view of the buffer that the forward used, or the parameter itself, which points to that
buffer again for the time of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from paci_rt import policies
from paci_rt.clock import HostClock
from paci_rt.flat import FlatGroup, FlatHome
from paci_rt.lookahead import LookAhead
from paci_rt.optim import BoundOptimizer
from paci_rt.predict import Predictor


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
        return current, nullcontext()

    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        """Version for the backward of a micro-batch whose forward used version ``at_forward``, and its context."""
        return current, nullcontext()

    def begin_update(self, current: int) -> None:
        """Called before the update that makes version ``current + 1``."""

    def restart(self, current: int) -> None:
        """The parameters hold version ``current`` now, and no other version is of any use."""

    def reset_stats(self) -> None:
        """Count seconds and forwards of look-ahead anew."""


class KeptVersions(StageWeights):
    """Policies ``stash`` and ``2bw``.

    Args:
        policy: one of the two.
        groups: the stage's flat parameters.
        held: versions to keep, the current one among them.
    """

    whole = True

    def __init__(self, policy: str, groups: Sequence[FlatGroup], held: int) -> None:
        self._policy, self._groups, self._held = policy, list(groups), held
        self._homes: list[list[FlatHome]] = [
            [group.home, *(group.make_home() for _ in range(held - 1))] for group in self._groups
        ]
        self._shift = 0
        self.extra_bytes = sum(home.weight.nbytes for homes in self._homes for home in homes[1:])

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        version = policies.forward_version(self._policy, window, current, start)
        return version, self._at(version, current)

    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        version = policies.backward_version(self._policy, at_forward, current)
        return version, self._at(version, current)

    def begin_update(self, current: int) -> None:
        if self._held == 1:
            return
        for group, homes in zip(self._groups, self._homes, strict=True):
            new = homes[self._slot(current + 1)]
            new.weight.copy_(group.weight)
            group.move_to(new)

    def restart(self, current: int) -> None:
        if self._groups:
            now = self._groups[0].home
            self._shift = next(at for at, home in enumerate(self._homes[0]) if home is now) - current

    def _slot(self, version: int) -> int:
        return (version + self._shift) % self._held

    def _at(self, version: int, current: int) -> AbstractContextManager[None]:
        assert 0 <= current - version < self._held, f"version {version} is gone: {self._held} are kept up to {current}"
        return nullcontext() if version == current else self._pointing(version, current)

    @contextmanager
    def _pointing(self, version: int, current: int) -> Iterator[None]:
        for group, homes in zip(self._groups, self._homes, strict=True):
            group.move_to(homes[self._slot(version)])
        try:
            yield
        finally:
            for group, homes in zip(self._groups, self._homes, strict=True):
                group.move_to(homes[self._slot(current)])


class PredictedWeights(StageWeights):
    """Policy ``predict``: a forward runs as many updates ahead as will come before its backward.

    Args:
        bound: the stage's optimizer, whose momentum shows where the weights are going.
    """

    def __init__(self, bound: BoundOptimizer) -> None:
        self._predictor = Predictor(bound)
        self.extra_bytes = self._predictor.nbytes

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        ahead = window - current  # the backward of a window runs at the version of its number
        return current, nullcontext() if ahead <= 0 else self._predictor.ahead(ahead)


class AheadWeights(StageWeights):
    """Window look-ahead over policy ``bounded`` or ``recompute``; see :mod:`paci_rt.lookahead`.

    Args:
        bound: the stage's optimizer, whose accumulators hold what is known of the coming updates.
        accumulation, divisor: as for :class:`~paci_rt.lookahead.LookAhead`.
        early: forwards that the stage runs ahead of its backwards.
        clock: likewise.
    """

    def __init__(
        self,
        bound: BoundOptimizer,
        *,
        accumulation: int,
        divisor: float,
        early: int,
        clock: HostClock | None = None,
    ) -> None:
        shares = policies.shares_pass(accumulation, early)
        self._look_ahead = LookAhead(bound, accumulation=accumulation, divisor=divisor, shares=shares, clock=clock)
        self.extra_bytes = self._look_ahead.nbytes
        self._micro_batches = 0  # of the window in the making

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        ahead = window - current
        context = nullcontext() if ahead <= 0 else self._look_ahead.ahead(ahead, self._micro_batches)
        return current, context

    @property
    def ahead_s(self) -> float:  # type: ignore[override]
        return self._look_ahead.seconds

    @property
    def ahead_forwards(self) -> int:  # type: ignore[override]
        return self._look_ahead.forwards

    def reset_stats(self) -> None:
        self._look_ahead.seconds, self._look_ahead.forwards = 0.0, 0

    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        self._micro_batches += 1
        return current, nullcontext()

    def begin_update(self, current: int) -> None:
        self._micro_batches = 0
        self._look_ahead.window_ends()

    def restart(self, current: int) -> None:
        self._look_ahead.restart()


def make_weights(policy: str, bound: BoundOptimizer, held: int, *, early: bool) -> StageWeights:
    """The weights of a stage under ``policy``, which keeps ``held`` versions.

    Args:
        early: whether any forward of the stage comes before an update of its micro-batch's.

    Raises:
        ValueError: ``predict`` with an optimizer that has no momentum to go by.
    """
    if policy in ("stash", "2bw"):
        return KeptVersions(policy, bound.groups, held)
    return PredictedWeights(bound) if policy == "predict" and early else StageWeights()
