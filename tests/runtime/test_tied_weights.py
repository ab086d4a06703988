"""Weights that two stages share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import same
from support.pool import WorkerPool
from support.toy import loss_fn


class _Embedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.embedding.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)  # type: ignore[no-any-return]


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class _Unembedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.bias = nn.Parameter(torch.zeros(11))
        self.head.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.bias


def tied_weight() -> Tensor:
    return torch.randn(11, 8, generator=torch.Generator().manual_seed(9))


def tied_modules() -> list[nn.Module]:
    return [_Embedding(tied_weight()), _Body(), _Unembedding(tied_weight())]


TIE = paci_rt.TiedWeight(owner_stage=0, owner="embedding.weight", reader_stage=2, reader="head.weight")


def tied_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (12,), generator=generator), torch.randint(11, (12,), generator=generator)


def train_tied(pipe: Any, windows: int) -> dict[str, Tensor]:
    for step in range(windows):
        x, y = tied_batch(step)
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None)
    pipe.drain()
    return {name: p.detach().clone() for stage in pipe.stages for name, p in stage.named_parameters()}


def train_tied_rank(
    rank: int, group: Any, schedule: str, accumulation: int, windows: int, slack: Any = 0
) -> dict[str, Tensor]:
    stage = paci_rt.PipelineStage(tied_modules()[rank], rank, 3, "cpu", group=group)
    optimizer = paci_rt.AdamW(stage.parameters(), lr=1e-2)
    cls = paci_rt.get_schedule_class(schedule)
    pipe = cls(stage, accumulation, loss_fn, optimizer=optimizer, tied_weights=[TIE], slack=slack)
    return train_tied(pipe, windows)


TIED = [("1f1b", 3, 0), ("paci", 1, 0), ("paci", 3, 0), ("paci", 4, 0), ("paci", 3, (2, 1, 0)), ("paci", 1, (0, 1, 0))]


@pytest.mark.parametrize(("schedule", "accumulation", "slack"), [*TIED, ("paci-split", 2, (3, 1, 0))])
def test_weights_tied_across_stages(workers: WorkerPool, schedule: str, accumulation: int, slack: Any) -> None:
    windows = 6
    pipe = paci_rt.LocalPipeline(
        tied_modules(),
        schedule=schedule,
        n_microbatches=accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        tied_weights=[TIE],
        slack=slack,
    )
    local = train_tied(pipe, windows)
    assert torch.equal(local["embedding.weight"], local["head.weight"])  # after the drain the copies agree
    held = pipe.stats()["memory"]
    assert held[2]["weights"] >= 4 * (11 * 8 + 11) and held[2]["accumulators"] >= 4 * (11 * 8 + 11)
    assert held[2]["optimizer"] < 8 * 11 * 8  # the owner has the tied weight's moments
    ranks = workers.run(train_tied_rank, 3, schedule, accumulation, windows, slack)
    same({name: p for rank in ranks for name, p in rank.items()}, local)
    if schedule == "1f1b":
        same_as_one_shared_parameter(local, accumulation, windows)


def same_as_one_shared_parameter(tied: dict[str, Tensor], accumulation: int, windows: int) -> None:
    """A flush with exchange equals one shared parameter, up to the order in which two gradients are added."""
    embedding, body, head = tied_modules()
    head.head.weight = embedding.embedding.weight  # type: ignore[union-attr, assignment]
    model = nn.Sequential(embedding, body, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(windows):
        x, y = tied_batch(step)
        for x_part, y_part in zip(x.tensor_split(accumulation), y.tensor_split(accumulation), strict=True):
            (loss_fn(model(x_part), y_part) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = embedding.embedding.weight.detach()  # type: ignore[union-attr]
    # Six Adam steps on fp32 sums in another order; Adam divides by sqrt(v), which keeps relative rounding at its size.
    error = (tied["embedding.weight"] - reference).norm() / reference.norm()
    assert error < 1e-5


LOOPED_TIE = paci_rt.TiedWeight(owner_stage=0, owner="embedding.weight", reader_stage=3, reader="head.weight")


def looped_modules() -> list[nn.Module]:
    embedding, body, head = tied_modules()
    return [embedding, body, nn.Sequential(_Body()), head]


def train_looped_rank(rank: int, group: Any, schedule: str, accumulation: int) -> dict[str, Tensor]:
    modules, ranks = looped_modules(), group.size()
    stages = [paci_rt.PipelineStage(modules[at], at, 4, "cpu", group=group) for at in range(rank, 4, ranks)]
    optimizers = [paci_rt.AdamW(stage.parameters(), lr=1e-2) for stage in stages]
    cls = paci_rt.get_schedule_class(schedule)
    return train_tied(cls(stages, accumulation, loss_fn, optimizer=optimizers, tied_weights=[LOOPED_TIE]), 4)


@pytest.mark.parametrize("accumulation", [2, 4, 5])
@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "interleaved-zb", "looped-bfs"])
def test_weights_tied_between_several_stages_a_rank(workers: WorkerPool, schedule: str, accumulation: int) -> None:
    """On one rank, on two, and between them: the bits of 1F1B with a rank for each stage."""

    def trained(schedule: str, chunks: int) -> dict[str, Tensor]:
        pipe = paci_rt.LocalPipeline(
            looped_modules(), schedule=schedule, n_microbatches=accumulation, loss_fn=loss_fn, chunks=chunks,
            optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2), tied_weights=[LOOPED_TIE],
        )  # fmt: skip
        return train_tied(pipe, 4)

    expected = trained("1f1b", 1)
    assert torch.equal(expected["embedding.weight"], expected["head.weight"])
    same(trained(schedule, 4), expected)
    if accumulation % 2 == 0:
        same(trained(schedule, 2), expected)
        ranks = workers.run(train_looped_rank, 2, schedule, accumulation)
        same({name: p for rank in ranks for name, p in rank.items()}, expected)
