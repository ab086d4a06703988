"""Text from a trained decoder, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paci_rt.train.model import ModelShape


@torch.no_grad()
def generate(
    module: nn.Module,
    shape: ModelShape,
    prompt: Tensor,
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw ``count`` tokens after a prompt.

    Args:
        module: the uncut model, from tokens to logits.
        prompt: int64 ``[tokens]``, at least one, on the model's device. What does not fit into the context before a
            token is left out at its front.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw from the likeliest ones alone.
        seed: of the draws.

    Returns:
        The new tokens, int64 ``[count]``, on the CPU.

    Raises:
        ValueError: the model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(count):
        logits = module(tokens[None, -shape.context :])[0, -1].float().cpu()  # [vocab]
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's logits are not finite: its training diverged, take an earlier checkpoint")
        if temperature == 0:
            drawn = logits.argmax(keepdim=True)
        else:
            kept, names = logits.topk(min(top_k or len(logits), len(logits)))
            shares = torch.softmax((kept - kept[0]).double() / temperature, dim=0)
            drawn = names[torch.multinomial(shares, 1, generator=generator)]
        tokens = torch.cat((tokens, drawn.to(tokens.device)))
    return tokens[len(prompt) :].cpu()
