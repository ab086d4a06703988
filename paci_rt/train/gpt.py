"""GPT-2, exact, and cut into pipeline stages.

Pre-LN blocks, learned positions, tanh GELU, biases everywhere but in the head, LayerNorm epsilon 1e-5, causal
``scaled_dot_product_attention``, no dropout. Parameters carry nanoGPT's names and layout (``nn.Linear``: ``[out, in]``)
in every stage, and those names do not depend on the cut: block 7 is ``transformer.h.7`` wherever it lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paci_rt.train.model import (
    Blocks,
    ModelShape,
    build_stage,
    cross_entropy,
    default_partition,
    parameter_shapes,
    tied_weights,
)

__all__ = [
    "LM_HEAD",
    "MLP",
    "MODELS",
    "WTE",
    "Attention",
    "Block",
    "GPTConfig",
    "GPTStage",
    "build_stage",
    "cross_entropy",
    "default_partition",
    "parameter_shapes",
    "tied_weights",
]

WTE = "transformer.wte.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelShape):
    """Shape of one GPT-2; ``context`` is the number of learned positions."""

    family: ClassVar[str] = "gpt2"
    embedding: ClassVar[str] = WTE
    head: ClassVar[str] = LM_HEAD
    blocks: ClassVar[str] = "transformer.h."

    def make_stage(self, blocks: range, *, first: bool, last: bool) -> GPTStage:
        return GPTStage(self, blocks, first=first, last=last)

    def block_macs(self, seq_len: int) -> int:
        return 12 * self.width**2 + 2 * seq_len * self.width

    def start_of(self, name: str) -> float:
        """N(0, 0.02), residual projections N(0, 0.02/√(2·layers)), biases 0, LayerNorm weights 1."""
        if name.endswith(".bias"):
            return 0.0
        if ".ln_" in name:
            return -1.0
        return 0.02 / math.sqrt(2 * self.layers) if name.endswith("c_proj.weight") else 0.02


def _byte_model(name: str, layers: int, heads: int, width: int) -> GPTConfig:
    return GPTConfig(name=name, vocab_size=256, context=256, layers=layers, heads=heads, width=width, tied=False)


def _gpt2(name: str, layers: int, heads: int, width: int) -> GPTConfig:
    return GPTConfig(name=name, vocab_size=50257, context=1024, layers=layers, heads=heads, width=width, tied=True)


MODELS: dict[str, GPTConfig] = {
    config.name: config
    for config in (
        _byte_model("gpt-tiny", 8, 4, 128),
        _byte_model("gpt-mini", 12, 6, 384),
        _gpt2("gpt2", 12, 12, 768),
        _gpt2("gpt2-medium", 24, 16, 1024),
        _gpt2("gpt2-large", 36, 20, 1280),
        _gpt2("gpt2-xl", 48, 25, 1600),
    )
}


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)  # 3 times [batch, seq, width]
        q, k, v = (t.view(batch, seq, self.heads, -1).transpose(1, 2) for t in (q, k, v))  # [batch, heads, seq, head]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, seq, head]
        return self.c_proj(y.transpose(1, 2).reshape(batch, seq, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPTStage(nn.Module):
    """Consecutive blocks of one GPT; the first stage embeds, the last has the final LayerNorm and the head.

    The whole model is the case of one stage. Parameters are left uninitialised: see :func:`build_stage`.
    """

    def __init__(self, config: GPTConfig, blocks: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        parts: dict[str, nn.Module] = {}
        if first:
            parts["wte"] = nn.Embedding(config.vocab_size, config.width)
            parts["wpe"] = nn.Embedding(config.context, config.width)
        parts["h"] = Blocks({str(i): Block(config) for i in blocks})
        if last:
            parts["ln_f"] = nn.LayerNorm(config.width, eps=1e-5)
        self.transformer = nn.ModuleDict(parts)
        if last and not (first and config.tied):  # an uncut tied model reads wte itself and has no head of its own
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Int64 tokens or hidden ``[batch, seq, width]`` in; hidden or logits ``[batch, seq, vocab]`` out."""
        if self.first:
            if x.shape[1] > self.config.context:
                raise ValueError(
                    f"a sequence of {x.shape[1]} tokens, but {self.config.name} has {self.config.context} positions"
                )
            positions = torch.arange(x.shape[1], device=x.device)  # [seq]
            x = self.transformer["wte"](x) + self.transformer["wpe"](positions)  # [batch, seq, width]
        x = self.transformer["h"](x)
        if self.last:
            x = self.transformer["ln_f"](x)
            x = F.linear(x, self.get_parameter(WTE)) if self.first and self.config.tied else self.lm_head(x)
        return x
