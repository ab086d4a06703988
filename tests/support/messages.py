"""Random messages between stages, and what must arrive of them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from paci_rt.transport import Message


def message(seed: int) -> Message:
    """Random tensors: number, shapes, dtypes, absent ones and empty ones all follow from the seed."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor | None] = []
    for _ in range(rng.randint(1, 4)):
        shape = [rng.choice((1, 2, 3, 50)) for _ in range(rng.randint(0, 3))]
        kind = rng.choice(("none", "empty", "float32", "bfloat16", "int64", "bool", "large"))
        if kind == "none":
            tensors.append(None)
        elif kind == "empty":
            tensors.append(torch.empty(0, 3))
        elif kind == "large":
            tensors.append(torch.randn(rng.choice((2_000, 40_000, 300_000)), generator=generator))
        else:
            values = torch.randint(-9, 9, shape, generator=generator)
            tensors.append(values.to(getattr(torch, kind)))
    return Message(tuple(tensors), tuple(rng.random() < 0.5 for _ in tensors))


def check(arrived: Message, sent: Message) -> None:
    assert arrived.requires_grad == sent.requires_grad
    for ours, theirs in zip(arrived.tensors, sent.tensors, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
