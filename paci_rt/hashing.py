"""A fingerprint of a model's parameters that does not depend on how the model was cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def params_sha256(named_params: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the bytes of all parameters, in the order given.

    Args:
        named_params: pairs of name and tensor, of any dtype, in the order of the uncut model.
    """
    digest = hashlib.sha256()
    for _name, tensor in named_params:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
