"""Flat groups of random parameters, as the kernels see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.flat_toy import Flat, assert_bits


class Group:
    """Buffers of a step: fp32 state, sums, and low-precision weights where ``dtype`` asks for them."""

    def __init__(self, device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
        self.flat = Flat(lengths, device)
        self.master, self.grad_sum = self.flat.random(), self.flat.random(scale=3.0)
        self.exp_avg, self.exp_avg_sq = self.flat.random(scale=0.1), self.flat.random(scale=0.1).square()
        self.weight = None if dtype is torch.float32 else self.flat.poisoned(dtype)

    def buffers(self) -> dict[str, Any]:
        names = ("master", "weight", "grad_sum", "exp_avg", "exp_avg_sq")
        return {name: getattr(self, name) for name in names}

    def state_of(self, position: int) -> list[Tensor]:
        buffers = (self.master, self.exp_avg, self.exp_avg_sq)
        return [self.flat.parts(buffer)[position].cpu().clone() for buffer in buffers]

    def assert_state(self, position: int, state: list[Tensor]) -> None:
        for got, expected, what in zip(self.state_of(position), state, ("master", "mean", "square"), strict=True):
            assert_bits(got, expected, f"{what} of parameter {position}")
        if self.weight is not None:
            weight = self.flat.parts(self.weight)[position].cpu()
            assert_bits(weight, state[0].to(weight.dtype), f"weight of parameter {position}")

    def assert_padding(self) -> None:
        for name, buffer in self.buffers().items():
            if buffer is not None:
                rest = buffer.clone()
                for part in self.flat.parts(rest):
                    part.zero_()
                assert not rest.any(), f"padding of {name}"
