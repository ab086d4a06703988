"""How long messages between two stages take: latency and bandwidth of a transport, measured between two processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from paci_rt import launch
from paci_rt.clock import HostClock
from paci_rt.runtime.device_clock import clock_for
from paci_rt.transport import check_transport, make_transport
from paci_rt.transport.base import Message

SMALL_BYTES = 16 << 10
"""Small for its transfer, but more than travels inside a header."""
ROUNDS, WARM_UP = 60, 10
TIMEOUT_S = 120.0
ON_GPUS = ("nccl", "ipc")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A message of ``n`` bytes takes ``hop_s + n / bandwidth_bytes_per_s`` seconds."""

    hop_s: float
    bandwidth_bytes_per_s: float


def seconds_between(clock: HostClock, marks: Sequence[Any]) -> list[float]:
    """Seconds from each of ``clock``'s marks to the next; waits until the last has been passed."""
    found: list[float] = []
    for begin, end in pairwise(marks):
        clock.between(begin, end, lambda start_s, end_s: found.append(end_s - start_s))
    clock.settle()
    return found


def written_bytes(count: int, device: torch.device) -> torch.Tensor:
    """``count`` bytes that have been written to, since all pages of fresh zeros can be one page of memory.

    On a GPU this launches no kernel: loading one for the first time may wait for receives that are posted already.
    """
    return torch.ones(count, dtype=torch.uint8).to(device)


def ping_pong(
    send: Callable[[], object], recv: Callable[[], object], *, first: bool, rounds: int, clock: HostClock
) -> list[float]:
    """Send one message to and fro, after a few rounds that do not count.

    Args:
        send, recv: start sending to the other process; receive from it.
        first: True in the process that sends first.

    Returns:
        Seconds of one way, half of each round trip.
    """
    steps = (send, recv) if first else (recv, send)
    marks = []
    for number in range(WARM_UP + rounds):
        if number == WARM_UP:
            marks.append(clock.mark())
        for step in steps:
            step()
        if number >= WARM_UP:
            marks.append(clock.mark())
    return [seconds / 2 for seconds in seconds_between(clock, marks)]


def measure_link(large_bytes: int = 4 << 20, *, transport: str = "auto", rounds: int = ROUNDS) -> Link:
    """Send messages to and fro between two new processes, small ones and large ones.

    A line through half the median round trips of both sizes gives latency and bandwidth.

    Args:
        large_bytes: the larger size; at least four times ``SMALL_BYTES``.
        transport: a name that :func:`paci_rt.transport.make_transport` takes.
        rounds: round trips of each size.

    Raises:
        ValueError: ``large_bytes`` is too small to tell the two apart, ``rounds`` below 1, no such transport, or one
            for GPUs where there are none.
        StageFailed: a process failed, or the transport does not work here.
    """
    if large_bytes < 4 * SMALL_BYTES:
        raise ValueError(f"large_bytes is {large_bytes}: give at least {4 * SMALL_BYTES}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: give at least 1")
    check_transport(transport)
    if transport == "local":
        raise ValueError("transport 'local' passes messages by reference and has no link: give 'auto', 'shm' or 'gloo'")
    if transport in ON_GPUS and not torch.cuda.is_available():
        raise ValueError(
            f"transport {transport!r} is for GPUs, and torch finds none here: give 'auto', 'shm' or 'gloo'"
        )
    sizes = (SMALL_BYTES, large_bytes)
    small_s, large_s = launch.run(_measure, 2, (transport, sizes, rounds), timeout_s=TIMEOUT_S)[0]
    # Noise can make the larger one no slower; a message then costs nothing but its latency.
    per_byte = max(0.0, large_s - small_s) / (large_bytes - SMALL_BYTES)
    return Link(
        hop_s=max(0.0, small_s - per_byte * SMALL_BYTES),
        bandwidth_bytes_per_s=1 / per_byte if per_byte else float("inf"),
    )


def _measure(ctx: launch.Context, name: str, sizes: tuple[int, ...], rounds: int) -> list[float]:
    """Run by both processes: median seconds of one way, by size."""
    device = torch.device("cpu")
    where: dict[str, Any] = {}
    if name in ON_GPUS:
        device = torch.device("cuda", ctx.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        where = {"device": device}
    transport = make_transport(name, num_stages=2, **where)
    here, there = ctx.rank, 1 - ctx.rank
    kind, answer = ("F", "B") if here == 0 else ("B", "F")  # what this process sends and receives
    transport.open([(answer, there, here)])
    sent = received = 0

    def send() -> None:
        nonlocal sent
        transport.send((kind, here, there), sent, message)
        sent += 1

    def recv() -> None:
        nonlocal received
        transport.recv((answer, there, here), received)
        received += 1

    medians = []
    for size in sizes:
        message = Message((written_bytes(size, device),), (False,))
        times = ping_pong(send, recv, first=here == 0, rounds=rounds, clock=clock_for(device))
        medians.append(statistics.median(times))
    transport.flush()
    transport.close()
    return medians
