"""One stage with everything that the executor needs to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from paci_rt.action import Op
from paci_rt.clock import HostClock
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime.audit import StageAudit
from paci_rt.runtime.guard import Guard
from paci_rt.runtime.schedulers import Follower
from paci_rt.runtime.stage import PipelineStage
from paci_rt.runtime.tied_weights import TiedExchange
from paci_rt.transport.base import Message
from paci_rt.weights.base import StageWeights


@dataclass(kw_only=True)
class StageRuntime:
    """A stage, its optimizer, its weights, and what is under way in it.

    Attributes:
        accumulation: micro-batches a window.
        divisor: what a window's summed gradients are divided by.
        recompute: forwards keep their arguments only and run again before the backward.
        guard: looks at gradients before weights take them; None where the caller takes the steps.
        clock: tells when its actions began and ended.
        owns_stage: whether the stage's gradients go here; no other schedule may have it then.
    """

    stage: PipelineStage
    audit: StageAudit
    optimizer: StageOptimizer
    weights: StageWeights
    accumulation: int
    divisor: int
    recompute: bool = False
    after_update: Callable[[], None] | None = None
    ties: TiedExchange | None = None
    guard: Guard | None = None
    owns_stage: bool = True
    complete: int = 0  # gradients of the window in the making, where replicas add up its sums
    clock: HostClock = field(default_factory=HostClock)
    received: dict[tuple[Op, int], Message] = field(default_factory=dict)
    outgoing: dict[tuple[Op, int], Message] = field(default_factory=dict)

    def restart(self, version: int) -> None:
        """The pipeline is empty, and every stage holds ``version``."""
        self.audit.version = version
        if isinstance(self.after_update, Follower):
            self.after_update.forget()
        self.weights.restart(version)
        if self.guard is not None:
            self.guard.restart(version)


def moved(message: Message, device: torch.device) -> Message:
    """A message on the device of the stage that takes it, which within one process may not be that of its sender."""
    if all(tensor is None or tensor.device == device for tensor in message.tensors):
        return message
    # torch orders a copy behind the current streams of both devices; a copy to the CPU is over when its call returns.
    unblocked = device.type != "cpu"
    tensors = (None if tensor is None else tensor.to(device, non_blocking=unblocked) for tensor in message.tensors)
    return replace(message, tensors=tuple(tensors))
