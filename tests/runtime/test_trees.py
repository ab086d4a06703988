"""Batches on their way to a device, without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paci_rt.runtime import trees
from paci_rt.runtime.stage_runtime import moved
from paci_rt.transport.base import Message

GPU = torch.device("cuda", 0)


class OnGpu(Tensor):
    """Says that it is on a GPU, and remembers the streams that it was kept for."""

    streams: list[Any]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


def on_gpu() -> OnGpu:
    tensor = torch.zeros(2).as_subclass(OnGpu)
    tensor.streams = []
    return tensor


def test_inputs_on_a_gpu_stay_until_the_stage_has_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of the stage", device))
    x, mask = on_gpu(), on_gpu()
    value = {"x": (x, 3), "mask": [mask]}
    assert trees.on_device(value, torch.device("cpu")) is value and x.streams == []
    there = trees.on_device(value, GPU)
    assert there["x"][0] is x and there["mask"][0] is mask and there["x"][1] == 3
    assert x.streams == mask.streams == [("stream of the stage", GPU)]


def test_tensors_are_found_wherever_they_are() -> None:
    here, there = torch.zeros(1), on_gpu()
    assert list(trees.tensors([here, {"a": (there, None)}, 5])) == [here, there]
    assert trees.on_gpu({"a": [here, (there,)]}) and not trees.on_gpu([here, 1.0, None])


def test_a_message_goes_to_the_device_of_its_stage() -> None:
    message = Message((torch.zeros(3), None), (True, False))
    assert moved(message, torch.device("cpu")) is message
    there = moved(message, torch.device("meta"))
    assert there.tensors[0] is not None and there.tensors[0].device.type == "meta" and there.tensors[1] is None
    assert there.tensors[0].shape == (3,) and there.requires_grad == (True, False)
