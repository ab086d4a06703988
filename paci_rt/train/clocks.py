"""One clock for the events of several hosts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from paci_rt.trace import Event
from paci_rt.transport.rendezvous import Meeting

ROUNDS = 32
TAG = 7431


def clock_identity() -> str:
    """What processes have in common whose monotonic clocks are one: the boot of the host, and the time namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    return socket.gethostname()


def offset_to_first(
    timeout_s: float,
    group: dist.ProcessGroup | None = None,
    *,
    now: Callable[[], float] = time.perf_counter,
    identity: Callable[[], str] = clock_identity,
) -> float:
    """Seconds to add to this process's clock for that of rank 0; 0 where they are one clock.

    Every process of the group calls this. It is exact to half the time that a small message takes there and back: of
    some rounds the fastest counts.

    Args:
        timeout_s: how long to wait for the others.
        group: a gloo group; None is the default one.
        now, identity: of this process's clock.
    """
    rank = dist.get_rank(group)
    identities = Meeting(group, timeout_s, kind="clocks").exchange("identity", identity())
    others = [one for one, theirs in enumerate(identities) if theirs != identities[0]]
    best = (float("inf"), 0.0)
    for other in others if rank == 0 else [0] if rank in others else []:
        peer = other if group is None else dist.get_global_rank(group, other)
        for _ in range(ROUNDS):
            stamp = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                dist.recv(stamp, peer, group, TAG)
                stamp[0] = now()
                dist.send(stamp, peer, group, TAG)
            else:
                sent = now()
                dist.send(stamp, peer, group, TAG)
                dist.recv(stamp, peer, group, TAG)
                back = now()
                best = min(best, (back - sent, float(stamp[0]) - (sent + back) / 2))
    return best[1]


def shifted(events: Sequence[Event], offset_s: float) -> tuple[Event, ...]:
    """Events on another clock."""
    if offset_s == 0.0:
        return tuple(events)
    return tuple(replace(event, start_s=event.start_s + offset_s, end_s=event.end_s + offset_s) for event in events)
