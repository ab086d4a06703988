"""When a matrix product that adds to its result has the bits of a product followed by an addition."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=4096)
def one_pass_is_exact(rows: int, summed: int, columns: int, _threads: int) -> bool:
    """Whether ``c.addmm_(a, b)`` gives the bits of ``c + a @ b``: fp32, ``[rows, summed] @ [summed, columns]``."""
    rows, columns = min(rows, 4096), min(columns, 4096)  # larger ones are worked off in blocks
    generator = torch.Generator().manual_seed(summed)
    left = torch.randn(summed, rows, generator=generator).t()
    right = torch.randn(summed, columns, generator=generator)
    start = torch.randn(rows, columns, generator=generator)
    apart = start + torch.mm(left, right)
    fresh = torch.mm(left, right, out=torch.empty_like(start))
    return torch.equal(start.addmm_(left, right), apart) and torch.equal(fresh, torch.mm(left, right))
