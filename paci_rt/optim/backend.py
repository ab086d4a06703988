"""The one switch between CPU and GPU: where a stage may run, and what sums and orders its gradients and updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from paci_rt import native
from paci_rt.optim import steps_native
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.accumulator_plain import PlainAccumulator
from paci_rt.optim.flat import PLAIN_DTYPES, FlatGroup
from paci_rt.optim.update_stream import UpdateStream

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Steps(Protocol):
    """Takes the optimizers' steps over a flat group: :mod:`paci_rt.optim.steps_native`, or the kernels."""

    def adamw_step(self, **step: Unpack[steps_native.AdamWStep]) -> None: ...
    def sgd_step(self, **step: Unpack[steps_native.SGDStep]) -> None: ...
    def lion_step(self, **step: Unpack[steps_native.LionStep]) -> None: ...


def uses_kernels(device: torch.device) -> bool:
    """Whether flat buffers on a device are worked on by the Triton kernels, and not by the native core."""
    return device.type == "cuda"


def make_accumulator(group: FlatGroup, buffers: int) -> GradAccumulator:
    """The accumulator that fits the device of a group.

    Raises:
        TritonMissingError: the group is on a GPU, and Triton is not installed or too old.
    """
    if group.dtype in PLAIN_DTYPES:
        return PlainAccumulator(group, buffers=buffers)
    if not uses_kernels(group.device):
        return GradAccumulator(group, buffers=buffers)
    from paci_rt.optim.accumulator_triton import KernelAccumulator

    return KernelAccumulator(group, buffers=buffers)


def make_steps(group: FlatGroup) -> Steps:
    """What takes an optimizer's steps over a group on its device; raises as :func:`make_accumulator` does."""
    if not uses_kernels(group.device):
        return steps_native
    from paci_rt.optim.steps_triton import TritonSteps

    return TritonSteps(group.layout)


def update_order(device: torch.device | None) -> UpdateStream | None:
    """What orders updates of parameters on ``device``; None where they are over when their call returns."""
    return UpdateStream(device) if device is not None and uses_kernels(device) else None


def usable(device: torch.device) -> torch.device:
    """A device that stages can run on, with its number.

    Raises:
        ValueError: it is another kind of device, or CUDA is not there, or the native core was built without it.
        TritonMissingError: a CUDA device, and Triton is missing or too old.
    """
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"device is {str(device)!r}: stages run on 'cpu' or on a CUDA device")
    if not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "is a CPU build"
        raise ValueError(
            f"device is {str(device)!r}, and torch {torch.__version__} {built}: paci-rt doctor tells what is missing"
        )
    native.device_code(device, "the stage")
    import paci_rt.kernels  # noqa: F401  what is missing should show now and not in the first backward

    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
