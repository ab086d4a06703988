"""Ties between stages, and views of parameters, found when the schedule is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.transport import LocalTransport
from support.changing import adamw, loss_fn

WIDTH = 4


def make(stages: list[nn.Module], **options: Any) -> paci_rt.LocalPipeline:
    options = {"schedule": "1f1b", "n_microbatches": 2, "loss_fn": loss_fn, "optimizer": adamw, **options}
    return paci_rt.LocalPipeline(stages, **options)


def one_parameter() -> list[nn.Module]:
    embedding, head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
    head.weight = embedding.weight
    return [embedding, nn.Sequential(head)]


def one_memory() -> list[nn.Module]:
    embedding, head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
    head.weight = nn.Parameter(embedding.weight.data)
    return [embedding, nn.Sequential(head)]


def one_layer() -> list[nn.Module]:
    shared = nn.Linear(WIDTH, WIDTH)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), shared), nn.Sequential(shared, nn.Tanh())]


def transposed() -> list[nn.Module]:
    first, last = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    last.weight = nn.Parameter(first.weight.data.t())
    return [first, last]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            one_parameter,
            r"parameter 'weight' of stage 0 and parameter '0\.weight' of stage 1 are one and the same nn\.Parameter: "
            r".*tied_weights=\[paci_rt\.TiedWeight\(owner_stage=0, owner='weight', reader_stage=1, reader='0\.weight'",
        ),
        (one_memory, r"parameter 'weight' of stage 0 and parameter '0\.weight' of stage 1 share memory: .*TiedWeight"),
        (one_layer, r"parameter '1\.weight' of stage 0 and parameter '0\.weight' of stage 1 are one and the same"),
        (transposed, r"parameter 'weight' of stage 0 and parameter 'weight' of stage 1 share memory"),
    ],
)
def test_a_tie_between_stages_is_named_with_the_remedy(stages: Callable[[], list[nn.Module]], message: str) -> None:
    with pytest.raises(paci_rt.StageError, match=message):
        make(stages())


def test_two_stages_of_one_rank_of_several() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    modules = [nn.Sequential(shared), nn.Sequential(nn.Linear(WIDTH, WIDTH), shared)]
    stages = [paci_rt.PipelineStage(module, at, 4) for module, at in zip(modules, (1, 3), strict=True)]
    with pytest.raises(
        paci_rt.StageError, match=r"'0\.weight' of stage 1 and parameter '1\.weight' of stage 3 are one"
    ):
        paci_rt.ScheduleInterleaved1F1B(stages, 2, loss_fn, transport=LocalTransport())
    stages = [paci_rt.PipelineStage(module, at, 4) for module, at in zip(modules, (0, 2), strict=True)]
    with pytest.raises(paci_rt.StageError, match=r"keep both uses on one stage, since only the last stage \(3\)"):
        paci_rt.ScheduleInterleaved1F1B(stages, 2, loss_fn, transport=LocalTransport())


def test_the_remedy_works_and_equals_the_uncut_model() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    weight = nn.Parameter(embedding.weight.detach().clone())
    tie = paci_rt.TiedWeight(owner_stage=0, owner="weight", reader_stage=1, reader="weight")

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    pipe = make([embedding, head], optimizer=sgd, tied_weights=[tie], loss_fn=nn.functional.cross_entropy)
    plain = sgd([weight])
    for _ in range(3):
        x = torch.randint(WIDTH, (4,))
        pipe.step(x, target=x.flip(0))
        for part, target in zip(x.tensor_split(2), x.flip(0).tensor_split(2), strict=True):
            output = nn.functional.linear(nn.functional.embedding(part, weight), weight)
            (nn.functional.cross_entropy(output, target) / 2).backward()
        plain.step()
        plain.zero_grad()
    pipe.drain()
    # The two uses are summed in another order: a few units in the last place of fp32.
    assert float((embedding.weight - weight).norm() / weight.norm()) < 1e-6
    assert torch.equal(embedding.weight, head.weight)


def test_a_declared_tie_may_begin_in_one_memory() -> None:
    tie = paci_rt.TiedWeight(owner_stage=0, owner="weight", reader_stage=1, reader="0.weight")
    stages = one_memory()
    pipe = make(stages, tied_weights=[tie], loss_fn=nn.functional.cross_entropy)
    pipe.step(torch.arange(4), target=torch.arange(4))
    pipe.drain()
    assert torch.equal(stages[0].weight, stages[1][0].weight)  # type: ignore[index,arg-type]


def test_what_is_no_tie_is_left_alone() -> None:
    """Frozen in both places; a layer used twice by one stage; and the neighbours of an earlier flat buffer."""
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    twice = nn.Linear(WIDTH, WIDTH)
    stages = [nn.Sequential(frozen, twice, twice), nn.Sequential(frozen, nn.Linear(WIDTH, WIDTH))]
    for _ in range(2):
        pipe = make(stages)
        pipe.step(torch.randn(4, WIDTH), target=torch.randn(4, WIDTH))
        pipe.close()
    whole = torch.randn(WIDTH, 2 * WIDTH)
    left, right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    left.weight, right.weight = nn.Parameter(whole[:, :WIDTH]), nn.Parameter(whole[:, WIDTH:])  # columns of a matrix
    make([left, right])


# --- inside one stage ---


class Views(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        if kind == "parameter":
            self.part = nn.Parameter(self.weight.data[:2])
        elif kind == "buffer":
            self.register_buffer("part", self.weight.data.t())
        else:
            self.part = self.weight.data.view(-1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_view_that_would_go_stale_is_named(kind: str) -> None:
    """The flat buffer would part it from its parameter."""
    match = rf"(parameter 'weight' of stage 0 and {kind} 'part'|{kind} 'part' of stage 0 and parameter 'weight').*clone"
    with pytest.raises(paci_rt.StageError, match=match):
        make([Views(kind), nn.Linear(WIDTH, WIDTH)])


def test_a_tie_that_is_made_later_is_found_at_the_next_step() -> None:
    stages: list[Any] = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    pipe = make(stages, optimizer=None)
    stages[1].weight = stages[0].weight
    with pytest.raises(paci_rt.StageError, match=r"are one and the same nn\.Parameter"):
        pipe.step(torch.randn(4, WIDTH), target=torch.randn(4, WIDTH))
