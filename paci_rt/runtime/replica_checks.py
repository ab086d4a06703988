"""What cannot be asked of replicas, refused by name before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paci_rt.runtime.replicas import Replicas
from paci_rt.runtime.safety import Safety
from paci_rt.schedules import ScheduleFamily, Shape
from paci_rt.schedules.lowering import TiedWeight

OVERLAPPING = ("bounded", "recompute")
"""Policies under which an update may come after backwards of the next window."""


def overlap_of(replicas: Replicas | None, family: ScheduleFamily, accumulation: int, policy: str | None) -> int:
    """Micro-batches of the next window that run while the sums of one travel.

    Raises:
        ValueError: they were asked for where the schedule cannot have them.
    """
    if replicas is None or replicas.count == 1:
        return 0
    possible = family.takes_overlap and not family.one_micro_batch_windows and policy in (None, *OVERLAPPING)
    if replicas.overlap is None:
        return accumulation // 2 if possible else 0
    if replicas.overlap and not possible:
        raise ValueError(
            f"overlap is {replicas.overlap} under {family.name}, policy {policy or family.policies[0]!r}: an update "
            f"can wait only under paci or paci-split with policy {' or '.join(OVERLAPPING)}; use overlap 0"
        )
    return replicas.overlap


def check_replicas(
    replicas: Replicas | None,
    family: ScheduleFamily,
    shape: Shape,
    policy: str,
    buffers: int | None,
    safety: Safety,
    optimizers: Sequence[Any],
    ties: Sequence[TiedWeight],
) -> None:
    """Raise ValueError for arguments that replicas cannot keep."""
    if replicas is None:
        return
    if shape.overlap and buffers == 1:
        raise ValueError(
            f"buffers is 1 and overlap {shape.overlap}: sums that travel need a buffer of their own; use buffers=2, or "
            "overlap=0"
        )
    if safety.on_nonfinite == "skip-window" and not family.flush and ties and shape.num_stages > 1:
        raise ValueError(
            "on_nonfinite='skip-window' with tied weights and replicas under a schedule that does not flush: the "
            "reader would have weights of an update that is taken back; use on_nonfinite='skip-local' or 'raise'"
        )
    if not replicas.shard_optimizer:
        return
    for optimizer in optimizers:
        if not getattr(optimizer, "shardable", False):
            name = "no optimizer" if optimizer is None else type(optimizer).__name__
            raise ValueError(
                f"shard_optimizer=True with {name}, whose state cannot be cut at any element: use paci_rt's AdamW, "
                "NAdam, Lion or SGD, or leave shard_optimizer out"
            )
    if policy == "predict":
        raise ValueError(
            "shard_optimizer=True under policy 'predict', which needs the momentum of all parameters on each replica: "
            "leave shard_optimizer out, or use another policy"
        )
