"""Steps of the optimizers by the native core: what a step is told, and how the core takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from torch import Tensor

from paci_rt import native

if TYPE_CHECKING:
    from typing_extensions import NotRequired, Unpack


class Ahead(NamedTuple):
    """Makes a step one that only the weights take, several times over, on copies of the optimizer's state.

    Attributes:
        known: for each piece whether the sum has a gradient of it; without one its momentum stands in.
        repeats: steps to look ahead, at least 1.
        kept: flat fp32, receives fp32 weights as they were; None for bf16 and fp16 ones, which have masters.
    """

    known: list[bool]
    repeats: int
    kept: Tensor | None


class FlatStep(TypedDict):
    """What a step over ``pieces`` of flat fp32 buffers is told, whatever the optimizer.

    Attributes:
        master: fp32 weights, or the fp32 parameters themselves.
        weight: bf16 or fp16 parameters, which receive the rounded result; None where the parameters are fp32.
        grad_sum: fp32 sums of gradients.
        pieces: offset and length in elements and number of this step, from 1, of every parameter to update.
        lr, weight_decay: as in torch's optimizers.
        divisor: what the sums are divided by on the way; a negative one maximises.
        stream: 0 on the CPU.
        ahead: look ahead instead.
        clip: what gradients are multiplied by; on a GPU fp32 of one element, where NaN leaves all as it is.
    """

    master: Tensor
    weight: Tensor | None
    grad_sum: Tensor
    pieces: list[tuple[int, int, int]]
    lr: float
    weight_decay: float
    divisor: float
    stream: NotRequired[int]
    ahead: NotRequired[Ahead | None]
    clip: NotRequired[Tensor | float]


class AdamWStep(FlatStep):
    """What a step of AdamW or NAdam is told besides; betas and eps as in ``torch.optim.AdamW``.

    Attributes:
        exp_avg, exp_avg_sq: fp32 first and second moments.
        step_sizes: make it NAdam: what first moment and gradient are multiplied by, for each piece and, within it, each
            repeat of a look-ahead.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    betas: tuple[float, float]
    eps: float
    step_sizes: NotRequired[Sequence[tuple[float, float]]]


class SGDStep(FlatStep):
    """What a step of SGD is told besides; numbers as in ``torch.optim.SGD``.

    Attributes:
        momentum_buffer: fp32, None where there is no momentum.
    """

    momentum_buffer: Tensor | None
    momentum: float
    dampening: float
    nesterov: bool


class LionStep(FlatStep):
    """What a step of Lion is told besides.

    Attributes:
        exp_avg: fp32 momentum.
        betas: of the direction and of the momentum.
    """

    exp_avg: Tensor
    betas: tuple[float, float]


def adamw_step(**step: Unpack[AdamWStep]) -> None:
    """One step of AdamW or NAdam; looking ahead, the mean of past gradients stands in for unknown ones."""
    _take("adamw", {"step_sizes": (), **step})


def sgd_step(**step: Unpack[SGDStep]) -> None:
    """One step of SGD. A piece whose step is 1 sets its momentum buffer to the gradient, as ``torch.optim.SGD`` does.

    Looking ahead, the gradient under which the buffer would stay what it is stands in for unknown ones.
    """
    _take("sgd", step)


def lion_step(**step: Unpack[LionStep]) -> None:
    """One step of Lion, whatever its number; looking ahead, the momentum stands in for unknown gradients."""
    _take("lion", step)


def _take(optimizer: str, step: Mapping[str, Any]) -> None:
    """Let the core take a step, or look ahead: the core reads where tensors lie and how long they are."""
    master, weight, ahead = step["master"], step["weight"], step.get("ahead")
    arguments = {"stream": 0, **step, **({} if ahead is None else ahead._asdict())}
    arguments.pop("ahead", None)
    if "betas" in arguments:
        arguments["beta1"], arguments["beta2"] = arguments.pop("betas")
    run = getattr(native.core(), f"{optimizer}_step" if ahead is None else f"{optimizer}_ahead")
    run(
        **arguments,
        dtype=native.DTYPE_CODES[master.dtype if weight is None else weight.dtype],
        device=native.device_code(master.device, "the parameter group"),
        threads=native.get_num_threads(),
    )
