"""What a simulation is given: seconds of every operation on every stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from paci_rt.schedules import limits
from paci_rt.wording import shown

Floats = npt.NDArray[np.float64]
LEAST_BANDWIDTH = 1e-3
MOST_NOISE = 10.0
MOST_FACTOR = 1e6


def most_of(name: str) -> float:
    """The largest value of a field: sums of it over any timeline are finite."""
    if name in ("noise", "micro_batch_factors"):
        return MOST_NOISE if name == "noise" else MOST_FACTOR
    return limits.MOST_SECONDS if name.endswith("_s") and "bytes" not in name else limits.MOST_BYTES


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds and bytes of one micro-batch; every tuple has one entry per *stage*, or exactly one for all stages.

    Attributes:
        forward_s, input_grad_s, weight_grad_s: compute; an undivided backward takes both of its halves.
        update_s: one local update.
        predict_s: putting weights to come in place and the true ones back, for a forward that runs ahead of an update
            under policy ``predict`` or with look-ahead.
        hop_s: latency of a message between different ranks.
        bandwidth_bytes_per_s: of every channel.
        message_bytes: output of each stage; its gradient has the same size.
        activation_bytes: what a micro-batch keeps between its F and its B (or I).
        stash_bytes: what it keeps between its I and its W.
        input_bytes: what policy ``recompute`` keeps in place of ``activation_bytes``.
        weight_bytes: one version of the weights.
        micro_batch_factors: every compute time of micro-batch ``m`` is multiplied by ``factors[m % len(factors)]``.
        noise: relative standard deviation of every compute action and update (log-normal, mean 1).
        seed: of the noise; equal seeds give equal timelines.

    Raises:
        ValueError: a value that is negative, not finite or no number, or an empty tuple.

    Example:
        >>> from paci_rt.simulate import Costs
        >>> costs = Costs(forward_s=(0.01,), input_grad_s=(0.01,), weight_grad_s=(0.005, 0.007), hop_s=1e-4)
        >>> costs.per_stage("weight_grad_s", 2).tolist(), costs.per_stage("forward_s", 2).tolist()
        ([0.005, 0.007], [0.01, 0.01])
    """

    forward_s: tuple[float, ...]
    input_grad_s: tuple[float, ...]
    weight_grad_s: tuple[float, ...]
    update_s: tuple[float, ...] = (0.0,)
    predict_s: tuple[float, ...] = (0.0,)
    hop_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    message_bytes: tuple[float, ...] = (0.0,)
    activation_bytes: tuple[float, ...] = (0.0,)
    stash_bytes: tuple[float, ...] = (0.0,)
    input_bytes: tuple[float, ...] = (0.0,)
    weight_bytes: tuple[float, ...] = (0.0,)
    micro_batch_factors: tuple[float, ...] = (1.0,)
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "seed":
                limits.check_integer("seed", value, 0, 2**63 - 1)
            elif isinstance(field.default, (int, float)):
                self._check_number(field.name, value)
            else:
                self._check_list(field.name, value)
        if not self.bandwidth_bytes_per_s >= LEAST_BANDWIDTH:
            raise ValueError(
                f"bandwidth_bytes_per_s is {self.bandwidth_bytes_per_s!r}: give a number above 0, at least "
                f"{LEAST_BANDWIDTH:g}, or math.inf for messages that take no longer than their latency"
            )

    @staticmethod
    def _check_number(name: str, value: Any) -> None:
        endless = name == "bandwidth_bytes_per_s" and value == math.inf
        if not (_is_number(value) and (endless or 0 <= value <= most_of(name))):
            raise ValueError(
                f"{name} is {shown(value)}: give a finite number of at least 0 and at most {most_of(name):g}"
            )

    def _check_list(self, name: str, values: Any) -> None:
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise ValueError(f"{name} is {shown(values)}: give a tuple of one number for all stages, or one for each")
        for at, value in enumerate(values):
            if not (_is_number(value) and 0 <= value <= most_of(name)):
                where = f" of stage {at}" if len(values) > 1 and name != "micro_batch_factors" else ""
                raise ValueError(
                    f"{name}{where} is {shown(value)}: give a finite number of at least 0 and at most {most_of(name):g}"
                )
        object.__setattr__(self, name, tuple(map(float, values)))

    def per_stage(self, name: str, num_stages: int) -> Floats:
        """The values of field ``name``, one per stage.

        Raises:
            ValueError: there are neither one nor ``num_stages`` of them.
        """
        values = getattr(self, name)
        if len(values) not in (1, num_stages):
            raise ValueError(
                f"{name} has {len(values)} values for {num_stages} stages: give one for all stages, or one for each"
            )
        return np.broadcast_to(np.array(values, dtype=np.float64), (num_stages,))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
