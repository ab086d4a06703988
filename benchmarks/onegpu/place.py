"""Where the stages of one process run: on partitions of a GPU, or by turns on the CPU."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from onegpu.links import LinkTransport
from paci_rt import native
from paci_rt.green import sm_partitions
from paci_rt.schedules.channel import Channel

CONNECTIONS = 32
"""Queues of the hardware that streams are spread over, at most. Streams that share one wait for each other."""

HOLD_US, TRIES = 8000, 5
"""For how long a stream is held up at first, and how often, twice as long each time, before a wait is believed."""


class Place:
    """The CPU: stages take turns, and nothing runs beside anything.

    Attributes:
        device: of everything.
        streams, update_streams: one per stage; None on the CPU.
        facts: what is worth knowing about it, for the JSON.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.streams: list[torch.cuda.Stream] | None = None
        self.update_streams: list[torch.cuda.Stream] | None = None
        self.facts: dict[str, Any] = {}

    def transport(self, latency_us: int) -> LinkTransport:
        """The links of a new pipeline."""
        assert latency_us == 0, "nothing waits on the CPU"
        return LinkTransport()

    @contextmanager
    def feeding(self, step: int) -> Iterator[None]:
        """Within it, call the pipeline's ``step``."""
        yield

    def wait(self) -> None:
        """Until all is done."""

    def reset_peak(self) -> None:
        """Count :meth:`peak_bytes` from here."""

    def peak_bytes(self) -> int | None:
        """Most memory in use since :meth:`reset_peak`; None where it is not counted."""
        return None


class GpuPlace(Place):
    """A GPU, cut into a partition a stage, and the rest of its multiprocessors for the links.

    A stage's updates run on its own partition, on a second stream, as they would on a GPU of its own. On the SMs that
    are left over they would take nothing from the stage, but with 8 stages these are few, and updates would queue up.

    Steps are issued from two streams by turns. After a step the stream that issued it waits for all stages, and in the
    next one all stages wait for the stream that issues it: with a single stream the first stage would wait for the last
    one between two steps, which no stage of a distributed run does. The host waits for the step before the last, which
    bounds how far it runs ahead, and what memory that takes.

    Args:
        device: a CUDA device.
        stages: how many.
        min_sms: SMs of a stage, None for as many as possible.

    Raises:
        ValueError, CudaError: see :func:`paci_rt.green.sm_partitions`.
    """

    def __init__(self, device: torch.device, stages: int, *, min_sms: int | None = None) -> None:
        super().__init__()
        self.device = device
        split = sm_partitions(device, stages, min_sms=min_sms)
        self._partitions = split
        self.streams = [part.stream() for part in split.parts]
        self.update_streams = [part.stream() for part in split.parts]
        forward = [Channel("F", stage, stage + 1) for stage in range(stages - 1)]
        edges = [*forward, *(channel.opposite() for channel in forward)]
        self._links = {edge: torch.cuda.Stream(device) if split.rest is None else split.rest.stream() for edge in edges}
        self._feeds = [torch.cuda.Stream(device) for _ in range(2)]
        self._fed: dict[int, torch.cuda.Event] = {}
        everything = [*self.streams, *self.update_streams, *self._links.values(), *self._feeds]
        self.facts = {
            "sms": split.total_sms,
            "sms_per_stage": split.parts[0].sms,
            "sms_of_links": split.total_sms if split.rest is None else split.rest.sms,
            "smallest_partition_sms": split.smallest_sms,
            "partition_step_sms": split.step_sms,
            "streams": len(everything),
            "hardware_queues": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset"),
            "false_dependencies": false_dependencies(everything, self._hold, HOLD_US),
            "driver": driver_version(),
            "core_cuda": native.info()["cuda_runtime"],
        }

    def transport(self, latency_us: int) -> LinkTransport:
        def delay(link: torch.cuda.Stream) -> None:
            self._hold(link, latency_us)

        return LinkTransport(self._links.__getitem__, delay if latency_us else None)

    @contextmanager
    def feeding(self, step: int) -> Iterator[None]:
        at = step % len(self._feeds)
        if at in self._fed:
            self._fed[at].synchronize()
        with torch.cuda.stream(self._feeds[at]):
            yield
        self._fed[at] = self._feeds[at].record_event()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def _hold(self, stream: torch.cuda.Stream, microseconds: int) -> None:
        """One thread, which sleeps most of the time: it takes next to nothing from what runs beside it."""
        native.core().cuda_spin(native.device_code(self.device, "the link"), stream, microseconds)


def false_dependencies(
    streams: Sequence[torch.cuda.Stream], hold: Callable[[torch.cuda.Stream, int], None], hold_us: int
) -> int:
    """How many ordered pairs of idle streams share a queue of the hardware.

    The second of a pair then waits for the first, though nothing makes it depend on it. One that was ever seen to be
    done while the first was held up does not: a host that was busy looks again, and holds up longer.
    """
    found = 0
    for held in streams:
        suspects = [other for other in streams if other is not held]
        for attempt in range(TRIES):
            hold(held, hold_us << attempt)
            end = held.record_event()
            behind = [(other, other.record_event()) for other in suspects]
            free: set[int] = set()
            while not end.query() and len(free) < len(suspects):
                time.sleep(hold_us / 16e6)
                seen = {at for at, (_, event) in enumerate(behind) if event.query()}
                free |= seen if not end.query() else set()
            suspects = [other for at, other in enumerate(suspects) if at not in free]
            end.synchronize()
            for _, event in behind:
                event.synchronize()
            if not suspects:
                break
        found += len(suspects)
    return found


def driver_version() -> str:
    """NVIDIA's driver, as nvidia-smi has it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.split("\n")[0].strip() or "unknown"
