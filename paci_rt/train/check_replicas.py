"""Options about replicas that cannot work, refused before anything is started."""

from __future__ import annotations

from typing import Any

from paci_rt import schedules
from paci_rt.runtime.replica_checks import OVERLAPPING
from paci_rt.wording import shown

SHARDABLE = ("adamw", "nadam", "lion", "sgd")
"""Optimizers whose state can be cut at any element."""


def check_replicas(config: Any) -> None:
    """Raise ValueError for options of a ``TrainConfig`` that pipelines which train together cannot have."""
    if config.replicas == 1:
        for name, value in (("--zero1", config.zero1), ("--overlap", config.overlap)):
            if value:
                said = name if value is True else f"{name} {shown(value)}"
                raise ValueError(f"{said} is for several replicas: give --replicas 2 or more, or leave it out")
        return
    if config.transport == "local":
        raise ValueError(
            f"--replicas {config.replicas} with --transport local, which has one process: use another transport"
        )
    if config.device != "cpu":
        raise ValueError(f"--replicas {config.replicas} with --device {config.device}: replicas run on the CPU")
    _check_overlap(config)
    _check_taken_back(config)
    if config.zero1 and config.optimizer not in SHARDABLE:
        raise ValueError(
            f"--zero1 with --optimizer {config.optimizer}, whose state cannot be cut at any element: use "
            f"{', '.join(SHARDABLE)}"
        )
    if config.zero1 and config.policy == "predict":
        raise ValueError(
            "--zero1 with --policy predict, which needs the momentum of all parameters on each replica: use another "
            "policy, or leave --zero1 out"
        )


def _check_taken_back(config: Any) -> None:
    """An update may be taken back before a copy of a tied weight has left."""
    family, tied = schedules.get(config.schedule), config.shape.tied and config.stages * config.chunks > 1
    if config.on_nonfinite == "skip-window" and tied and not family.flush:
        what = "--dtype fp16, which needs --on-nonfinite skip-window," if config.dtype == "fp16" else "skip-window"
        remedy = "--dtype bf16" if config.dtype == "fp16" else "--on-nonfinite skip-local or raise"
        raise ValueError(
            f"--replicas {config.replicas} with tied embeddings and {what} under {family.name}: the head would have "
            f"weights of an update that is taken back; use {remedy}, --no-tied, or a schedule that flushes such as 1f1b"
        )


def _check_overlap(config: Any) -> None:
    overlap, family = config.overlap, schedules.get(config.schedule)
    possible = family.takes_overlap and not family.one_micro_batch_windows and config.policy in OVERLAPPING
    waits = config.accumulation // 2 if overlap is None and possible else overlap
    if config.buffers == 1 and waits:
        raise ValueError(
            f"--buffers 1 with --replicas {config.replicas} under {family.name}, where sums travel during {waits} "
            "micro-batches of the next window (--overlap): they need a buffer of their own; use --buffers 2, or "
            "--overlap 0"
        )
    if overlap is None:
        return
    if type(overlap) is not int or not 0 <= overlap < config.accumulation:
        raise ValueError(
            f"--overlap is {shown(overlap)}: an update comes before the next window is complete; give 0 to "
            f"{config.accumulation - 1}, less than --accumulation"
        )
    if overlap and not possible:
        raise ValueError(
            f"--overlap {overlap} under {family.name}, policy {config.policy}: an update can wait only under paci or "
            f"paci-split with policy {' or '.join(OVERLAPPING)}; use --overlap 0"
        )
