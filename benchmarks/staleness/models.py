"""Models of other families than GPT, cut into stages: a Llama-like decoder, a BERT-like encoder and an MLP-Mixer.

Block 7 is ``transformer.h.7`` in whichever stage it lives, and every projection that ends in the residual stream is
called ``c_proj``, as in ``paci_rt.train.gpt``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paci_rt.train.gpt import MLP, GPTConfig
from staleness.draws import seeded

ROTARY_BASE = 10_000.0
LOGITS = "head.out.weight"  # in every model


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a model is made of.

    Attributes:
        embed, block, head: make its first module, one block of many, and its last module.
        by_fan_in: linear layers ahead of the logits start with a standard deviation of ``fan_in ** -0.5``, not 0.02.
            At widths of 64 that is six times as much, and models that need their blocks early, because what is next to
            a token says little by itself, leave their first plateau much sooner.
    """

    embed: Callable[[], nn.Module]
    block: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    by_fan_in: bool = False


class Stage(nn.Module):
    """Consecutive blocks of a model, with what comes before the first block and after the last."""

    def __init__(self, parts: Parts, blocks: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.embed = parts.embed() if first else nn.Identity()
        self.transformer = nn.ModuleDict({"h": nn.ModuleDict({str(i): parts.block() for i in blocks})})
        self.head = parts.head() if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, images or hidden ``[batch, tokens, width]`` in; hidden or logits out."""
        x = self.embed(x)
        for block in self.transformer["h"].values():  # type: ignore[operator]
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def even_partition(name: str, layers: int, num_stages: int) -> tuple[int, ...]:
    """Blocks per stage for a model whose head costs next to nothing; what does not divide goes to later stages.

    Raises:
        ValueError: fewer than one stage, or more stages than blocks.
    """
    if not 1 <= num_stages <= layers:
        raise ValueError(f"{name} has {layers} blocks and can be cut into 1 to {layers} stages, not into {num_stages}")
    each, extra = divmod(layers, num_stages)
    return (each,) * (num_stages - extra) + (each + 1,) * extra


def build_stages(parts: Parts, sizes: Sequence[int], seed: int) -> list[nn.Module]:
    """All stages, initialised on the CPU.

    Args:
        sizes: blocks of each stage.
        seed: with a parameter's name and the number of blocks, all that its initial value depends on.
    """
    modules: list[nn.Module] = []
    for at, size in enumerate(sizes):
        start = sum(sizes[:at])
        with torch.device("meta"):  # torch's own initialisation would draw from the global generator
            stage = Stage(parts, range(start, start + size), first=at == 0, last=at == len(sizes) - 1)
        stage.to_empty(device="cpu")
        _initialize(stage, sum(sizes), seed, by_fan_in=parts.by_fan_in)
        modules.append(stage)
    return modules


@torch.no_grad()
def _initialize(module: nn.Module, layers: int, seed: int, *, by_fan_in: bool) -> None:
    """GPT-2's start: N(0, 0.02), residual projections √(2·layers) times smaller, biases 0, weights of norms 1."""
    linear = {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            std = 0.02
            if by_fan_in and name in linear and name != LOGITS:
                std = parameter.shape[1] ** -0.5
            if name.endswith("c_proj.weight"):
                std /= math.sqrt(2 * layers)
            parameter.normal_(0.0, std, generator=seeded(seed, name))


# ---------------------------------------------------------------------------------------------------------- Llama


def llama(config: GPTConfig) -> Parts:
    """A decoder as Llama's (Touvron et al., arXiv 2302.13971), with one key and value head for two query heads."""
    return Parts(
        embed=lambda: nn.Embedding(config.vocab_size, config.width),
        block=lambda: LlamaBlock(config),
        head=lambda: LlamaHead(config),
    )


class LlamaBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.width, eps=1e-5)
        self.attn = RotaryAttention(config, kv_heads=max(1, config.heads // 2))
        self.norm_2 = nn.RMSNorm(config.width, eps=1e-5)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class RotaryAttention(nn.Module):
    """Causal attention with rotary positions and grouped queries, no biases."""

    def __init__(self, config: GPTConfig, *, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = config.heads, kv_heads, config.width // config.heads
        self.q = nn.Linear(config.width, self.heads * self.head, bias=False)
        self.k = nn.Linear(config.width, kv_heads * self.head, bias=False)
        self.v = nn.Linear(config.width, kv_heads * self.head, bias=False)
        self.c_proj = nn.Linear(self.heads * self.head, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (  # [batch, heads or kv_heads, seq, head]
            linear(x).view(batch, seq, -1, self.head).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(q), rotate(k)
        group = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))  # [batch, heads, seq, head]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): turn pairs of ``[..., seq, head]`` by their position.

    Pair j is elements j and j + head/2; at position t it turns by ``t · base^(-2j/head)``.
    """
    half = x.shape[-1] // 2
    cos, sin = _turns(x.shape[-2], half, x.device)
    a, b = x.float().split(half, dim=-1)  # low precision would round the angles' products
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@cache
def _turns(seq: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, ``[seq, half]``; making them again is an eighth of a small model's step."""
    speeds = ROTARY_BASE ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), speeds)
    return angles.cos(), angles.sin()


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer, arXiv 2002.05202); 8/3 of the width inside, up to the next multiple of 8."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inside = 8 * math.ceil(config.width / 3)
        self.gate = nn.Linear(config.width, inside, bias=False)
        self.up = nn.Linear(config.width, inside, bias=False)
        self.c_proj = nn.Linear(inside, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class LlamaHead(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.out = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------- BERT


def encoder(config: GPTConfig) -> Parts:
    """A bidirectional encoder as BERT's, with LayerNorm ahead of each half of a block, so that deep ones train."""
    return Parts(
        embed=lambda: EncoderEmbedding(config),
        block=lambda: EncoderBlock(config),
        head=lambda: EncoderHead(config),
        by_fan_in=True,
    )


class EncoderEmbedding(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)  # [seq]
        return self.tokens(tokens) + self.positions(at)  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_1 = nn.LayerNorm(config.width)
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        qkv = self.c_attn(self.norm_1(x)).view(batch, seq, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 times [batch, heads, seq, head]
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.c_proj(y.transpose(1, 2).reshape(batch, seq, width))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class EncoderHead(nn.Module):
    """BERT's: a layer of its own ahead of the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.transform = nn.Linear(config.width, config.width)
        self.norm_2 = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm_2(F.gelu(self.transform(self.norm_1(x)))))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- Mixer


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Shape of an MLP-Mixer.

    Attributes:
        size: height and width of an image, in pixels, a multiple of ``patch``.
        width: channels of a patch's vector, even.
    """

    size: int
    patch: int
    width: int
    classes: int

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.size // self.patch) ** 2


def mixer(config: MixerConfig) -> Parts:
    """An MLP-Mixer (Tolstikhin et al., arXiv 2105.01601) with the hidden sizes of its S models: half of the width
    across patches, four times the width across channels."""
    return Parts(
        embed=lambda: Patches(config),
        block=lambda: MixerBlock(config),
        head=lambda: MixerHead(config),
        by_fan_in=True,
    )


class Patches(nn.Module):
    """Grey images ``[batch, size, size]`` to ``[batch, patches, width]``."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.project = nn.Linear(config.patch**2, config.width)

    def forward(self, images: Tensor) -> Tensor:
        tiles = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        flat = tiles.reshape(images.shape[0], -1, self.patch**2)  # [batch, patches, patch * patch]
        return self.project(flat.to(self.project.weight.dtype))  # type: ignore[no-any-return]


class TwoLayers(nn.Module):
    def __init__(self, outside: int, inside: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(outside, inside)
        self.c_proj = nn.Linear(inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.patches = TwoLayers(config.patches, config.width // 2)
        self.norm_2 = nn.LayerNorm(config.width)
        self.channels = TwoLayers(config.width, 4 * config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm_1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm_2(x))  # type: ignore[no-any-return]


class MixerHead(nn.Module):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).mean(dim=1))  # type: ignore[no-any-return]
