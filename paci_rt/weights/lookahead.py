"""Window look-ahead: run a forward at the weights that the optimizer would make now of the gradients that are in.

Delay, not the inconsistency of forward and backward, is what asynchronous updates cost: at stage ``i`` a share
``(P-1-i)/a`` of the forwards runs a version early. The schedule knows how many updates ``d`` will come before a
forward's backward, and the front accumulator holds ``c`` of the ``a`` gradients of the next of them. Such a forward
runs at the weights that ``d`` updates with the mean of those ``c`` would give; as long as ``c`` is 0, with the mean of
the window before, which the accumulator still holds. Neither weights nor optimizer state change, the backward runs at
the then current weights, and no version is kept.

Every early forward has weights ahead of its own, but where an update comes later than its window ends: there the sums
are on their way among the replicas, so forwards share what was made before. Why all this works:
``docs/method/look-ahead.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from paci_rt.clock import HostClock
from paci_rt.optim import SGD
from paci_rt.optim.fused import FusedStageOptimizer
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.weights.base import StageWeights
from paci_rt.weights.scratch import ScratchWeights

SHARED_UNTIL = 4
"""Weights ahead are shared until this many times as many gradients are known."""


def can_look_ahead(stage_optimizer: StageOptimizer) -> bool:
    """Whether an optimizer can be asked for steps that it does not take: paci_rt's own, SGD only with momentum."""
    optimizer = stage_optimizer.optimizer
    still = isinstance(optimizer, SGD) and any(group["momentum"] == 0 for group in optimizer.param_groups)
    return isinstance(stage_optimizer, FusedStageOptimizer) and not still


def require_look_ahead(stage_optimizer: StageOptimizer) -> None:
    """Raise ValueError, with the remedy, for an optimizer that cannot be asked for steps that it does not take."""
    if not can_look_ahead(stage_optimizer):
        still = isinstance(stage_optimizer, FusedStageOptimizer)
        name = type(stage_optimizer.optimizer).__name__ + (" without momentum" if still else "")
        raise ValueError(
            f"lookahead=True cannot use {name}: give one of paci_rt's own optimizers, SGD with momentum above 0"
        )


class LookAhead:
    """Puts a stage's weights ahead for the time of a forward.

    fp32 weights are kept in a scratch buffer meanwhile; of the others the masters bring the true ones back. Weights
    ahead that several forwards share stay in that buffer between those, and change places with the true ones. Where
    replicas share out masters and optimizer state, all weights have such a buffer, of their dtype.

    Args:
        optimizer: the stage's optimizer.
        accumulation: micro-batches a window.
        divisor: what the sum of a whole window is divided by.
        shares: make the weights ahead anew only when SHARED_UNTIL times as many gradients are known. Weights with
            masters have a scratch buffer for it, of their dtype; of the others it takes no more memory.
        careful: stay at the present weights while the gradients that are known are not finite: their window will be
            skipped.
        clock: tells what look-ahead takes, in ``seconds``; None is the host's.
        replicas: whose gradients an update takes together; those of the window in the making are this one's alone.

    Raises:
        ValueError: an optimizer that cannot be asked for steps that it does not take.
    """

    def __init__(
        self,
        optimizer: StageOptimizer,
        *,
        accumulation: int,
        divisor: float,
        shares: bool,
        careful: bool = False,
        clock: HostClock | None = None,
        replicas: int = 1,
    ) -> None:
        require_look_ahead(optimizer)
        assert isinstance(optimizer, FusedStageOptimizer)
        self._optimizer, self._true = optimizer, ScratchWeights(optimizer)
        self._together = optimizer.shards is not None
        self._scratch_bytes = optimizer.prepare_ahead() if self._together else 0
        self._accumulation, self._share = accumulation, divisor / (accumulation * replicas)
        self._replicas = replicas
        self._careful = careful
        self._shares = shares
        self._shared = [  # beside masters; other weights ahead lie where the true ones are kept
            torch.zeros_like(group.weight) if shares and kept is None else None
            for group, kept in zip(optimizer.groups, self._true.kept, strict=True)
        ]
        self._versions: list[int] = []  # of the parameters, when those were made
        self._moved: list[list[int]] = []  # positions in each group, while the shared weights are of use
        self._known = 0  # gradients that made them; 0 while they are of none
        self._clock = clock or HostClock()
        self.seconds, self.forwards = 0.0, 0
        self.factor = 1.0  # by which the last window's gradients were clipped
        self.scales = [1.0, 1.0]  # loss scales of the window before and of the one in the making

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch buffers."""
        shared = sum(shared.nbytes for shared in self._shared if shared is not None)
        return self._true.nbytes + shared + self._scratch_bytes

    @contextmanager
    def ahead(self, updates: int, micro_batches: int) -> Iterator[None]:
        """Within it, the parameters are ``updates`` ahead, by the gradients of ``micro_batches`` of the window."""
        clock, begin = self._clock, self._clock.mark()
        moved, kept = self._put_ahead(updates, micro_batches)
        clock.between(begin, clock.mark(), self._count)
        try:
            yield
        finally:
            begin = clock.mark()
            self._bring_back(moved, kept=kept)
            clock.between(begin, clock.mark(), self._count)
            self.forwards += 1

    def _put_ahead(self, updates: int, micro_batches: int) -> tuple[list[list[int]], bool]:
        """Positions of the parameters that moved, in each group, and whether other forwards will share this."""
        # Weights that the user changed meanwhile are no longer those that the shared ones are ahead of.
        if micro_batches < SHARED_UNTIL * self._known and self._versions == self._param_versions():
            return self._reuse(), True
        return self._make(updates, micro_batches)

    def _count(self, start_s: float, end_s: float) -> None:
        self.seconds += end_s - start_s

    def _make(self, updates: int, micro_batches: int) -> tuple[list[list[int]], bool]:
        before = micro_batches == 0
        wanted = before or not self._careful or self._finite()
        divisor = (micro_batches or self._accumulation * self._replicas) * self._share
        divisor *= (self.scales[0] if before else self.scales[1]) / (self.factor or 1.0)
        kept = self._shares and not before
        self._known = 0  # the scratch buffer is about to be overwritten
        moved = self._moves(divisor, updates, before=before, wanted=wanted)
        if kept:
            self._moved, self._known, self._versions = moved, micro_batches, self._param_versions()
            for shared, group in zip(self._shared, self._optimizer.groups, strict=True):
                if shared is not None:
                    shared.copy_(group.weight)
        return moved, kept

    def _moves(self, divisor: float, updates: int, *, before: bool, wanted: bool) -> list[list[int]]:
        """Positions of the parameters that moved, in each group; none at all where it is not wanted, or where the stage
        has nothing to train."""
        optimizer, kept = self._optimizer, self._true.kept
        if not optimizer.groups:
            return []
        with _without_autocast(optimizer.groups[0].device):
            if self._together:
                true = [one for one in kept if one is not None]
                return optimizer.ahead_together(divisor, updates, true, before=before, wanted=wanted)
            if not wanted:
                return []
            return [optimizer.ahead(at, divisor, updates, one, before=before) for at, one in enumerate(kept)]

    def _bring_back(self, moved: list[list[int]], *, kept: bool) -> None:
        """The true weights are current again; ``kept``: those ahead will be asked for once more."""
        if self._together:
            self._optimizer.before_reading()  # a forward waits for the layers that it has
        for number, positions in enumerate(moved):
            if kept and self._shared[number] is None:
                self._true.trade(number, positions)
            else:
                self._true.restore(number, positions)

    def before_seal(self, updates: int) -> None:
        """The window is complete, and its update comes later: forwards until then run where it would lead by this
        replica's gradients alone."""
        clock, begin = self._clock, self._clock.mark()
        self._known = 0
        moved, kept = self._make(updates, self._accumulation)
        self._bring_back(moved, kept=kept)
        clock.between(begin, clock.mark(), self._count)

    def _finite(self) -> bool:
        ends = [torch.stack(torch.aminmax(one.sums()[0])) for one in self._optimizer.accumulators]
        return all(bool(end.isfinite().all()) for end in ends)

    def _reuse(self) -> list[list[int]]:
        for number, positions in enumerate(self._moved):
            shared = self._shared[number]
            if shared is None:
                self._true.trade(number, positions)
            else:
                self._optimizer.groups[number].weight.copy_(shared)
        return self._moved

    def _param_versions(self) -> list[int]:
        return [param._version for group in self._optimizer.groups for param in group.params]

    def window_ends(self) -> None:
        """The weights are about to change: those ahead of them are of no more use."""
        self._known = 0
        self.scales[0] = self.scales[1]

    def restart(self) -> None:
        """The pipeline is empty: the window before is no longer what comes next."""
        self._known, self.factor = 0, 1.0
        for accumulator in self._optimizer.accumulators:
            accumulator.forget()


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A step looked ahead is one of the optimizer's, which casts nothing."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class AheadWeights(StageWeights):
    """Window look-ahead over policy ``bounded`` or ``recompute``; see :mod:`paci_rt.weights.lookahead`.

    Args:
        optimizer: the stage's optimizer, whose accumulators hold what is known of the coming updates.
        accumulation, divisor: as for :class:`~paci_rt.weights.lookahead.LookAhead`.
        early: forwards that the stage runs ahead of its backwards.
        careful, clock, replicas: likewise.
        overlap: backwards of the next window that come before a window's update.
    """

    def __init__(
        self,
        optimizer: StageOptimizer,
        *,
        accumulation: int,
        divisor: float,
        early: int,
        careful: bool = False,
        clock: HostClock | None = None,
        replicas: int = 1,
        overlap: int = 0,
    ) -> None:
        self._look_ahead = LookAhead(
            optimizer,
            accumulation=accumulation,
            divisor=divisor,
            shares=self.shares(accumulation, early, overlap),
            careful=careful,
            clock=clock,
            replicas=replicas,
        )
        self._accumulation, self._overlap = accumulation, overlap
        self._warm_up = early - overlap
        self.extra_bytes = self._look_ahead.nbytes
        self._micro_batches = 0  # of the window in the making

    @staticmethod
    def shares(accumulation: int, early: int, overlap: int) -> bool:
        """Whether early forwards share weights ahead."""
        return overlap > 0

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        ahead = window - current
        known = self._micro_batches % self._accumulation if self._overlap else self._micro_batches
        context = nullcontext() if ahead <= 0 else self._look_ahead.ahead(ahead, known)
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

    def before_seal(self, window: int, current: int) -> None:
        if self._overlap:
            self._look_ahead.before_seal(window + 1 + self._warm_up // self._accumulation - current)

    def begin_update(self, current: int) -> None:
        # With an overlap, backwards of the next window have come already.
        self._micro_batches = max(0, self._micro_batches - self._accumulation) if self._overlap else 0
        self._look_ahead.window_ends()

    def clipped(self, factor: float) -> None:
        self._look_ahead.factor = factor

    def scaled(self, scale: float) -> None:
        self._look_ahead.scales[1] = scale

    def taken_back(self) -> None:
        self._look_ahead.window_ends()

    def restart(self, current: int) -> None:
        self._micro_batches = 0
        self._look_ahead.restart()
