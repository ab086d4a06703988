"""What a stage did, counted as it happens and never derived: versions, drift, activations in flight, seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from paci_rt.action import Action
from paci_rt.errors import DriftBoundError


@dataclass(kw_only=True)
class StageAudit:
    """Counters of one stage.

    Attributes:
        stage: its index.
        drift_bound: the schedule's bound; a larger drift raises.
        version: local updates applied so far.
        drift: micro-batches by the updates that came between their forward and their backward.
        compute_s: seconds inside F, B and U; exposed_comm_s: seconds in receives and in starting sends.
    """

    stage: int
    drift_bound: int
    version: int = 0
    drift: Counter[int] = field(default_factory=Counter)
    in_flight: dict[int, tuple[int, int]] = field(default_factory=dict)
    peak_in_flight: int = 0
    activation_bytes: int = 0
    peak_activation_bytes: int = 0
    compute_s: float = 0.0
    exposed_comm_s: float = 0.0
    micro_batches: int = 0
    windows: int = 0
    nonfinite_gradients: int = 0
    grad_norm: float = 0.0

    def forward(self, micro_batch: int, saved_bytes: int) -> None:
        self.in_flight[micro_batch] = self.version, saved_bytes
        self.peak_in_flight = max(self.peak_in_flight, len(self.in_flight))
        self.activation_bytes += saved_bytes
        self.peak_activation_bytes = max(self.peak_activation_bytes, self.activation_bytes)

    def backward(self, action: Action) -> None:
        """Count the drift of a micro-batch before its backward.

        Raises:
            DriftBoundError: it exceeds the schedule's bound.
        """
        version, saved_bytes = self.in_flight.pop(action.index)
        drift = self.version - version
        if drift > self.drift_bound:
            raise DriftBoundError(
                f"action {action}: {drift} updates since its forward, more than the bound {self.drift_bound} "
                f"of stage {self.stage}"
            )
        self.drift[drift] += 1
        self.activation_bytes -= saved_bytes
        self.micro_batches += 1

    def update(self, grad_norm: float, nonfinite: int) -> None:
        self.version += 1
        self.windows += 1
        self.grad_norm = grad_norm
        self.nonfinite_gradients += nonfinite

    def reset(self) -> None:
        """Forget what has been counted; keep what is true of the stage now (version, micro-batches in flight)."""
        self.drift.clear()
        self.peak_in_flight = len(self.in_flight)
        self.peak_activation_bytes = self.activation_bytes
        self.compute_s = self.exposed_comm_s = 0.0
        self.micro_batches = self.windows = self.nonfinite_gradients = 0
