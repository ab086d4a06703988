"""What processes that torchrun has started again say to each other, apart from what those before them said."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

import torch.distributed as dist

from paci_rt import status
from paci_rt.transport.patience import Boards, BoundedStore, Patience

POLL_S = 0.05


def attempt_store(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """A part of ``store`` that no process of an earlier attempt has written to.

    torchrun keeps one store for all restarts, so that addresses of processes that have ended are still in it, and
    restart counts of several hosts may differ. So the first process draws a name for the attempt, and says which
    processes have come to it; one that finds itself left out has read the name of an attempt before.

    Raises:
        MeetingError: some did not come in time.
    """
    common = BoundedStore(dist.PrefixStore("paci_rt/attempts", store), timeout_s)
    status.board().enter("meeting the other stages", rank=rank)
    patience = Patience(timeout_s, Boards(common, rank), "have not started")
    own = secrets.token_hex(8)
    if rank == 0:
        common.set("name", own)
        keys = {other: f"{own}/{other}" for other in range(1, size)}
        while missing := [other for other, key in keys.items() if not common.check([key])]:
            patience.check(missing)
            time.sleep(POLL_S)
        members = {str(other): common.get(key).decode() for other, key in keys.items()}
        common.set(f"{own}/members", json.dumps(members))
        name = own
    else:
        name = _joined(common, rank, own)
        while not name:
            patience.check([0])
            time.sleep(POLL_S)
            name = _joined(common, rank, own)
    patience.over()
    return dist.PrefixStore(f"paci_rt/attempt/{name}", store)


def _joined(common: BoundedStore, rank: int, own: str) -> str:
    """The attempt that the first process has counted this one in; empty until it has."""
    if not common.check(["name"]):
        return ""
    name = common.get("name").decode()
    common.set(f"{name}/{rank}", own)
    members = f"{name}/members"
    return name if common.check([members]) and json.loads(common.get(members))[str(rank)] == own else ""
