"""How large the gradient of all stages is in a window that some of them have not told of yet.

Norms of the stages rise and fall together: a window of rare text is large in all of them. So what is missing is
foretold from this stage's own norm, by the ratio that theirs had to it in windows of which both are known. How far that
is off, and the last norm that was heard of: ``docs/method/convergence.md``, "Old norms".
"""

from __future__ import annotations

import math

from paci_rt.runtime.safety import KNOWN_WINDOWS

MEMORY = 0.7
"""Of the moving mean of a ratio's logarithm: weight of what it was."""


class OtherNorms:
    """Sums of squares of the stages' mean gradients, by window.

    Args:
        stage, num_stages: who keeps them.
    """

    def __init__(self, stage: int, num_stages: int) -> None:
        self._stage = stage
        self._squares: list[dict[int, float]] = [{} for _ in range(num_stages)]
        self._ratios: list[float | None] = [None] * num_stages

    def restart(self) -> None:
        """Nothing is known any more."""
        self._squares = [{} for _ in self._squares]
        self._ratios = [None] * len(self._ratios)

    def hear(self, stage: int, window: int, squares: float) -> None:
        """``stage``, which may be this one, has this sum of squares in ``window``; what was heard before is kept."""
        known = self._squares[stage]
        if window in known:
            return
        known[window] = squares
        if len(known) > KNOWN_WINDOWS:
            del known[min(known)]
        for other in range(len(self._squares)) if stage == self._stage else (stage,):
            if other != self._stage:
                self._compare(other, window)

    def _compare(self, other: int, window: int) -> None:
        theirs, own = self._squares[other].get(window), self._squares[self._stage].get(window)
        if not theirs or not own or not math.isfinite(theirs / own) or not theirs / own:
            return
        ratio, before = math.log(theirs / own), self._ratios[other]
        self._ratios[other] = ratio if before is None else MEMORY * before + (1 - MEMORY) * ratio

    def total(self, window: int) -> float:
        """Sum of squares of all stages: what is known of ``window``, and what is likely of the others. A stage that
        nothing has been heard of counts as zero."""
        return math.fsum(self._likely(stage, window) for stage in range(len(self._squares)))

    def _likely(self, stage: int, window: int) -> float:
        known, own = self._squares[stage], self._squares[self._stage].get(window)
        if window in known:
            return known[window]
        ratio = self._ratios[stage]
        if ratio is not None and own:
            return own * math.exp(ratio)
        return known[max(known)] if known else 0.0
