"""State of the random generators of a process: torch's on the CPU and on its stages' GPUs, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from paci_rt.runtime.stage import PipelineStage

Apply = Callable[[], None]


def collect_generators(stages: Sequence[PipelineStage]) -> dict[str, Any]:
    """State of this process's generators, in plain values and tensors."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "cuda": {stage.stage_index: torch.cuda.get_rng_state(stage.device) for stage in _on_gpus(stages)},
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        if kind == "MT19937":  # the one that it has unless somebody changed it
            state["numpy"] = [torch.from_numpy(keys.astype("int64")), position, has_gauss, cached]
    return state


def check_generators(state: Any, stages: Sequence[PipelineStage]) -> Apply:
    """What sets this process's generators to a state of :func:`collect_generators`; nothing changes until it is called.

    Raises:
        ValueError: it is no such state.
    """
    todo: list[Apply] = []
    try:
        own = state["torch"]
        torch.Generator().set_state(own)
        todo.append(lambda: torch.set_rng_state(own))
        version, numbers, gauss = state["python"]
        python = (version, tuple(numbers), gauss)
        random.Random().setstate(python)
        todo.append(lambda: random.setstate(python))
        for stage in _on_gpus(stages):
            todo.append(_on_gpu(stage.device, state["cuda"].get(stage.stage_index)))
        numpy = sys.modules.get("numpy")
        if numpy is not None and "numpy" in state:
            keys, position, has_gauss, cached = state["numpy"]
            legacy = ("MT19937", keys.numpy().astype("uint32"), position, has_gauss, cached)
            numpy.random.RandomState().set_state(legacy)
            todo.append(lambda: numpy.random.set_state(legacy))
    except Exception as error:  # each library has its own for wrong values
        raise ValueError(f"the state of random generators cannot be used ({str(error).splitlines()[0]})") from error

    def take() -> None:
        for one in todo:
            one()

    return take


def _on_gpus(stages: Sequence[PipelineStage]) -> list[PipelineStage]:
    return [stage for stage in stages if stage.device.type == "cuda"]


def _on_gpu(device: torch.device, state: Any) -> Apply:
    if state is None:  # saved on another kind of device
        return lambda: None
    torch.Generator(device).set_state(state)
    return lambda: torch.cuda.set_rng_state(state, device)
