"""Other answers to delay, from papers: optimizers for any schedule, and rules for the learning rates of stages.

They are plain torch optimizers, made to be compared with, not to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class RivalOptions:
    """What every rival is told.

    Attributes:
        weight_decay: decoupled, of parameters with two or more dimensions.
        betas: of the first and second moment.
        is_hidden_matrix: which parameters are matrices inside blocks, by name and parameter.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    is_hidden_matrix: Callable[[str, nn.Parameter], bool]


def param_groups(named: Named, options: RivalOptions) -> list[dict[str, Any]]:
    """Hidden matrices, other parameters with two or more dimensions, and the rest, which has no weight decay."""
    hidden = [param for name, param in named if options.is_hidden_matrix(name, param)]
    known = {id(param) for param in hidden}
    others = [param for _, param in named if id(param) not in known]
    groups = [
        {"params": hidden, "weight_decay": options.weight_decay, "hidden": True},
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": options.weight_decay, "hidden": False},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "hidden": False},
    ]
    return [group for group in groups if group["params"]]


def async_nadam(named: Named, options: RivalOptions) -> torch.optim.Optimizer:
    """Asynchronous Nesterov (Ajanthan et al., arXiv 2505.01099) as its authors run it.

    It is NAdam with a first moment of 0.99 in place of 0.9, which discounts the gradient's share of the look-ahead by
    ``1 - beta1``.
    """
    return torch.optim.NAdam(
        param_groups(named, options), lr=options.lr, betas=(0.99, options.betas[1]), decoupled_weight_decay=True
    )


class Steps(torch.optim.Optimizer):
    """An optimizer made of directions: ``w <- w (1 - lr decay) - lr u``, with ``u`` by :meth:`direction`."""

    def __init__(self, named: Named, options: RivalOptions, *, feed_back: bool = False) -> None:
        self._betas, self._feed_back = options.betas, feed_back
        super().__init__(param_groups(named, options), {"lr": options.lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state["step"] = state.get("step", 0) + 1
                update = self.direction(param, state, hidden=group["hidden"])
                if self._feed_back:
                    update, state["last"] = 2 * update - state.get("last", update), update
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def direction(self, param: Tensor, state: dict[str, Any], *, hidden: bool) -> Tensor:
        """The step of ``param`` for its ``grad``, at a learning rate of 1."""
        return adam(param.grad, state, self._betas)


def adam(grad: Tensor | None, state: dict[str, Any], betas: tuple[float, float], eps: float = 1e-8) -> Tensor:
    """Adam's direction for ``grad``; moments and step count are in ``state``."""
    assert grad is not None
    if "mean" not in state:
        state["mean"], state["square"] = torch.zeros_like(grad), torch.zeros_like(grad)
    state["mean"].lerp_(grad, 1 - betas[0])
    state["square"].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = (state["square"] / (1 - betas[1] ** state["step"])).sqrt_().add_(eps)
    return state["mean"] / (1 - betas[0] ** state["step"]) / root


class PlainMuon(Steps):
    """Muon (Jordan et al., 2024) for hidden matrices, Adam for the rest; steps have the size of AdamW's, by a factor
    of ``0.2 sqrt(max(rows, columns))`` (Liu et al., arXiv 2502.16982)."""

    def direction(self, param: Tensor, state: dict[str, Any], *, hidden: bool) -> Tensor:
        assert param.grad is not None
        if not hidden:
            return adam(param.grad, state, self._betas)
        buffer = state.setdefault("mean", torch.zeros_like(param))
        buffer.lerp_(param.grad, 0.05)
        return orthogonal(param.grad.lerp(buffer, 0.95)) * (0.2 * max(param.shape) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of ``matrix``, by the quintic Newton-Schulz iteration of Muon's authors."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class RotatedAdamW(Steps):
    """Basis rotation (Jung et al., arXiv 2602.03515): Adam for hidden matrices in a rotated basis.

    The basis is the eigenbasis of running averages of ``G G^T`` and ``G^T G``. A step of orthogonal iteration follows
    it every tenth update, as in SOAP (Vyas et al., arXiv 2409.11321). The second moment keeps the basis in which it
    was made; the first moment is rotated along.

    As in SOAP, the first gradient only makes the basis. In it that gradient is diagonal, so Adam would divide rounding
    errors by themselves everywhere else and take a step of random signs.
    """

    REFRESH, AVERAGE = 10, 0.95

    def direction(self, param: Tensor, state: dict[str, Any], *, hidden: bool) -> Tensor:
        grad = param.grad
        assert grad is not None
        if not hidden:
            return adam(grad, state, self._betas)
        if "left" not in state:
            state["left"], state["right"] = grad @ grad.T, grad.T @ grad
            state["turn_left"] = torch.linalg.eigh(state["left"]).eigenvectors
            state["turn_right"] = torch.linalg.eigh(state["right"]).eigenvectors
            state["step"] = 0
            return torch.zeros_like(grad)
        state["left"].lerp_(grad @ grad.T, 1 - self.AVERAGE)
        state["right"].lerp_(grad.T @ grad, 1 - self.AVERAGE)
        if state["step"] % self.REFRESH == 0:
            mean = state["turn_left"] @ state["mean"] @ state["turn_right"].T
            for side in ("left", "right"):
                state[f"turn_{side}"] = torch.linalg.qr(state[side] @ state[f"turn_{side}"]).Q
            state["mean"] = state["turn_left"].T @ mean @ state["turn_right"]
        turned = adam(state["turn_left"].T @ grad @ state["turn_right"], state, self._betas)
        return state["turn_left"] @ turned @ state["turn_right"].T


def error_feedback(optimizer: type[Steps]) -> Callable[[Named, RivalOptions], torch.optim.Optimizer]:
    """Error feedback for a delay of one update, after Zmushko et al., arXiv 2606.30634.

    This reading of its idea is ours: the last step stood in for the present one, so the difference of the two is added:
    ``u_t + (u_t - u_(t-1))``.
    """
    return lambda named, options: optimizer(named, options, feed_back=True)


RIVALS: dict[str, Callable[[Named, RivalOptions], torch.optim.Optimizer]] = {
    "async-nadam": async_nadam,
    "error-feedback-adamw": error_feedback(Steps),
    "error-feedback-muon": error_feedback(PlainMuon),
    "rotated-adamw": RotatedAdamW,
}


def pipemare_rate(delay: float, warmup_updates: int) -> Callable[[int], float]:
    """PipeMare's T1 (Yang et al., arXiv 1910.05124): the learning rate's factor ``delay ** -(1 - min(t / K, 1))``.

    Args:
        delay: of a stage, in updates; below 1 it counts as 1.
        warmup_updates: K, until when the factor has risen to 1.
    """
    slowest = max(1.0, delay)
    return lambda update: slowest ** -(1.0 - min(update / warmup_updates, 1.0))


def delay_scaled_rate(delay: float) -> Callable[[int], float]:
    """A constant factor ``1 / (1 + delay)``, with the delay in updates."""
    return lambda update: 1.0 / (1.0 + delay)
