"""Optimizer steps on the CPU, by the native core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from paci_rt import native
from paci_rt.optim.fused import FusedState


def adam_pass(
    state: FusedState,
    grad_sum: Tensor,
    divisor: float,
    positions: list[int],
    ahead: native.Ahead | None,
    step_sizes: Sequence[tuple[float, float]] = (),
) -> None:
    """One pass over weights, gradients and both moments; ``step_sizes`` as in :func:`paci_rt.native.adamw_step`."""
    if state.group.uses_kernels:
        from paci_rt.optim import steps_triton

        steps_triton.adam(state, grad_sum, divisor, positions, ahead, step_sizes)
        return
    options = state.param_group
    native.adamw_step(
        **flat_arguments(state, grad_sum, divisor, positions),
        exp_avg=state.flat["exp_avg"],
        exp_avg_sq=state.flat["exp_avg_sq"],
        betas=(float(options["betas"][0]), float(options["betas"][1])),
        eps=float(options["eps"]),
        step_sizes=step_sizes,
        ahead=ahead,
    )


def flat_arguments(state: FusedState, grad_sum: Tensor, divisor: float, positions: list[int]) -> dict[str, Any]:
    """What the native passes are told about a flat group, as keyword arguments."""
    group, options, updates = state.group, state.param_group, state.updates()
    return {
        "master": group.weight if state.master is None else state.master,
        "weight": None if state.master is None else group.weight,
        "grad_sum": grad_sum,
        "pieces": [(group.offsets[i], group.numels[i], updates[i] + 1) for i in positions],
        "lr": float(options["lr"]),
        "weight_decay": float(options["weight_decay"]),
        "divisor": -divisor if options["maximize"] else divisor,
    }
