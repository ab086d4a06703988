"""torch's dtypes as Triton's."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl


def element(dtype: torch.dtype) -> Any:
    """Triton's element type of a floating-point tensor."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
