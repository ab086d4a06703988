"""Times of a way to move bytes, measured at start-up on the channel's own pair of devices."""

from __future__ import annotations

import time
from typing import Any

import torch

from paci_rt.transport import wire
from paci_rt.transport.device.backends import Candidate, Measured
from paci_rt.transport.device.hardware import Hardware

SMALL_BYTES, LARGE_BYTES = 16 << 10, 4 << 20
WARM_UP, MESSAGES = 3, 20


def send_probe(candidate: Candidate, end: Any, hardware: Hardware) -> Measured:
    """Send both sizes and time them; the other side calls :func:`receive_probe`."""
    index, times = 0, []
    for size in (SMALL_BYTES, LARGE_BYTES):
        meta = _meta(size)
        tensor, packed = hardware.empty(meta), wire.pack_metas((meta,))
        for count in (WARM_UP, MESSAGES):
            start = time.perf_counter()
            for _ in range(count):
                end.send_on(index, packed, [tensor], hardware.index, hardware.stream())
                index += 1
            end.flush()
            took_us = (time.perf_counter() - start) / count * 1e6
        times.append(round(took_us, 1))
    return Measured(candidate.name, times[0], times[1])


def receive_probe(candidate: Candidate, end: Any, hardware: Hardware) -> Measured:
    """The other side of :func:`send_probe`; what it returns says that it worked."""
    index = 0
    for size in (SMALL_BYTES, LARGE_BYTES):
        tensor = hardware.empty(_meta(size))
        for _ in range(WARM_UP + MESSAGES):
            end.take(index, hardware.index, hardware.stream()).unpack([tensor])
            index += 1
    return Measured(candidate.name, None, None)


def _meta(size_bytes: int) -> wire.TensorMeta:
    return wire.TensorMeta(torch.uint8, (size_bytes,), True, False)
