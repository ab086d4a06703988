"""The order between the caller's CUDA streams and those of the stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paci_rt.runtime import trees
from paci_rt.runtime.stage import PipelineStage


@contextmanager
def joined(stages: Iterable[PipelineStage], *, behind_caller: bool) -> Iterator[None]:
    """Within it, stages work on streams of their own; behind it, the caller's streams go on behind all that the stages
    computed. Updates may still be on their way.

    Args:
        stages: of this process.
        behind_caller: the stages begin behind what the caller's streams have so far; and so behind the step before,
            if the caller's streams went on behind that.
    """
    streams = [stage.stream for stage in stages if stage.stream is not None]
    for stream in streams if behind_caller else ():
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    try:
        yield
    finally:
        for stream in streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def hand_to_caller(values: Any, device: torch.device) -> None:
    """Outputs and losses on ``device`` go to the caller, whose stream may read them long after their last reference is
    gone: their memory is free again once it has, and not for the next work of the stage that made them.

    :func:`joined` orders only the other direction, since stages need not wait for the caller.
    """
    here = torch.cuda.current_stream(device)
    for tensor in trees.tensors(values):
        if _is_on_gpu(tensor):
            tensor.record_stream(here)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
