"""Training without a pipeline, and what equal to the bit means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.toy import Run, batch, loss_fn, make_optimizer, module


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def plain_training(run: Run) -> dict[str, Any]:
    """No pipeline: micro-batch after micro-batch through the whole model, gradients in ``.grad``."""
    stages = [module(stage, run) for stage in range(run.stages)]
    model = nn.Sequential(*stages)
    optimizer = make_optimizer(run.optimizer, model.parameters())
    losses = []
    for step in range(run.windows):
        x, y = batch(run, step)
        for x_part, y_part in zip(x.tensor_split(run.accumulation), y.tensor_split(run.accumulation), strict=True):
            loss = loss_fn(model(x_part), y_part)
            loss.backward()
            losses.append(loss.item())
        for param in model.parameters():
            assert param.grad is not None
            param.grad.div_(run.accumulation)
        optimizer.step()
        optimizer.zero_grad()
    params = {f"{at}.{name}": p.detach() for at, stage in enumerate(stages) for name, p in stage.named_parameters()}
    return {"params": params, "losses": losses}
