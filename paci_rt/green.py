"""A GPU's multiprocessors (SMs) in disjoint partitions, each with streams whose work runs there and nowhere else.

With a partition a stage, one GPU runs a pipeline as several smaller GPUs would, but for what they share: memory, its
bandwidth, the second-level cache and the power budget. Partitions are CUDA's green contexts, all of them from a single
split. (``torch.cuda.green_contexts`` splits anew for each context and takes the first group every time, so two of its
contexts overlap.) They need NVIDIA's driver for CUDA 12.5 or later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from paci_rt import native


@dataclass(frozen=True)
class SmPartition:
    """Some SMs of a GPU.

    Attributes:
        device: the GPU.
        sms: how many.

    Example:
        >>> from paci_rt.green import sm_partitions
        >>> part = sm_partitions("cuda", 2).parts[0]  # doctest: +SKIP
        >>> with torch.cuda.stream(part.stream()):  # doctest: +SKIP
        ...     y = torch.ones(1024, 1024, device="cuda") @ torch.ones(1024, 1024, device="cuda")
    """

    device: torch.device
    sms: int
    _native: Any

    def stream(self, *, priority: int = 0) -> torch.cuda.Stream:
        """A new stream of torch whose kernels run on these SMs; a lower ``priority`` goes first.

        Like torch's own streams it stays until the process ends, and so does its partition.
        """
        return torch.cuda.ExternalStream(self._native.lasting_stream(priority), self.device)


@dataclass(frozen=True)
class SmPartitions:
    """What a GPU was split into.

    Attributes:
        parts: as many as were asked for, of equal size.
        rest: SMs that no part has, None where none are left. They need not be close to each other, so kernels that use
            clusters of thread blocks may not run there.
        total_sms: of the GPU.
        smallest_sms: that a partition of this GPU may have.
        step_sms: sizes of partitions are multiples of this.

    Example:
        On an H100 with 132 SMs:

        >>> from paci_rt.green import sm_partitions
        >>> split = sm_partitions("cuda", 4)  # doctest: +SKIP
        >>> [part.sms for part in split.parts], split.rest.sms, split.step_sms  # doctest: +SKIP
        ([24, 24, 24, 24], 36, 8)
    """

    parts: tuple[SmPartition, ...]
    rest: SmPartition | None
    total_sms: int
    smallest_sms: int
    step_sms: int


def sm_partitions(device: torch.device | str, count: int, *, min_sms: int | None = None) -> SmPartitions:
    """Split a GPU's SMs into ``count`` disjoint partitions of equal size, and what remains.

    Args:
        device: a CUDA device.
        count: partitions, besides the rest.
        min_sms: SMs of each at least, rounded up to what the GPU allows (on compute capability 9.0 and later to a
            multiple of 8). None: as many as there can be with some left over for the rest, or with none where the
            smallest size leaves none.

    Raises:
        ValueError: ``device`` is no CUDA device, or has no room for as many; the message says how many there can be.
        CudaError: no GPU is usable, or its driver has no partitions; the message has the remedy.

    Example:
        >>> from paci_rt.green import sm_partitions
        >>> streams = [part.stream() for part in sm_partitions("cuda", 4).parts]  # doctest: +SKIP
        >>> pipeline = paci_rt.LocalPipeline(stages, streams=streams, **options)  # doctest: +SKIP
        >>> sm_partitions("cpu", 4)
        Traceback (most recent call last):
        ValueError: device is 'cpu', which has no SMs to split: name a CUDA device
    """
    where = torch.device(device)
    if where.type != "cuda":
        raise ValueError(f"device is {str(where)!r}, which has no SMs to split: name a CUDA device")
    core, code = native.core(), native.device_code(where, "the partitions")
    total, smallest, step = core.sm_counts(code)
    sms = choose_size(total, smallest, step, count, min_sms, lambda size: int(core.sm_groups(code, size)))
    parts, rest = core.split_sms(code, count, sms)
    there = torch.device("cuda", code)
    return SmPartitions(
        parts=tuple(SmPartition(there, part.sms, part) for part in parts),
        rest=None if rest is None else SmPartition(there, rest.sms, rest),
        total_sms=total,
        smallest_sms=smallest,
        step_sms=step,
    )


def choose_size(
    total: int, smallest: int, step: int, count: int, min_sms: int | None, groups: Callable[[int], int]
) -> int:
    """How many SMs each of ``count`` partitions gets.

    A division does not tell: clusters of SMs may be uneven. An H100 with 132 SMs was seen to give 15 partitions of 8
    SMs, not 16, and so 7 of 16.

    Args:
        total, smallest, step, count, min_sms: see :func:`sm_partitions`.
        groups: how many disjoint partitions of a size there are.

    Raises:
        ValueError: fewer than ``count``.

    Example:
        A GPU with 132 SMs, where clusters allow 15 partitions of 8 SMs and fewer of larger ones:

        >>> from paci_rt.green import choose_size
        >>> choose_size(132, smallest=8, step=8, count=4, min_sms=None, groups=lambda size: 120 // size)
        24
        >>> choose_size(132, smallest=8, step=8, count=16, min_sms=None, groups=lambda size: 120 // size)
        Traceback (most recent call last):
        ValueError: count is 16: this GPU's 132 SMs give at most 15 disjoint partitions, of 8 SMs each, ...
    """
    if count < 1:
        raise ValueError(f"count is {count}: ask for at least 1 partition")
    if min_sms is not None:
        if min_sms < 1:
            raise ValueError(f"min_sms is {min_sms}: a partition has at least 1 SM")
        size = max(smallest, -(-min_sms // step) * step)
        most = groups(size) if size <= total else 0
        if most < count:
            raise ValueError(
                f"min_sms is {min_sms}: this GPU's {total} SMs give {most} disjoint partitions of {size}, not {count}; "
                "ask for fewer or smaller ones"
            )
        return size
    sizes = [size for size in range(smallest, total // count + 1, step) if groups(size) >= count]
    if not sizes:
        raise ValueError(
            f"count is {count}: this GPU's {total} SMs give at most {groups(smallest)} disjoint partitions, of "
            f"{smallest} SMs each, the smallest that it allows; ask for fewer"
        )
    return max((size for size in sizes if size * count < total), default=sizes[0])
