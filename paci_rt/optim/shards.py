"""Optimizer state that is shared out among the replicas of a stage (ZeRO-1).

Each replica keeps moments and masters of its own part of the flat buffers, updates that part of the weights, and sends
it to the others. Forwards wait for the weights layer by layer; everything else waits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.replicas import pieces
from paci_rt.transport.replicas import Pending, Range, ReplicaGroup, shares

NUMBERS = ("step", "mu_product")
"""State that is one number for each parameter, and that every replica has."""
_LEAST = 16
"""Elements that the buffers of a replica have at least, also where the group is too small to give it any."""


class ShardGroup(FlatGroup):
    """One replica's part of a flat group, as the state of an optimizer sees it: parameters are pieces of themselves,
    1-D, and perhaps empty.

    Args:
        whole: the group. part: start and end of the part in it.
    """

    def __init__(self, whole: FlatGroup, part: Range) -> None:
        self.whole, self.part = whole, part
        self.names, self.params, self.index = whole.names, whole.params, whole.index
        self.dtype, self.device = whole.dtype, whole.device
        found = pieces(whole, part)
        self.numels = tuple(end - start for start, end in found)
        self.offsets = tuple(start - part[0] if start < end else 0 for start, end in found)
        self.numel = max(part[1] - part[0], _LEAST)
        self._none = torch.zeros(_LEAST, dtype=self.dtype) if part[0] == part[1] else None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.of(self.whole.weight) if self._none is None else self._none

    def of(self, flat: Tensor) -> Tensor:
        """The part of a buffer of the whole group."""
        if self._none is not None:
            return torch.zeros(_LEAST, dtype=flat.dtype)
        return flat[self.part[0] : self.part[1]]

    def view(self, flat: Tensor, position: int) -> Tensor:
        return flat[self.offsets[position] : self.offsets[position] + self.numels[position]]

    def values(self, position: int) -> Tensor:
        return self.view(self.weight, position)

    def cut(self, position: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The part of one parameter's state that belongs here.

        Raises:
            ValueError: a tensor of it is not of the parameter's shape.
        """
        shape, found = self.params[position].shape, {}
        start = self.part[0] + self.offsets[position] - self.whole.offsets[position]
        for key, value in entry.items():
            if not isinstance(value, Tensor) or key in NUMBERS:
                found[key] = value
                continue
            if value.shape != shape:
                raise ValueError(
                    f"optimizer state {key!r} of {self.names[position]!r} has shape {tuple(value.shape)}, expected "
                    f"{tuple(shape)}: with shard_optimizer=True give an optimizer without state, or a checkpoint's"
                )
            numel = self.numels[position]
            found[key] = value.reshape(-1)[start : start + numel] if numel else value.reshape(-1)[:0]
        return found


class Shards:
    """The parts of a stage's optimizer state that this replica has.

    Args:
        groups: the stage's flat groups.
        replicas: all of them.
    """

    def __init__(self, groups: Sequence[FlatGroup], replicas: ReplicaGroup) -> None:
        self.replicas, self._whole = replicas, list(groups)
        self._parts = [shares(group.numel, replicas.size) for group in groups]
        self.groups = [
            ShardGroup(group, parts[replicas.rank]) for group, parts in zip(groups, self._parts, strict=True)
        ]

    def whole(self, number: int, part: Tensor) -> Tensor:
        """A flat buffer of a group from what each replica has of it; all of them call this."""
        group = self._whole[number]
        flat = group.empty_like(part.dtype)
        start, end = self._parts[number][self.replicas.rank]
        flat[start:end].copy_(part[: end - start])
        ranges = [[one] for one in self._parts[number]]
        self.replicas.submit("gathering the state", partial(self.replicas.share, flat, ranges)).wait()
        return flat

    def ranges(self, number: int, positions: Sequence[int] | None) -> list[list[Range]]:
        """For each replica where it has weights of the parameters at ``positions``; None is all of them."""
        if positions is None:
            return [[part] for part in self._parts[number]]
        group, found = self._whole[number], []
        for part in self._parts[number]:
            here = pieces(group, part)
            found.append([here[position] for position in positions if here[position][0] < here[position][1]])
        return found

    def send_weights(self, parts: Sequence[Sequence[int] | None]) -> Pending[None]:
        """Begin to send weights to all replicas: for each group those of some positions, or all."""
        todo = [
            partial(self.replicas.share, group.weight, self.ranges(number, positions))
            for number, (group, positions) in enumerate(zip(self._whole, parts, strict=True))
        ]

        def work() -> None:
            for one in todo:
                one()

        return self.replicas.submit("gathering weights", work)


class WeightGathers:
    """Who waits for weights that come from other replicas; on the CPU what
    :class:`~paci_rt.optim.update_stream.UpdateStream` is on a GPU.

    Args:
        send: begins to send the weights of a bucket.
    """

    def __init__(self, send: Callable[[int], Pending[None]]) -> None:
        self._send = send
        self._under_way: dict[int, Pending[None]] = {}
        self.waited_s = 0.0

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within it, weights may be written."""
        self.wait_all()
        yield

    def publish(self, bucket: int) -> None:
        """The own part of a bucket has been updated."""
        self.expect(bucket, self._send(bucket))

    def expect(self, bucket: int, coming: Pending[None]) -> None:
        """Whoever reads a bucket's weights waits for this."""
        self._under_way[bucket] = coming

    def set_buckets(self, buckets: int) -> None:
        """From now on updates come in other parts."""
        self.wait_all()

    def wait(self, bucket: int) -> None:
        """A bucket's weights are about to be read."""
        pending = self._under_way.pop(bucket, None)
        if pending is not None:
            begin = perf_counter()
            pending.wait()
            self.waited_s += perf_counter() - begin

    def wait_all(self) -> None:
        """Any weight may be read."""
        for bucket in list(self._under_way):
            self.wait(bucket)
