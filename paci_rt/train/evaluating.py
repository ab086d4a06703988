"""The loss of an uncut model over held-back text, as the trainer computes it stage by stage."""

from __future__ import annotations

import torch
from torch import nn

from paci_rt.train.config import TrainConfig
from paci_rt.train.data import Corpus
from paci_rt.train.model import HELD_BACK, cross_entropy


@torch.no_grad()
def mean_loss(module: nn.Module, config: TrainConfig, corpus: Corpus) -> tuple[float, int]:
    """Mean nats per token over the fixed held-back set, and how many tokens were predicted.

    Batches are cut as in training and means taken in the same order, so the number is that of the run's validation.
    """
    device = next(module.parameters()).device
    held_back = corpus.validation(config.eval_batches * config.batch_size, config.seq_len)  # int64 [sequences, seq]
    x, y = config.shape.examples(*held_back, HELD_BACK)
    means = []
    for inputs, targets in zip(torch.split(x, config.batch_size), torch.split(y, config.batch_size), strict=True):
        parts = zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True)  # [rows, seq]
        losses = [cross_entropy(module(one.to(device)), other.to(device)) for one, other in parts]
        means.append(torch.stack(losses).mean())
    return float(torch.stack(means).mean()), int((y >= 0).sum())
