"""GPT-2, exact, and cut into pipeline stages.

Pre-LN blocks, learned positions, tanh GELU, biases everywhere but in the head, LayerNorm epsilon 1e-5, causal
``scaled_dot_product_attention``, no dropout. Parameters carry nanoGPT's names and layout (``nn.Linear``: ``[out, in]``)
in every stage, and those names do not depend on the cut: block 7 is ``transformer.h.7`` wherever it lives.

Every weight is drawn from a generator seeded with (seed, its name). The same seed therefore gives the same model
for any number of stages, in any process, without anybody sending weights around.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from paci_rt import TiedWeight

WTE = "transformer.wte.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of one model.

    Attributes:
        vocab_size: number of tokens. ``context``: longest sequence, the number of learned positions.
        layers: transformer blocks. ``heads``: attention heads; ``width`` is a multiple of it.
        width: size of the residual stream.
        tied: the head uses the token embedding's weight, as GPT-2 does.
    """

    name: str
    vocab_size: int
    context: int
    layers: int
    heads: int
    width: int
    tied: bool

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context", "layers", "heads", "width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")
        if self.width % self.heads:
            raise ValueError(f"{self.name}: width {self.width} is not a multiple of its {self.heads} heads")


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
        parts["h"] = nn.ModuleDict({str(i): Block(config) for i in blocks})
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
        for block in self.transformer["h"].values():  # type: ignore[operator]
            x = block(x)
        if self.last:
            x = self.transformer["ln_f"](x)
            x = F.linear(x, self.get_parameter(WTE)) if self.first and self.config.tied else self.lm_head(x)
        return x


def default_partition(config: GPTConfig, num_stages: int, *, seq_len: int | None = None) -> tuple[int, ...]:
    """Blocks per stage, so that the most expensive stage is as cheap as possible.

    Cost is multiply-adds of a token's forward: ``12·width² + 2·seq·width`` a block, ``width·vocab`` the head (a
    backward costs twice that everywhere). The last stage pays for the head in blocks; what does not divide goes to
    later stages, because earlier ones hold more micro-batches in flight.

    Raises:
        ValueError: fewer than one stage, or more stages than blocks.
    """
    if num_stages < 1:
        raise ValueError(f"at least one stage is needed, got {num_stages}")
    if num_stages > config.layers:
        raise ValueError(
            f"{num_stages} stages, but {config.name} has only {config.layers} blocks; "
            f"ask for at most {config.layers} stages"
        )
    if num_stages == 1:
        return (config.layers,)
    block = 12 * config.width**2 + 2 * (seq_len or config.context) * config.width
    head = config.width * config.vocab_size
    others = num_stages - 1

    def largest_cost(last: int) -> int:
        return max(block * math.ceil((config.layers - last) / others), block * last + head)

    last = min(range(config.layers - others, 0, -1), key=largest_cost)  # of equal ones that with most on the last stage
    each, extra = divmod(config.layers - last, others)
    return (each,) * (others - extra) + (each + 1,) * extra + (last,)


def build_stage(
    config: GPTConfig,
    stage_index: int,
    num_stages: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    partition: Sequence[int] | None = None,
) -> GPTStage:
    """Build and initialise one stage of the model on the CPU.

    Args:
        seed: with a parameter's name, all that its initial value depends on.
        dtype: of all parameters; values are drawn in fp32 and rounded.
        partition: blocks of each stage, at least one each; default :func:`default_partition`.

    Raises:
        ValueError: more stages than blocks, or a partition that does not add up.
    """
    sizes = tuple(partition) if partition is not None else default_partition(config, num_stages)
    if len(sizes) != num_stages or sum(sizes) != config.layers or min(sizes) < 1:
        raise ValueError(
            f"partition {list(sizes)} must give each of {num_stages} stages at least one of "
            f"{config.name}'s {config.layers} blocks, and all of them"
        )
    if not 0 <= stage_index < num_stages:
        raise ValueError(f"stage {stage_index} of {num_stages} does not exist")
    start = sum(sizes[:stage_index])
    with torch.device("meta"):  # torch's own initialisation would cost time and draw from the global generator
        module = GPTStage(
            config,
            range(start, start + sizes[stage_index]),
            first=stage_index == 0,
            last=stage_index == num_stages - 1,
        )
    module.to(dtype).to_empty(device="cpu")
    _initialize(module, seed)
    return module


@torch.no_grad()
def _initialize(module: GPTStage, seed: int) -> None:
    """GPT-2's start: N(0, 0.02), residual projections N(0, 0.02/√(2·layers)), biases 0, LayerNorm weights 1."""
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif ".ln_" in name:
            parameter.fill_(1.0)
        else:
            std = 0.02 / math.sqrt(2 * module.config.layers) if name.endswith("c_proj.weight") else 0.02
            source = WTE if name == LM_HEAD and module.config.tied else name
            digest = hashlib.sha256(f"{seed}/{source}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the uncut model, in the order of its ``named_parameters()``."""
    with torch.device("meta"):
        module = GPTStage(config, range(config.layers), first=True, last=True)
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def tied_weights(config: GPTConfig, num_stages: int) -> tuple[TiedWeight, ...]:
    """What a schedule must keep equal: head and embedding, where they are one weight on two stages."""
    from paci_rt import TiedWeight

    if not config.tied or num_stages == 1:
        return ()
    return (TiedWeight(owner_stage=0, owner=WTE, reader_stage=num_stages - 1, reader=LM_HEAD),)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean nats per token, in fp32, of logits ``[batch, seq, vocab]`` and int64 targets ``[batch, seq]``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
