"""A small model with all that a cut can get wrong, and ways to cut it: by its own modules, or by copies of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WIDTH, WORDS, POSITIONS, LAYERS = 12, 17, 9, 4


class Block(nn.Module):
    """Norm, a causal mixing of positions scaled by a buffer, dropout, a residual."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(drop)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(x) * self.scale
        y = y.cumsum(1) if mask is None else (y * mask.unsqueeze(-1)).cumsum(1)
        return x + self.drop(torch.tanh(self.mix(y)))


class Model(nn.Module):
    """Token and position embedding, blocks, a final norm, a head that may be tied to the embedding."""

    def __init__(self, drop: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList([Block(drop) for _ in range(LAYERS)])
        self.final_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]) if position_ids is None else position_ids)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(self.final_norm(x))


class Stage(nn.Module):
    """One stage of a cut of :class:`Model`; ``between`` is put between its blocks, to make mistakes with."""

    def __init__(
        self,
        model: Model,
        blocks: Sequence[int],
        *,
        first: bool = False,
        last: bool = False,
        between: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.first, self.last, self.between = first, last, between
        self.layers = nn.ModuleList([model.blocks[at] for at in blocks])
        if first:
            self.wte, self.wpe = model.wte, model.wpe
        if last:
            self.norm, self.head = model.final_norm, model.head

    def forward(self, ids: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = ids
        if self.first:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1]) if position_ids is None else position_ids)
        for layer in self.layers:
            x = layer(self.between(x), mask=mask)
        return self.head(self.norm(x)) if self.last else x


def cut(model: Model, *, copies: bool) -> list[Stage]:
    """A right cut into three stages."""
    source = copy.deepcopy(model) if copies else model
    return [
        Stage(source, [0, 1], first=True),
        Stage(source, [2]),
        Stage(source, [3], last=True),
    ]


def batch() -> dict[str, Tensor]:
    """Two sequences whose positions are not the default ones, and of which one is padded."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    return {
        "ids": torch.randint(WORDS, (2, 6), generator=generator),
        "position_ids": torch.tensor([[3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5]]),
        "mask": mask,
    }


def target() -> Tensor:
    return torch.randint(WORDS, (2, 6), generator=torch.Generator().manual_seed(4))


def loss_fn(output: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), wanted.flatten())
