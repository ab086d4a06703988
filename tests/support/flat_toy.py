"""Flat groups with awkward lengths for the kernel tests, and what they are compared by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paci_rt.kernels import FlatLayout

# One element, odd ones, exactly a block and a chunk, one more, nothing at all.
LENGTHS = (5, 1, 1024, 0, 4096, 4097, 1023, 2600, 16)
LARGE = (1 << 20, 3 * (1 << 20) + 17, 1, 1023, 50257 * 64, 768)


@dataclass
class Flat:
    """Segments of some lengths, each begun at a multiple of 32 elements as in a FlatGroup of bf16."""

    lengths: tuple[int, ...]
    device: str

    def __post_init__(self) -> None:
        self.segments, end = [], 0
        for length in self.lengths:
            self.segments.append((end, length))
            end += -(-length // 32) * 32
        self.numel = end
        self.layout = FlatLayout(self.segments, end, torch.device(self.device))

    def random(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Random parameters, padding zero."""
        flat = torch.zeros(self.numel, device=self.device)
        for part in self.parts(flat):
            part.copy_(torch.randn(part.numel(), device=self.device) * scale)
        return flat.to(dtype)

    def poisoned(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """NaN where parameters are, padding zero."""
        flat = torch.zeros(self.numel, dtype=dtype, device=self.device)
        for part in self.parts(flat):
            part.fill_(float("nan"))
        return flat

    def parts(self, flat: Tensor) -> list[Tensor]:
        return [flat[offset : offset + length] for offset, length in self.segments]

    def grads(self, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor | None]:
        return [(torch.randn(n, device=self.device) * scale).to(dtype) for n in self.lengths]


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, so that NaN equals NaN and 0 differs from -0."""
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def assert_bits(got: Tensor, expected: Tensor, what: str) -> None:
    different = (bits(got) != bits(expected)).nonzero().flatten()
    assert different.numel() == 0, (
        f"{what}: {different.numel()} of {got.numel()} differ, first at {int(different[0])}: "
        f"{got[different[0]].item()} instead of {expected[different[0]].item()}"
    )
