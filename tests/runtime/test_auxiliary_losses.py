"""Auxiliary losses of a user's own: they travel beside the activations, and the last stage's loss adds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt


class Experts(nn.Module):
    """Two experts, a router, and a loss that wants both to be used alike; takes and gives ``(x, sum of losses)``."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2) if last else None

    def forward(self, x: Tensor, auxiliary: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shares = self.router(x).softmax(-1)
        own = (shares.mean(0) ** 2).sum()
        total = own[None] if auxiliary is None else auxiliary + own
        x = sum(share[:, None] * expert(x) for share, expert in zip(shares.unbind(-1), self.experts, strict=True))
        return (x if self.head is None else self.head(x)), total


def stages() -> list[Experts]:
    torch.manual_seed(0)
    return [Experts(), Experts(), Experts(last=True)]


def loss_fn(output: Any, target: Tensor) -> Tensor:
    y, auxiliary = output
    return nn.functional.mse_loss(y, target) + 0.3 * auxiliary.sum()


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return x, x[:, :2] ** 2


def pipe_of(schedule: str) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        stages(),
        schedule=schedule,
        n_microbatches=4,
        loss_fn=loss_fn,
        optimizer=lambda named: torch.optim.SGD([param for _, param in named], lr=0.1),
    )


def plain(coefficient: bool = True) -> list[Tensor]:
    modules = nn.ModuleList(stages())
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x, y = batch(step)
        for part, target in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            value: Any = (part,)
            for one in modules:
                value = one(*value)
            (loss_fn(value, target) if coefficient else nn.functional.mse_loss(value[0], target)).backward()
        for param in modules.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad / 4
        optimizer.step()
    return [param.detach() for param in modules.parameters()]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-2p"])
def test_they_are_summed_over_stages_as_in_the_uncut_model(schedule: str) -> None:
    pipe = pipe_of(schedule)
    for step in range(3):
        x, y = batch(step)
        pipe.step(x, target=y, return_outputs=False)
    found = [param.detach() for stage in pipe.stages for param in stage.parameters()]
    for ours, theirs in zip(found, plain(), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()  # a router's gradient comes in two parts
    without = plain(coefficient=False)
    assert any((ours - other).norm() > 1e-4 * other.norm() for ours, other in zip(found, without, strict=True))


def test_under_paci_they_mean_the_same() -> None:
    """The same sum at the weights that the forward saw: one stage is never late, and is plain training."""
    torch.manual_seed(0)
    model = Experts(last=True)
    pipe = paci_rt.LocalPipeline(
        [model],
        schedule="paci",
        n_microbatches=4,
        loss_fn=loss_fn,
        optimizer=lambda named: paci_rt.SGD([param for _, param in named], lr=0.1, momentum=0.9),
    )
    torch.manual_seed(0)
    twin = paci_rt.LocalPipeline(
        [Experts(last=True)],
        schedule="gpipe",
        n_microbatches=4,
        loss_fn=loss_fn,
        optimizer=lambda named: paci_rt.SGD([param for _, param in named], lr=0.1, momentum=0.9),
    )
    cut = pipe_of("paci")
    seen: list[list[Tensor]] = []
    for step in range(3):
        x, y = batch(step)
        losses: list[Tensor] = []
        for one in (pipe, twin):
            one.step(x, target=y)
        cut.step(x, target=y, losses=losses)
        seen.append(losses)
    for one in (pipe, twin, cut):
        one.drain()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.stages[0].parameters(), strict=True))
    assert all(float(loss) > 0.3 * 3 * 0.5 - 1e-6 for losses in seen for loss in losses)  # all three are in each
