"""Optimizer steps of a flat group by the Triton kernels, called with the arguments of the native core's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from paci_rt.kernels.adamw import adamw_ahead, adamw_step
from paci_rt.kernels.lion import lion_ahead, lion_step
from paci_rt.kernels.nadam import nadam_ahead, nadam_step
from paci_rt.kernels.rows import ScalarRows
from paci_rt.kernels.sgd import sgd_ahead, sgd_step

if TYPE_CHECKING:
    from paci_rt import native
    from paci_rt.optim.fused import FusedState


def adam(
    state: FusedState,
    grad_sum: Tensor,
    divisor: float,
    positions: list[int],
    ahead: native.Ahead | None,
    step_sizes: Sequence[tuple[float, float]] = (),
) -> None:
    """AdamW on the parameters at ``positions``, which ascend, or its look-ahead; with ``step_sizes`` NAdam. See
    :func:`paci_rt.native.adamw_step`."""
    options, scalars = state.param_group, _scalars(state, divisor, positions, ahead)
    scalars |= {"betas": _betas(options), "eps": float(options["eps"])}
    rows = _rows(state, ahead)
    if step_sizes:
        rows.set_nadam(**scalars, step_sizes=step_sizes)
        step: Any = nadam_step if ahead is None else nadam_ahead
    else:
        rows.set_adamw(**scalars)
        step = adamw_step if ahead is None else adamw_ahead
    _launch(step, state, rows, grad_sum, positions, ahead, state.flat)


def lion(state: FusedState, grad_sum: Tensor, divisor: float, positions: list[int], ahead: native.Ahead | None) -> None:
    """Lion likewise; see :func:`paci_rt.native.lion_step`."""
    rows = _rows(state, ahead)
    rows.set_lion(**_scalars(state, divisor, positions, ahead), betas=_betas(state.param_group))
    _launch(lion_step if ahead is None else lion_ahead, state, rows, grad_sum, positions, ahead, state.flat)


def sgd(state: FusedState, grad_sum: Tensor, divisor: float, positions: list[int], ahead: native.Ahead | None) -> None:
    """SGD likewise; see :func:`paci_rt.native.sgd_step`."""
    options, scalars = state.param_group, _scalars(state, divisor, positions, ahead)
    scalars |= {name: float(options[name]) for name in ("momentum", "dampening")}
    rows = _rows(state, ahead)
    rows.set_sgd(**scalars, nesterov=bool(options["nesterov"]))
    buffers = {"momentum_buffer": state.flat.get("momentum_buffer")}
    _launch(sgd_step if ahead is None else sgd_ahead, state, rows, grad_sum, positions, ahead, buffers)


def _betas(options: dict[str, Any]) -> tuple[float, float]:
    return float(options["betas"][0]), float(options["betas"][1])


def _scalars(state: FusedState, divisor: float, positions: Sequence[int], ahead: native.Ahead | None) -> dict[str, Any]:
    options, updates = state.param_group, state.updates()
    chosen = set(positions)
    known = None
    if ahead is not None:
        known = [False] * len(updates)
        for position, is_known in zip(positions, ahead.known, strict=True):
            known[position] = is_known
    return {
        "steps": [count + 1 if position in chosen else None for position, count in enumerate(updates)],
        "lr": float(options["lr"]),
        "weight_decay": float(options["weight_decay"]),
        "divisor": -divisor if options["maximize"] else divisor,
        "known": known,
    }


def _rows(state: FusedState, ahead: native.Ahead | None) -> ScalarRows:
    """Scalars in device memory: those of updates and of each depth of look-ahead apart, since they are read on streams
    of their own."""
    repeats = 0 if ahead is None else ahead.repeats
    rows = state.scalars.get(repeats)
    if rows is None:
        rows = state.scalars[repeats] = ScalarRows(state.group.layout, max(1, repeats))
    return rows


def _launch(
    step: Any,
    state: FusedState,
    rows: ScalarRows,
    grad_sum: Tensor,
    positions: Sequence[int],
    ahead: native.Ahead | None,
    buffers: dict[str, Any],
) -> None:
    group = state.group
    everywhere = len(positions) == len(group.params)
    step(
        group.layout,
        rows,
        master=group.weight if state.master is None else state.master,
        weight=None if state.master is None else group.weight,
        grad_sum=grad_sum,
        **buffers,
        **({} if ahead is None else {"kept": ahead.kept}),
        only=None if everywhere else positions,
    )
