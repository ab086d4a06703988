"""Bytes that forwards keep for their backwards, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.runtime.stage import PipelineStage


def test_saved_bytes_are_counted_by_hand() -> None:
    linear = nn.Linear(8, 4)
    stage = PipelineStage(nn.Sequential(linear, nn.Sigmoid()), 1, 3)
    x = torch.zeros(10, 8, requires_grad=True)
    stage.forward(0, (x,), {})
    # The linear layer keeps its input, 10 x 8, and not a copy of its weight; sigmoid keeps its output, 10 x 4.
    assert stage.kept_bytes(0)[0] == 4 * (10 * 8 + 10 * 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_of_a_batch_a_micro_batch_counts_its_own_share(recompute: bool) -> None:
    stage = PipelineStage(nn.Linear(8, 4), 0, 3)
    batch = torch.zeros(30, 8)
    stage.forward(0, (batch[:10],), {}, recompute=recompute)
    assert stage.kept_bytes(0) == (4 * 10 * 8, 4 * 10 * 8)


def test_of_a_batch_a_deferred_weight_gradient_counts_its_own_share() -> None:
    stages = [nn.Linear(8, 8), nn.Linear(8, 4)]
    pipe = paci_rt.LocalPipeline(stages, schedule="zb-h1", n_microbatches=2, loss_fn=nn.functional.mse_loss)
    seen = []
    stage = pipe.stages[0]
    whole = stage.pending_bytes
    stage.pending_bytes = lambda m: seen.append(whole(m)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    pipe.step(torch.zeros(60, 8), target=torch.zeros(60, 4))
    assert seen == [4 * (30 * 8 + 30 * 8)] * 2  # input and gradient of the output, 30 rows each


def test_saved_bytes_see_what_a_custom_function_saves() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            squared = x * x
            ctx.save_for_backward(squared)
            return squared * x

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return 3 * ctx.saved_tensors[0] * grad

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    stage = PipelineStage(Module(), 1, 3)
    stage.forward(0, (torch.zeros(6, requires_grad=True),), {})
    assert stage.kept_bytes(0)[0] == 4 * (6 + 6)  # its input, which every stage keeps, and the square
