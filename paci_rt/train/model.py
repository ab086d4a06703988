"""What the families of models have in common: a shape, a cut into stages, and a start that no cut changes.

Every weight is drawn from a generator seeded with (seed, its name). The same seed therefore gives the same model for
any number of stages, in any process, without anybody sending weights around. Names do not depend on the cut either.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from paci_rt import TiedWeight

HELD_BACK = (1 << 64) - 1
"""In place of a window's number and seed, for :meth:`ModelShape.examples` of the held-back set."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(ABC):
    """Shape of one model; each family has a class of its own.

    Attributes:
        vocab_size: number of tokens. ``context``: longest sequence.
        layers: blocks. ``heads``: attention heads; ``width`` is a multiple of it.
        width: size of the residual stream.
        tied: the head uses the token embedding's weight.
        family: its name. ``embedding``, ``head``: names of their weights. ``blocks``: where names of blocks begin.
        generates: it predicts the next token, so that text can be drawn from it.
    """

    family: ClassVar[str]
    embedding: ClassVar[str]
    head: ClassVar[str]
    blocks: ClassVar[str]
    generates: ClassVar[bool] = True

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

    @abstractmethod
    def make_stage(self, blocks: range, *, first: bool, last: bool) -> nn.Module:
        """Consecutive blocks; ``first`` embeds, ``last`` has the head. Parameters are left as torch makes them."""

    @abstractmethod
    def block_macs(self, seq_len: int) -> int:
        """Multiply-adds of a token's forward through a block."""

    @abstractmethod
    def start_of(self, name: str) -> float:
        """How a parameter starts: a standard deviation, 0 for zeros, and -1 for ones."""

    @property
    def head_macs(self) -> int:
        """Multiply-adds of a token's forward through the head."""
        return self.width * self.vocab_size

    @property
    def data_vocab_size(self) -> int:
        """Tokens of the data are below it."""
        return self.vocab_size

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def check_rotary(self) -> None:
        """Raise ValueError where heads cannot have rotary positions."""
        if self.head_size % 2:
            raise ValueError(
                f"{self.name}: width {self.width} over {self.heads} heads gives heads of {self.head_size}, "
                "and rotary positions need an even number"
            )

    def examples(self, x: Tensor, y: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, from tokens and those that follow them, each int64 ``[batch, seq]``; a pure function.

        Args:
            key: what makes draws different: the seed and the number of the window.
        """
        return x, y


class _Kept(torch.autograd.Function):
    """The identity, whose node in autograd's graph has its input: what a checkpoint keeps stands in no graph, so that
    the table of memory would not have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class Blocks(nn.ModuleDict):
    """Consecutive blocks by their number in the uncut model, one behind the other.

    Attributes:
        recompute: of each block only what goes in is kept, and its forward runs again in its backward. No block draws
            random numbers.
    """

    recompute = False

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Hidden ``[batch, seq, width]`` in and out; ``others`` go to every block."""
        for block in self.values():
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, _Kept.apply(x), *others, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *others)
        return x


def default_partition(shape: ModelShape, num_stages: int, *, seq_len: int | None = None) -> tuple[int, ...]:
    """Blocks per stage, so that the most expensive stage is as cheap as possible.

    Cost is multiply-adds of a token's forward; a backward costs twice that everywhere. The last stage pays for the head
    in blocks; what does not divide goes to later stages, because earlier ones hold more micro-batches in flight.

    Raises:
        ValueError: fewer than one stage, or more stages than blocks.
    """
    if num_stages < 1:
        raise ValueError(f"at least one stage is needed, got {num_stages}")
    if num_stages > shape.layers:
        raise ValueError(
            f"{num_stages} stages, but {shape.name} has only {shape.layers} blocks; "
            f"ask for at most {shape.layers} stages"
        )
    if num_stages == 1:
        return (shape.layers,)
    block, head = shape.block_macs(seq_len or shape.context), shape.head_macs
    others = num_stages - 1

    def largest_cost(last: int) -> int:
        return max(block * math.ceil((shape.layers - last) / others), block * last + head)

    last = min(range(shape.layers - others, 0, -1), key=largest_cost)  # of equal ones that with most on the last stage
    each, extra = divmod(shape.layers - last, others)
    return (each,) * (others - extra) + (each + 1,) * extra + (last,)


def build_stage(
    shape: ModelShape,
    stage_index: int,
    num_stages: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    partition: Sequence[int] | None = None,
    recompute_blocks: bool = False,
) -> nn.Module:
    """Build and initialise one stage of the model on the CPU.

    Args:
        seed: with a parameter's name, all that its initial value depends on.
        dtype: of all parameters; values are drawn in fp32 and rounded.
        partition: blocks of each stage, at least one each; default :func:`default_partition`.
        recompute_blocks: see :class:`Blocks`.

    Raises:
        ValueError: more stages than blocks, or a partition that does not add up.
    """
    sizes = tuple(partition) if partition is not None else default_partition(shape, num_stages)
    if len(sizes) != num_stages or sum(sizes) != shape.layers or min(sizes) < 1:
        raise ValueError(
            f"partition {list(sizes)} must give each of {num_stages} stages at least one of "
            f"{shape.name}'s {shape.layers} blocks, and all of them"
        )
    if not 0 <= stage_index < num_stages:
        raise ValueError(f"stage {stage_index} of {num_stages} does not exist")
    start = sum(sizes[:stage_index])
    blocks = range(start, start + sizes[stage_index])
    with torch.device("meta"):  # torch's own initialisation would cost time and draw from the global generator
        module = shape.make_stage(blocks, first=stage_index == 0, last=stage_index == num_stages - 1)
    module.to(dtype).to_empty(device="cpu")
    _initialize(module, shape, seed)
    for part in module.modules():
        if isinstance(part, Blocks):
            part.recompute = recompute_blocks
    return module


@torch.no_grad()
def _initialize(module: nn.Module, shape: ModelShape, seed: int) -> None:
    for name, parameter in module.named_parameters():
        start = shape.start_of(name)
        if start <= 0:
            parameter.fill_(1.0 if start < 0 else 0.0)
            continue
        source = shape.embedding if name == shape.head and shape.tied else name
        digest = hashlib.sha256(f"{seed}/{source}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, start, generator=generator))


def parameter_shapes(shape: ModelShape) -> dict[str, torch.Size]:
    """Name and shape of every parameter of the uncut model, in the order of its ``named_parameters()``."""
    with torch.device("meta"):
        module = shape.make_stage(range(shape.layers), first=True, last=True)
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def tied_weights(shape: ModelShape, num_stages: int) -> tuple[TiedWeight, ...]:
    """What a schedule must keep equal: head and embedding, where they are one weight on two stages."""
    from paci_rt import TiedWeight

    if not shape.tied or num_stages == 1:
        return ()
    return (TiedWeight(owner_stage=0, owner=shape.embedding, reader_stage=num_stages - 1, reader=shape.head),)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean nats per token, in fp32, of logits ``[batch, seq, vocab]`` and int64 targets ``[batch, seq]``.

    Targets of -100 do not count.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


# ---------------------------------------------------------------------------------------------------- rotary positions


def rotary(seq_len: int, head_size: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each ``[seq, head]``: angles in fp32, rounded to the dtype of ``like``."""
    rates = 1.0 / (base ** (torch.arange(0, head_size, 2, dtype=torch.float, device=like.device) / head_size))
    angles = torch.arange(seq_len, device=like.device).float()[:, None] * rates  # [seq, head / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys ``[batch, heads, seq, head]``, turned by their positions; the halves of a head are the pairs."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
