"""A decoder like Llama, cut into pipeline stages: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases.

Parameters carry the names of Hugging Face's ``LlamaForCausalLM`` in every stage: block 7 is ``model.layers.7`` wherever
it lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paci_rt.train.model import Blocks, ModelShape, rotary, rotated

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelShape):
    """Shape of one Llama.

    Attributes:
        kv_heads: heads of keys and values; ``heads`` is a multiple of it.
        ffn_width: width inside the MLP. rope_base: of the rotary positions. norm_eps: of RMSNorm.
    """

    family: ClassVar[str] = "llama"
    embedding: ClassVar[str] = EMBEDDING
    head: ClassVar[str] = LM_HEAD
    blocks: ClassVar[str] = "model.layers."

    kv_heads: int
    ffn_width: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("kv_heads", "ffn_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: {self.heads} heads are not a multiple of its kv_heads {self.kv_heads}")
        self.check_rotary()

    def make_stage(self, blocks: range, *, first: bool, last: bool) -> LlamaStage:
        return LlamaStage(self, blocks, first=first, last=last)

    def block_macs(self, seq_len: int) -> int:
        projections = 2 * self.width**2 + 2 * self.width * self.kv_heads * self.head_size
        return projections + 3 * self.width * self.ffn_width + 2 * seq_len * self.width

    def start_of(self, name: str) -> float:
        """N(0, 0.02), residual projections N(0, 0.02/√(2·layers)), norms 1."""
        if "norm" in name:
            return -1.0
        return 0.02 / math.sqrt(2 * self.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02


class RMSNorm(nn.Module):
    """Over the last dimension, in fp32; the weight multiplies what was rounded back."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size, self.shared = config.head_size, config.heads // config.kv_heads
        of_keys = config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, of_keys, bias=False)
        self.v_proj = nn.Linear(config.width, of_keys, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = (
            projection(x).view(batch, seq, -1, self.head_size).transpose(1, 2)  # [batch, heads, seq, head]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shared > 1)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class LlamaStage(nn.Module):
    """Consecutive blocks of one Llama; the first stage embeds, the last has the final norm and the head."""

    def __init__(self, config: LlamaConfig, blocks: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        parts: dict[str, nn.Module] = {}
        if first:
            parts["embed_tokens"] = nn.Embedding(config.vocab_size, config.width)
        parts["layers"] = Blocks({str(i): Block(config) for i in blocks})
        if last:
            parts["norm"] = RMSNorm(config.width, config.norm_eps)
        self.model = nn.ModuleDict(parts)
        if last and not (first and config.tied):
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Int64 tokens or hidden ``[batch, seq, width]`` in; hidden or logits ``[batch, seq, vocab]`` out."""
        if x.shape[1] > self.config.context:
            raise ValueError(
                f"a sequence of {x.shape[1]} tokens, but {self.config.name} has {self.config.context} positions"
            )
        if self.first:
            x = self.model["embed_tokens"](x)  # [batch, seq, width]
        cos, sin = rotary(x.shape[1], self.config.head_size, self.config.rope_base, x)  # [seq, head], both
        x = self.model["layers"](x, cos, sin)
        if self.last:
            x = self.model["norm"](x)
            x = F.linear(x, self.get_parameter(EMBEDDING)) if self.first and self.config.tied else self.lm_head(x)
        return x


MODELS: dict[str, LlamaConfig] = {
    config.name: config
    for config in (
        LlamaConfig(name="llama-tiny", vocab_size=256, context=256, layers=8, heads=4, kv_heads=2, width=128,
                    ffn_width=352, tied=False),
        LlamaConfig(name="llama-1b", vocab_size=32000, context=2048, layers=22, heads=32, kv_heads=4, width=2048,
                    ffn_width=5632, tied=False),
    )
}  # fmt: skip
"""``llama-1b`` has the shape of TinyLlama (arXiv 2401.02385)."""
