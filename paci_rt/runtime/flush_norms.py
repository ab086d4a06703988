"""The exact norm of a whole model's gradient under a flush schedule.

Each stage adds the norms of its parameters to what travels to the last stage, which sends the result back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.transport.base import Message

EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to a norm before it divides."""


def parameter_norms(optimizer: StageOptimizer, order: dict[str, int], divisor: float, device: torch.device) -> Tensor:
    """2-norms [n] of the mean gradients of a sealed window, in the order of the module's parameters.

    Sums are divided in place unless ``divisor`` is a power of two, whose division commutes with all that follows.
    """
    named = [
        (order.get(optimizer.groups[number].names[position], len(order)), total)
        for number, position, total in optimizer.sealed_sums()
    ]
    if not named:
        return torch.zeros(0, device=device)
    totals = [total for _, total in sorted(named, key=lambda pair: pair[0])]
    return torch.stack(torch._foreach_norm(totals)) / divisor


def total_norm(norms: Tensor) -> Tensor:
    """2-norm [] of all norms [n]."""
    return torch.linalg.vector_norm(norms) if norms.numel() else norms.new_zeros(())


def coefficient(max_norm: float, total: Tensor) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients of norm ``total``, [], with, in its order of
    operations: a number over a tensor is the number times its reciprocal."""
    found: Tensor = max_norm / (total + EPS)
    return float(found.clamp(max=1.0))


class Settlement:
    """One window of a flush schedule, as one stage sees it.

    Attributes:
        norms: of the parameters of the stages up to this one, once they are known.
        total: of all stages. bad: some stage's gradients are not finite. spike: the total stands out.
            scale: of the losses; the total is without it, and the norms are not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.norms = torch.zeros(0, device=device)
        self.total = torch.zeros((), device=device)
        self.bad = self.spike = False
        self.scale = 1.0

    def add(self, norms: Tensor, *, bad: bool) -> None:
        """This stage's own."""
        self.norms = torch.cat([self.norms, norms])
        self.bad = self.bad or bad

    def up(self) -> Message:
        """For the next stage."""
        return self._message(self.norms)

    def take_up(self, message: Message) -> None:
        """From the stage before."""
        self.norms = self._read(message)

    def down(self) -> Message:
        """For the stage before."""
        return self._message(self.total.reshape(1))

    def take_down(self, message: Message) -> None:
        """From the next stage."""
        self.total = self._read(message)[0]

    def _message(self, values: Tensor) -> Message:
        flags = torch.tensor([self.bad, self.spike, self.scale], dtype=torch.float64, device=self._device)
        return Message((values, flags), (False, False))

    def _read(self, message: Message) -> Tensor:
        values, flags = message.tensors
        assert values is not None
        assert flags is not None
        bad, spike, self.scale = flags.tolist()
        self.bad, self.spike = bool(bad), bool(spike)
        return values
