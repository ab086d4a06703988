"""What a stage did, counted as it happens and never derived: versions, drift, activations in flight, seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from paci_rt.action import Action, Op
from paci_rt.errors import DriftBoundError


@dataclass(kw_only=True)
class RankAudit:
    """Activations of all stages of one rank together.

    Attributes:
        in_flight: forwards without their backward. held_bytes: what they, and I without their W, keep.
    """

    rank: int
    in_flight: int = 0
    peak_in_flight: int = 0
    held_bytes: int = 0
    peak_held_bytes: int = 0

    def hold(self, micro_batches: int, more_bytes: int) -> None:
        self.in_flight += micro_batches
        self.held_bytes += more_bytes
        if self.in_flight > self.peak_in_flight:
            self.peak_in_flight = self.in_flight
        if self.held_bytes > self.peak_held_bytes:
            self.peak_held_bytes = self.held_bytes

    def reset(self) -> None:
        self.peak_in_flight, self.peak_held_bytes = self.in_flight, self.held_bytes


@dataclass(kw_only=True)
class StageAudit:
    """Counters of one stage.

    Attributes:
        stage: its index.
        rank: what it shares with the other stages of its rank.
        drift_bound, delay_bound: the schedule's bounds under its policy; anything larger raises.
        version: local updates applied so far.
        drift: micro-batches by how many versions their backward's weights were ahead of their forward's.
        delay: micro-batches by how many versions the weights that their gradient changes are ahead of those that
            their forward used.
        nonfinite_windows: whose gradients were not finite here. spiked_windows: whose norm stood out.
        skipped_windows: without an update; taken_back_windows: those among them whose update had been made.
        clipped_windows: whose gradients were clipped.
        norm_lags: for each other stage and window that was clipped, how many windows the newest norm was old; -1 where
            none had come yet.
        nonfinite_gradients, grad_norm: non-finite elements of all updates' gradients; 2-norm of the last one's,
            None before the first one.
        evaluation_s: seconds inside E, which are in none of the others.
        snapshot_bytes: a copy of its state that is being written.
        compute_s: seconds inside F, B, I, W and U; exposed_comm_s: seconds in receives and in starting sends.
    """

    stage: int
    rank: RankAudit
    drift_bound: int
    delay_bound: int
    version: int = 0
    drift: Counter[int] = field(default_factory=Counter)
    delay: Counter[int] = field(default_factory=Counter)
    in_flight: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    pending: dict[int, int] = field(default_factory=dict)
    peak_in_flight: int = 0
    peak_pending: int = 0
    activation_bytes: int = 0
    peak_activation_bytes: int = 0
    snapshot_bytes: int = 0
    peak_snapshot_bytes: int = 0
    compute_s: float = 0.0
    exposed_comm_s: float = 0.0
    evaluation_s: float = 0.0
    micro_batches: int = 0
    windows: int = 0
    nonfinite_windows: int = 0
    spiked_windows: int = 0
    skipped_windows: int = 0
    taken_back_windows: int = 0
    clipped_windows: int = 0
    norm_lags: Counter[int] = field(default_factory=Counter)
    nonfinite_gradients: Any = 0
    grad_norm: Any = None

    def forward(self, micro_batch: int, version: int, kept_bytes: int, full_bytes: int) -> None:
        """A forward used ``version`` and keeps ``kept_bytes`` until its backward, which needs ``full_bytes``."""
        self.in_flight[micro_batch] = version, kept_bytes, full_bytes
        if len(self.in_flight) > self.peak_in_flight:
            self.peak_in_flight = len(self.in_flight)
        self._hold(kept_bytes, 1)

    def backward(self, action: Action, version: int, window: int) -> None:
        """Count drift and delay of a micro-batch before its backward.

        Args:
            action: the backward.
            version: of the weights that it uses.
            window: the micro-batch's, which is the version that its gradient will be applied to.

        Raises:
            DriftBoundError: one of them exceeds the schedule's bound.
        """
        at_forward, kept_bytes, full_bytes = self.in_flight.pop(action.index)
        for what, value, bound, counts in (
            ("drift", version - at_forward, self.drift_bound, self.drift),
            ("delay", window - at_forward, self.delay_bound, self.delay),
        ):
            if not 0 <= value <= bound:
                raise DriftBoundError(
                    f"action {action}: a {what} of {value} updates, while the bound of stage {self.stage} is {bound}"
                )
            counts[value] += 1
        if full_bytes != kept_bytes:
            self._hold(full_bytes - kept_bytes)
        self._hold(-full_bytes, -1)
        if action.op is Op.B:
            self.micro_batches += 1

    def input_gradient(self, micro_batch: int, pending_bytes: int) -> None:
        """An I has left ``pending_bytes`` for its W."""
        self.pending[micro_batch] = pending_bytes
        self.peak_pending = max(self.peak_pending, len(self.pending))
        self._hold(pending_bytes)

    def weight_gradient(self, micro_batch: int) -> None:
        self._hold(-self.pending.pop(micro_batch))
        self.micro_batches += 1

    def _hold(self, more_bytes: int, micro_batches: int = 0) -> None:
        self.activation_bytes += more_bytes
        if self.activation_bytes > self.peak_activation_bytes:
            self.peak_activation_bytes = self.activation_bytes
        self.rank.hold(micro_batches, more_bytes)

    def snapshot(self, held_bytes: int) -> None:
        """So much of a checkpoint that is being written is in memory."""
        self.snapshot_bytes = held_bytes
        self.peak_snapshot_bytes = max(self.peak_snapshot_bytes, held_bytes)

    def update(self, grad_norm: Any, nonfinite: Any) -> None:
        """An update has been issued. On a GPU both are tensors of one element, which are read when somebody asks."""
        self.version += 1
        self.windows += 1
        self.grad_norm = grad_norm
        self.nonfinite_gradients += nonfinite

    def reset(self) -> None:
        """Forget what has been counted; keep what is true of the stage now (version, micro-batches in flight)."""
        self.drift.clear()
        self.delay.clear()
        self.rank.reset()
        self.peak_in_flight, self.peak_pending = len(self.in_flight), len(self.pending)
        self.peak_activation_bytes, self.peak_snapshot_bytes = self.activation_bytes, self.snapshot_bytes
        self.compute_s = self.exposed_comm_s = self.evaluation_s = 0.0
        self.micro_batches = self.windows = self.nonfinite_gradients = 0
        self.nonfinite_windows = self.spiked_windows = self.skipped_windows = self.taken_back_windows = 0
        self.clipped_windows = 0
        self.norm_lags.clear()
