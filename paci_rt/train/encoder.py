"""An encoder that fills in masked tokens, cut into pipeline stages: ModernBERT with attention over the whole sequence.

Pre-LN blocks without biases, rotary positions, GeGLU (arXiv 2412.13663). Parameters carry the names of Hugging Face's
``ModernBertForMaskedLM`` in every stage.

The last token of the vocabulary is the mask, and no data may hold it. 15 % of each sequence are targets, as in BERT
(arXiv 1810.04805): of these 80 % are masked, 10 % changed at random and 10 % left. Every sequence has the same number
of them, so that the mean over a window is that of its micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paci_rt.train.model import Blocks, ModelShape, rotary, rotated

EMBEDDING = "model.embeddings.tok_embeddings.weight"
DECODER = "decoder.weight"
NO_TARGET = -100
"""Where there is nothing to predict; torch's cross entropy leaves it out."""
TARGET_SHARE = 0.15
MASKED, RANDOM = 0.8, 0.1
"""Shares of the targets."""
_DRAWS = 0x6D61736B
"""Tells the draws of masks from those of sequences."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelShape):
    """Shape of one encoder.

    Attributes:
        vocab_size: with the mask, its last token.
        ffn_width: width inside the MLP. rope_base: of the rotary positions. norm_eps: of LayerNorm.
    """

    family: ClassVar[str] = "encoder"
    embedding: ClassVar[str] = EMBEDDING
    head: ClassVar[str] = DECODER
    blocks: ClassVar[str] = "model.layers."
    generates: ClassVar[bool] = False

    ffn_width: int
    rope_base: float = 160000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_width < 1:
            raise ValueError(f"{self.name}: ffn_width must be at least 1, got {self.ffn_width}")
        if self.vocab_size < 2:
            raise ValueError(
                f"{self.name}: vocab_size {self.vocab_size} leaves no token beside the mask: give 2 or more"
            )
        self.check_rotary()

    @property
    def mask_token(self) -> int:
        return self.vocab_size - 1

    @property
    def data_vocab_size(self) -> int:
        return self.vocab_size - 1

    @property
    def head_macs(self) -> int:
        return self.width * (self.vocab_size + self.width)

    def make_stage(self, blocks: range, *, first: bool, last: bool) -> EncoderStage:
        return EncoderStage(self, blocks, first=first, last=last)

    def block_macs(self, seq_len: int) -> int:
        return 4 * self.width**2 + 3 * self.width * self.ffn_width + 2 * seq_len * self.width

    def start_of(self, name: str) -> float:
        """N(0, 0.02), residual projections N(0, 0.02/√(2·layers)), the bias of the head 0, norms 1."""
        if "norm" in name:
            return -1.0
        if name.endswith(".bias"):
            return 0.0
        return 0.02 / math.sqrt(2 * self.layers) if name.endswith("Wo.weight") else 0.02

    def examples(self, x: Tensor, y: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """``x`` with tokens masked, and as targets what stood there, :data:`NO_TARGET` elsewhere."""
        batch, seq = x.shape
        count = max(1, round(TARGET_SHARE * seq))
        # Philox is counter-based, and the seed sequence mixes any integers into its key.
        bits = np.random.Philox(np.random.SeedSequence([_DRAWS, *key]))
        raw = torch.from_numpy((bits.random_raw(batch * (seq + 2 * count)) >> np.uint64(1)).astype(np.int64))  # 63 bits
        order, kind, token = raw.split((batch * seq, batch * count, batch * count))
        at = order.view(batch, seq).argsort(dim=1, stable=True)[:, :count]  # [batch, count]: where
        share = kind.view(batch, count).double() / 2**63  # in [0, 1)
        was = x.gather(1, at)
        now = torch.where(share < MASKED, self.mask_token, was)
        other = token.view(batch, count).remainder(self.data_vocab_size)
        now = torch.where((share >= MASKED) & (share < MASKED + RANDOM), other, now)
        target = torch.full_like(x, NO_TARGET)
        return x.scatter(1, at, now), target.scatter(1, at, was)


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.Wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, width = x.shape
        parts = self.Wqkv(x).view(batch, seq, 3, -1, self.head_size).unbind(dim=2)  # 3 times [batch, seq, heads, head]
        q, k, v = (part.transpose(1, 2) for part in parts)
        q, k = (rotated(part.float(), cos, sin).to(part.dtype) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)  # [batch, heads, seq, head]
        return self.Wo(y.transpose(1, 2).reshape(batch, seq, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.Wi = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.Wo = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(F.gelu(value) * gate)  # type: ignore[no-any-return]


class Block(nn.Module):
    """The very first block has no norm before its attention: that after the embedding serves."""

    def __init__(self, config: EncoderConfig, *, very_first: bool) -> None:
        super().__init__()
        self.attn_norm = nn.Identity() if very_first else norm(config)
        self.attn = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)


class EncoderStage(nn.Module):
    """Consecutive blocks of one encoder; the first stage embeds, the last has the final norm and the head."""

    def __init__(self, config: EncoderConfig, blocks: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        parts: dict[str, nn.Module] = {}
        if first:
            embedding = nn.Embedding(config.vocab_size, config.width)
            parts["embeddings"] = nn.ModuleDict({"tok_embeddings": embedding, "norm": norm(config)})
        parts["layers"] = Blocks({str(i): Block(config, very_first=i == 0) for i in blocks})
        if last:
            parts["final_norm"] = norm(config)
        self.model = nn.ModuleDict(parts)
        if last:
            self.head = nn.ModuleDict(
                {"dense": nn.Linear(config.width, config.width, bias=False), "norm": norm(config)}
            )
            self.decoder = Decoder(config, owns=not (first and config.tied))

    def forward(self, x: Tensor) -> Tensor:
        """Int64 tokens or hidden ``[batch, seq, width]`` in; hidden or logits ``[batch, seq, vocab]`` out."""
        if x.shape[1] > self.config.context:
            raise ValueError(
                f"a sequence of {x.shape[1]} tokens, but {self.config.name} has {self.config.context} positions"
            )
        if self.first:
            embeddings = self.model["embeddings"]
            x = embeddings["norm"](embeddings["tok_embeddings"](x))  # type: ignore[index]
        cos, sin = rotary(x.shape[1], self.config.head_size, self.config.rope_base, x)  # [seq, head], both
        x = self.model["layers"](x, cos, sin)
        if self.last:
            x = self.head["norm"](F.gelu(self.head["dense"](self.model["final_norm"](x))))
            weight = self.get_parameter(EMBEDDING) if self.first and self.config.tied else self.decoder.weight
            x = F.linear(x, weight, self.decoder.bias)
        return x


class Decoder(nn.Module):
    """Weight and bias of the head; an uncut tied model reads the embedding's weight and has only the bias."""

    def __init__(self, config: EncoderConfig, *, owns: bool) -> None:
        super().__init__()
        if owns:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


MODELS: dict[str, EncoderConfig] = {
    config.name: config
    for config in (
        EncoderConfig(name="encoder-tiny", vocab_size=257, context=256, layers=8, heads=4, width=128, ffn_width=192,
                      tied=False),
        EncoderConfig(name="encoder-base", vocab_size=50258, context=1024, layers=22, heads=12, width=768,
                      ffn_width=1152, tied=True),
    )
}  # fmt: skip
"""``encoder-base`` has the blocks of ModernBERT-base, and GPT-2's tokens with a mask."""
