"""The hash of a whole model whose parameters are on several processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

import paci_rt
from paci_rt.transport.collective import barrier, gather, lost

WHAT = "have not come to the final gather of parameters"


def gathered_sha256(
    mine: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    timeout_s: float,
) -> str | None:
    """Hash of the uncut model's parameters, which travel to rank 0 one at a time; None on the others.

    Parameters in a row of one process are its turn. It sends them when the turn comes, so that no send waits for the
    hashing of others.

    Args:
        mine: parameters of this process by name.
        shapes: all of the model, in the order of the hash.
        group: of all stages, whose waits have a deadline; ``timeout_s`` is that of the turns.

    Raises:
        MeetingError: a process did not come in time, or is lost.
    """
    rank = dist.get_rank(group)
    names = gather(list(mine), group, timeout_s, kind="names", what=WHAT)
    owner = {name: at for at, theirs in reversed(list(enumerate(names))) for name in theirs}  # the first that has it
    turns = [(at, list(theirs)) for at, theirs in groupby(shapes, key=owner.__getitem__)]

    def in_order() -> Iterator[tuple[str, Tensor]]:
        for at, theirs in turns:
            if at > 0:
                barrier(group, timeout_s, kind="turn", what=WHAT)
            for name in theirs:
                if at == rank == 0:
                    yield name, mine[name]
                elif rank == 0:
                    yield name, received(shapes[name], dtype, at, group)
                elif at == rank:
                    sent(mine[name], group)

    if rank == 0:
        return paci_rt.params_sha256(in_order())
    assert not list(in_order())  # only rank 0 has them
    return None


def received(shape: Sequence[int], dtype: torch.dtype, owner: int, group: dist.ProcessGroup) -> Tensor:
    """A parameter of another process."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    try:
        dist.recv(tensor.view(-1).view(torch.uint8), owner, group=group)
    except RuntimeError as error:
        raise lost(error, f"the final gather from stage {owner}", [owner]) from error
    return tensor


def sent(parameter: Tensor, group: dist.ProcessGroup) -> None:
    """Send a parameter to rank 0."""
    try:
        dist.send(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8), 0, group=group)
    except RuntimeError as error:
        raise lost(error, "the final gather to stage 0", [0]) from error
