"""Muon: orthogonalised momentum for hidden matrices, AdamW for everything else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from paci_rt.optim.adam import ADAM_BUFFERS, adam_step
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.fused import FusedOptimizer, FusedState, check_option
from paci_rt.optim.steps_native import Ahead, FlatStep

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic of Muon's authors, steep at zero: five steps bring all that is above 0.01 to between 0.68 and 1.14."""

_BUFFER = "momentum_buffer"


class Muon(FusedOptimizer):
    """Muon (Jordan et al., 2024) for 2-D hidden matrices, AdamW for embeddings, heads, biases and norms.

    Every parameter group says which it is: ``{"params": [...], "use_muon": True}``. A matrix moves along its momentum
    made nearly orthogonal by a few Newton-Schulz steps, times ``0.2 * sqrt(max(rows, columns))``: then the root of the
    mean square of its step is about AdamW's, and one learning rate and weight decay suit both kinds of groups (Liu et
    al., arXiv 2502.16982). That is ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, whose state it can load, with
    the iteration in fp32 in place of bf16.

    Matrix products go through torch, so the bits of ``use_muon`` groups, unlike those of the native passes, are
    torch's for this CPU and number of threads, as those of the gradients are.

    Args:
        params: parameter groups, each with ``use_muon``.
        lr, weight_decay: of all groups; decay is decoupled.
        betas, eps: of AdamW.
        momentum: share of the momentum that stays; the gradient joins by the rest.
        nesterov: orthogonalise the mean of gradient and momentum, in place of the momentum.
        ns_steps: Newton-Schulz steps. ns_coefficients: of ``x``, ``x^3`` and ``x^5`` in them. ns_eps: the least norm
            that a matrix is divided by.
        maximize: go uphill.

    Raises:
        ValueError: a value is out of range, a group does not say which it is, or one with ``use_muon`` has a parameter
            that is no matrix.

    Example:
        >>> def muon(params):  # the parameters of one stage, with their names
        ...     hidden = [p for name, p in params if name.startswith("blocks.") and p.dim() == 2]
        ...     others = [p for name, p in params if not (name.startswith("blocks.") and p.dim() == 2)]
        ...     return paci_rt.Muon(
        ...         [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}], lr=1e-3
        ...     )
        >>> model = nn.Sequential()
        >>> model.add_module("blocks", nn.Linear(4, 4))
        >>> model.add_module("head", nn.Linear(4, 2))
        >>> pipeline = paci_rt.LocalPipeline([model], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=muon)
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> pipeline.drain()
        >>> state = pipeline.state_dict()["optimizer"]
        >>> sorted(state["blocks.weight"]), sorted(state["head.weight"])
        (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])
    """

    shardable = False  # orthogonalising takes whole matrices
    masks = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        ns_eps: float = 1e-7,
        maximize: bool = False,
    ) -> None:
        check_option(0 <= momentum < 1, f"momentum={momentum}: must lie in [0, 1)")
        check_option(1 <= ns_steps < 100, f"ns_steps={ns_steps}: give a number of steps from 1 to 99, such as 5")
        check_option(len(ns_coefficients) == 3, f"ns_coefficients={ns_coefficients}: give three numbers")
        check_option(all(map(math.isfinite, ns_coefficients)), f"ns_coefficients={ns_coefficients}: must be finite")
        check_option(0 < ns_eps < math.inf, f"ns_eps={ns_eps}: must be finite and positive")
        defaults = {
            "lr": lr,
            "betas": betas,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "eps": eps,
            "weight_decay": weight_decay,
            "ns_coefficients": ns_coefficients,
            "ns_eps": ns_eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, for a group with ``use_muon``.

        Raises:
            ValueError: it does not say whether, or has a parameter that is no matrix.
        """
        number = len(self.param_groups)
        if not isinstance(param_group.get("use_muon"), bool):
            raise ValueError(
                f"parameter group {number} of Muon does not say which it is: give it use_muon=True for 2-D hidden "
                "matrices, which are orthogonalised, and use_muon=False for all others, which AdamW updates"
            )
        super().add_param_group(param_group)
        if param_group["use_muon"]:
            for position, param in enumerate(self.param_groups[-1]["params"]):
                if param.dim() != 2:
                    self.param_groups.pop()
                    raise ValueError(
                        f"parameter {position} of group {number} has shape {tuple(param.shape)}, and Muon "
                        "orthogonalises 2-D matrices only: move it to a group with use_muon=False"
                    )

    def make_state(self, param_group: dict[str, Any], group: FlatGroup) -> FusedState:
        """A momentum buffer, or AdamW's state."""
        if param_group["use_muon"]:
            return FusedState(self, param_group, group, (_BUFFER,))
        return FusedState(self, param_group, group, ADAM_BUFFERS, {"step": 0.0})

    def merge_options(self, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """As for all; a group stays of its kind, and torch's Muon has its ``ns_eps`` as ``eps``.

        Raises:
            ValueError: steps of another size, or a group of the other kind.
        """
        if "use_muon" not in saved and own["use_muon"]:
            if saved.get("adjust_lr_fn") != "match_rms_adamw":
                raise ValueError(
                    "this is a state of torch.optim.Muon with steps of another size: paci_rt.Muon has those of "
                    "adjust_lr_fn='match_rms_adamw'; set that in the state's parameter groups, and lr to fit"
                )
            saved = {**saved, "ns_eps": saved["eps"], "eps": own["eps"]}
        if saved.get("use_muon", own["use_muon"]) != own["use_muon"]:
            raise ValueError(
                f"use_muon is {saved['use_muon']} in the state of a parameter group of Muon and {own['use_muon']} in "
                "the optimizer: construct it with the groups that were saved"
            )
        return super().merge_options(own, saved)

    def run(self, state: FusedState, positions: list[int], step: FlatStep) -> None:
        """AdamW's native pass, or matrix by matrix. Looking ahead, the gradient under which the momentum would stay
        what it is, the momentum itself, stands in for unknown ones."""
        if _BUFFER not in state.flat:
            adam_step(state, step)
            return
        ahead = step.get("ahead")
        for index, position in enumerate(positions):
            grad: Tensor | None = None
            if ahead is None or ahead.known[index]:
                grad = state.group.view(step["grad_sum"], position) / step["divisor"]
            if ahead is not None:
                _look_ahead(state, position, grad, ahead)
            elif grad is not None:
                _update(state, position, grad)


# All writes below go to views of the flat buffers: the version counters of the parameters stand still.


@torch.no_grad()
def _update(state: FusedState, position: int, grad: Tensor) -> None:
    group = state.group
    weight = group.view(group.weight if state.master is None else state.master, position)
    muon_step(weight, group.view(state.flat[_BUFFER], position), grad, state.param_group)
    if state.master is not None:
        group.view(group.weight, position).copy_(weight)


@torch.no_grad()
def _look_ahead(state: FusedState, position: int, grad: Tensor | None, ahead: Ahead) -> None:
    group = state.group
    now = group.view(group.weight if state.master is None else state.master, position)
    weight, buffer = now.clone(), group.view(state.flat[_BUFFER], position).clone()
    stand_in = buffer.clone() if grad is None else grad
    for _ in range(ahead.repeats):
        muon_step(weight, buffer, stand_in, state.param_group)
    if ahead.kept is not None:
        group.view(ahead.kept, position).copy_(now)
    group.view(group.weight, position).copy_(weight)


def muon_step(weight: Tensor, buffer: Tensor, grad: Tensor, options: dict[str, Any]) -> None:
    """One step of ``weight`` and its momentum ``buffer``, both fp32 ``[rows, columns]`` and changed in place.

    Args:
        grad: mean gradient, fp32 ``[rows, columns]``.
        options: a parameter group's.
    """
    lr, momentum = float(options["lr"]), float(options["momentum"])
    buffer.lerp_(grad, 1 - momentum)
    direction = grad.lerp(buffer, momentum) if options["nesterov"] else buffer
    direction = orthogonalized(direction, options["ns_steps"], options["ns_coefficients"], options["ns_eps"])
    size = 0.2 * max(weight.shape) ** 0.5
    weight.mul_(1 - lr * float(options["weight_decay"])).add_(direction, alpha=-lr * size)


def orthogonalized(
    matrix: Tensor, steps: int, coefficients: tuple[float, float, float] = NS_COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """A matrix with about the singular vectors of ``matrix`` and all singular values near 1, ``[rows, columns]``.

    Each step maps the singular values by ``a s + b s^3 + c s^5``; those begin at 1 or less, since the matrix is divided
    by its Frobenius norm, or by ``eps`` if that is larger.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # then its Gram matrix is the smaller one
    x: Tensor = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
