"""Where the updates of a stage on a GPU run, and who waits for them.

They run on a stream of their own: they begin when all that reads the weights is done, and forwards wait for them where
they are about to read weights, layer by layer. On the CPU an update is over when its call returns: nobody ever waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from paci_rt import native


class UpdateStream:
    """Updates of a stage on a GPU, on a stream of their own.

    What reads the weights, and calls :meth:`wait` or :meth:`wait_all`, does so on the stream that is current in torch.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device)
        self._gate = native.make_weight_gate(1, device)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within it, weights may be written."""
        self._gate.claim(self.stream.cuda_stream)
        with torch.cuda.stream(self.stream):
            yield

    def publish(self, bucket: int) -> None:
        """The update of a bucket has been issued."""
        self._gate.publish(bucket, self.stream.cuda_stream)

    def set_buckets(self, buckets: int) -> None:
        """From now on updates come in so many parts, each of which is waited for by itself."""
        self.wait_all()
        self._gate = native.make_weight_gate(buckets, self._device)
        self.wait_all()  # this stream reads the weights: the next update has to know

    def wait(self, bucket: int) -> None:
        """What is computed from now on may read a bucket's weights."""
        self._gate.wait(bucket, native.current_stream(self._device))

    def wait_all(self) -> None:
        """What is computed from now on may read all weights."""
        self._gate.wait_all(native.current_stream(self._device))

    def move_to(self, stream: torch.cuda.Stream) -> None:
        """Updates run on this stream. Before the first of them only."""
        self.stream = stream


class Buckets:
    """The parameters of a stage in the parts in which an update takes them on, in the order of a forward.

    Bucket 0 has what a forward may read at any time; each further one has linear layers, which wait for it themselves.

    Args:
        homes: flat group and position of every parameter, by its id.
        layers: parameters of each of those layers, in the order in which a forward uses them.
        groups: number of flat groups.
    """

    MOST = 8
    """Of them besides bucket 0: each is some launches more."""

    def __init__(
        self,
        homes: Mapping[int, tuple[int, int]],
        layers: Sequence[Sequence[nn.Parameter]],
        groups: int,
    ) -> None:
        total = sum(param.numel() for layer in layers for param in layer)
        self.of_param = dict.fromkeys(homes, 0)
        bucket, filled = 1, 0
        for layer in layers:
            if filled * self.MOST >= bucket * total and filled:
                bucket += 1
            for param in layer:
                self.of_param[id(param)] = bucket
                filled += param.numel()
        self.count = max(self.of_param.values(), default=0) + 1
        self._positions = [[set[int]() for _ in range(groups)] for _ in range(self.count)]
        for key, bucket in self.of_param.items():
            group, position = homes[key]
            self._positions[bucket][group].add(position)

    @property
    def digest(self) -> int:
        """A number that equal parts have in common, above 0."""
        text = repr([[sorted(positions) for positions in groups] for groups in self._positions])
        return 1 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def part(self, bucket: int, group: int, positions: Iterable[int]) -> list[int]:
        """Those of ``positions`` in a flat group that are in a bucket."""
        return [position for position in positions if position in self._positions[bucket][group]]
