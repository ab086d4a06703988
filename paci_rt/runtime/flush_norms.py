"""The exact norm of a whole model's gradient under a flush schedule.

Each stage adds the norms of its parameters to what travels to the last stage, which sends the result back.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.transport.base import Message

EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to a norm before it divides."""
EPS_FP32, ONE = np.float32(EPS), np.float32(1.0)


def parameter_norms(optimizer: StageOptimizer, order: list[list[int]], divisor: float, device: torch.device) -> Tensor:
    """2-norms [n] of the mean gradients of a sealed window, in ``order``: the places of each flat group's parameters.

    Sums are divided in place unless ``divisor`` is a power of two, whose division commutes with all that follows.
    """
    sums = optimizer.sealed_sums()
    if not sums:
        return torch.zeros(0, device=device)
    sums.sort(key=lambda one: order[one[0]][one[1]])
    norms = torch.stack(torch._foreach_norm([total for _, _, total in sums]))
    return norms if divisor == 1.0 else norms.div_(divisor)


def total_norm(norms: Tensor) -> Tensor:
    """2-norm [] of all norms [n]."""
    return torch.linalg.vector_norm(norms) if norms.numel() else norms.new_zeros(())


def in_fp32(number: float) -> np.float32:
    """``number`` rounded; infinite where fp32 ends."""
    with np.errstate(over="ignore"):
        rounded: np.float32 = np.float32(number)
    return rounded


def coefficient(max_norm: np.float32, total: Tensor) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients of norm ``total``, [], with, in its order of
    operations in fp32: a number over a tensor is the number times its reciprocal."""
    norm = np.float32(float(total)) + EPS_FP32
    if not norm < np.inf:
        return float(max_norm) / float(norm)  # zero, or NaN
    if float(max_norm) >= 2 * float(norm):
        return 1.0  # the product could be too large for fp32
    found = max_norm * (ONE / norm)
    return 1.0 if found > 1.0 else float(found)


@lru_cache(maxsize=16)
def _flags(bad: bool, spike: bool, scale: float, device: torch.device) -> Tensor:
    """What is read only may be sent again and again."""
    return torch.tensor([bad, spike, scale], dtype=torch.float64, device=device)


class Settlement:
    """One window of a flush schedule, as one stage sees it.

    Attributes:
        norms: of the parameters of the stages up to this one, once they are known.
        total: of all stages, then. bad: some stage's gradients are not finite. spike: the total stands out.
            scale: of the losses; the total is without it, and the norms are not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.norms: Tensor | None = None
        self.total: Tensor | None = None
        self.bad = self.spike = False
        self.scale = 1.0

    def add(self, norms: Tensor, *, bad: bool) -> None:
        """This stage's own."""
        self.norms = norms if self.norms is None else torch.cat([self.norms, norms])
        self.bad = self.bad or bad

    def up(self) -> Message:
        """For the next stage."""
        assert self.norms is not None
        return self._message(self.norms)

    def take_up(self, message: Message) -> None:
        """From the stage before."""
        self.norms = self._read(message)

    def down(self) -> Message:
        """For the stage before."""
        assert self.total is not None
        return self._message(self.total.reshape(1))

    def take_down(self, message: Message) -> None:
        """From the next stage."""
        self.total = self._read(message)[0]

    def _message(self, values: Tensor) -> Message:
        return Message((values, _flags(self.bad, self.spike, self.scale, self._device)), (False, False))

    def _read(self, message: Message) -> Tensor:
        values, flags = message.tensors
        assert values is not None
        assert flags is not None
        bad, spike, self.scale = flags.tolist()
        self.bad, self.spike = bool(bad), bool(spike)
        return values
