"""Random draws that are pure functions of what they are for, and the masking made of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK_TOKEN = 256  # the first that is not a byte
IGNORED = -100  # a target that torch's cross entropy leaves out
MASKED_SHARE = 0.15


def seeded(*what: object) -> torch.Generator:
    """A CPU generator whose stream depends on ``what`` alone."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def masked_count(seq_len: int) -> int:
    """Positions of a sequence that are to be predicted, at least one."""
    return max(1, round(MASKED_SHARE * seq_len))


def mask(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Input and target of masked language modelling (BERT: Devlin et al., arXiv 1810.04805) from bytes.

    Of the positions to predict, 80 % hold MASK_TOKEN, 10 % a random byte and 10 % what was there. Every sequence has
    the same number of them: the mean over micro-batches' means is then the mean over the batch.

    Args:
        tokens: int64 ``[batch, seq]``, left as they are.

    Returns:
        Two int64 ``[batch, seq]``; the target is IGNORED wherever nothing is to be predicted.
    """
    order = torch.rand(tokens.shape, generator=generator).argsort(dim=1)
    chosen = order[:, : masked_count(tokens.shape[1])]  # [batch, count]
    truth = tokens.gather(1, chosen)
    kind = torch.rand(chosen.shape, generator=generator)
    random = torch.randint(MASK_TOKEN, chosen.shape, generator=generator)
    shown = torch.where(kind < 0.8, MASK_TOKEN, torch.where(kind < 0.9, random, truth))
    return tokens.scatter(1, chosen, shown), torch.full_like(tokens, IGNORED).scatter(1, chosen, truth)
