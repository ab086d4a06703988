"""How long messages between two stages take: latency and bandwidth of a transport, measured between two processes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from paci_rt import launch
from paci_rt.transport.base import Message
from paci_rt.transport.factory import check_transport, make_transport

SMALL_BYTES = 16 << 10
"""Small for its transfer, but more than travels inside a header."""
ROUNDS, WARM_UP = 60, 10
TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """A message of ``n`` bytes takes ``hop_s + n / bandwidth_bytes_per_s`` seconds."""

    hop_s: float
    bandwidth_bytes_per_s: float


def measure_link(large_bytes: int = 4 << 20, *, rounds: int = ROUNDS, transport: str = "auto") -> Link:
    """Send messages to and fro between two new processes, small ones and large ones.

    A line through half the median round trips of both sizes gives latency and bandwidth.

    Args:
        large_bytes: the larger size; at least four times ``SMALL_BYTES``.
        rounds: round trips of each size.
        transport: ``auto``, ``shm`` or ``gloo``; see :func:`paci_rt.transport.make_transport`.

    Raises:
        ValueError: ``large_bytes`` is too small to tell the two apart, ``rounds`` below 1, or no such transport.
        StageFailed: a process failed.
    """
    if large_bytes < 4 * SMALL_BYTES:
        raise ValueError(f"large_bytes is {large_bytes}: give at least {4 * SMALL_BYTES}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: give at least 1")
    check_transport(transport)
    if transport == "local":
        raise ValueError("transport 'local' passes messages by reference and has no link: give 'auto', 'shm' or 'gloo'")
    sizes = (SMALL_BYTES, large_bytes)
    small_s, large_s = launch.run(ping_pong, 2, (transport, sizes, rounds), timeout_s=TIMEOUT_S)[0]
    # Noise can make the larger one no slower; a message then costs nothing but its latency.
    per_byte = max(0.0, large_s - small_s) / (large_bytes - SMALL_BYTES)
    return Link(
        hop_s=max(0.0, small_s - per_byte * SMALL_BYTES),
        bandwidth_bytes_per_s=1 / per_byte if per_byte else float("inf"),
    )


def ping_pong(ctx: launch.Context, name: str, sizes: tuple[int, ...], rounds: int) -> list[float]:
    """Run by both processes: median seconds of one way, by size."""
    transport = make_transport(name, num_stages=2)
    here, there = ctx.rank, 1 - ctx.rank
    kind, answer = ("F", "B") if here == 0 else ("B", "F")  # what this process sends and receives
    transport.open([(answer, there, here)])
    number, medians = 0, []
    for size in sizes:
        message = Message((torch.zeros(size, dtype=torch.uint8),), (False,))
        times = []
        for _ in range(WARM_UP + rounds):
            start = time.perf_counter()
            if here == 0:
                transport.send((kind, here, there), number, message)
                transport.recv((answer, there, here), number)
            else:
                transport.recv((answer, there, here), number)
                transport.send((kind, here, there), number, message)
            times.append((time.perf_counter() - start) / 2)
            number += 1
        medians.append(statistics.median(times[WARM_UP:]))
    transport.flush()
    transport.close()
    return medians
