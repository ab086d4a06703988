"""Torch's own schedules beside ours: their stages, and what their activations take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt import schedules
from paci_rt.schedules import Placement

TORCHS = {
    "1f1b": "Schedule1F1B",
    "gpipe": "ScheduleGPipe",
    "interleaved-1f1b": "ScheduleInterleaved1F1B",
    "looped-bfs": "ScheduleLoopedBFS",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}
"""Torch's classes by the names of ours."""
FUSED = "torch-1f1b-fused"
PEERS = ("torch-1f1b", FUSED, *(f"torch-{name}" for name in TORCHS if name != "1f1b"))


def name_of(schedule: str) -> str:
    """Our name of the order that ``schedule`` runs in, which may be one of ``PEERS``."""
    return schedule.removeprefix("torch-").removesuffix("-fused") if schedule in PEERS else schedule


def places_of(schedule: str, ranks: int, chunks: int) -> Placement:
    """Which stages each rank has."""
    name = schedules.get(name_of(schedule)).placement
    return Placement(num_stages=ranks * chunks, chunks=chunks, name=name)


def make(schedule: str, modules: Sequence[nn.Module], stages: Sequence[int], count: int, n: int, loss_fn: Any) -> Any:
    """Torch's schedule over this rank's ``stages`` of ``count``, with ``n`` micro-batches."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules as torchs

    made = [
        pipelining.PipelineStage(module, at, count, torch.device("cpu"))
        for module, at in zip(modules, stages, strict=True)
    ]
    cls = getattr(torchs, TORCHS[name_of(schedule)])
    return cls(made if issubclass(cls, torchs.PipelineScheduleMulti) else made[0], n, loss_fn)


class SavedBytes:
    """Within it, counts the bytes that autograd keeps for backwards, each storage once, parameters left out."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = {param.untyped_storage().data_ptr() for param in params}
        self._holders: dict[int, int] = {}
        self._now = self.peak_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        key = tensor.untyped_storage().data_ptr()
        if key not in self._params:
            if not self._holders.get(key):
                self._now += tensor.untyped_storage().nbytes()
                self.peak_bytes = max(self.peak_bytes, self._now)
            self._holders[key] = self._holders.get(key, 0) + 1
        return _Held(tensor, self)

    def let_go(self, tensor: Tensor) -> None:
        """One holder less."""
        key = tensor.untyped_storage().data_ptr()
        if key in self._holders:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._now -= tensor.untyped_storage().nbytes()


class _Held:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor, counted: SavedBytes) -> None:
        self.tensor, self._counted = tensor, counted

    def __del__(self) -> None:
        self._counted.let_go(self.tensor)


def state_bytes(params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients as large, and the optimizer's state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(2 * param.nbytes for param in params) + sum(value.nbytes for value in states)
