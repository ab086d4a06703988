"""Memory that other libraries share with paci_rt: NumPy here, CuPy where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import native
from paci_rt.interop import borrow
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.flat import FlatGroup

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def group(dtype: torch.dtype = torch.float32, device: str = "cpu") -> FlatGroup:
    torch.manual_seed(0)
    shapes = (("a", (5, 7)), ("b", (3,)))
    return FlatGroup([(name, nn.Parameter(torch.randn(shape).to(device, dtype))) for name, shape in shapes])


# --- out ---


def test_numpy_sees_weights_and_sums_where_they_are() -> None:
    flat = group()
    accumulator = GradAccumulator(flat)
    weight, sums = numpy.from_dlpack(flat.weight), numpy.from_dlpack(accumulator.front_flat)
    assert (weight.ctypes.data, sums.ctypes.data) == (flat.weight.data_ptr(), accumulator.front_flat.data_ptr())
    accumulator.add(0, torch.full((5, 7), 2.0))
    assert (sums[:35] == 2.0).all()  # written after the exchange
    before = flat.params[1].detach().clone()
    weight[flat.offsets[1]] += 1.0
    assert flat.params[1][0].item() == before[0].item() + 1.0
    sealed = accumulator
    sealed.seal()
    sealed.consume()
    assert numpy.from_dlpack(sealed.sealed_view(0)).ctypes.data == sums.ctypes.data


def test_numpy_sees_optimizer_state_and_masters_where_they_are() -> None:
    param = nn.Parameter(torch.randn(40).bfloat16())
    optimizer = paci_rt.AdamW([param], lr=0.1)
    bound = bind_optimizer(optimizer, {"w": param})
    bound.accumulate(param, torch.ones(40).bfloat16())
    bound.update(1)
    state = optimizer.state[param]
    views = {name: numpy.from_dlpack(state[name]) for name in ("exp_avg", "exp_avg_sq", "master")}
    before = views["exp_avg"].copy()
    bound.accumulate(param, torch.ones(40).bfloat16())
    bound.update(1)
    for name, view in views.items():
        assert view.ctypes.data == state[name].data_ptr()
    assert (views["exp_avg"] > before).all()  # the second update's moments, in the same memory
    # NumPy has no bf16: its bits go as integers.
    bits = numpy.from_dlpack(param.detach().view(torch.uint16))
    assert bits.ctypes.data == param.data_ptr()
    rounded = views["master"].astype(numpy.float32).view(numpy.uint32)
    assert (bits == ((rounded + 0x7FFF + ((rounded >> 16) & 1)) >> 16)).all()


# --- in ---


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16])
def test_gradients_of_another_library_are_accumulated(dtype: Any) -> None:
    flat = group(torch.float32 if dtype is numpy.float32 else torch.float16)
    accumulator = GradAccumulator(flat)
    grads = [numpy.random.default_rng(seed).standard_normal((5, 7)).astype(dtype) for seed in range(2)]
    for grad in grads:
        tensor = borrow(grad)
        assert tensor.data_ptr() == grad.ctypes.data
        accumulator.add(0, tensor)
    expected = grads[0].astype(numpy.float32) + grads[1].astype(numpy.float32)
    assert numpy.array_equal(numpy.from_dlpack(flat.view(accumulator.front_flat, 0)), expected)


def test_gradients_that_do_not_fit_are_refused() -> None:
    accumulator = GradAccumulator(group())
    for grad, words in (
        (numpy.zeros((5, 7)), "dtype torch.float64: use torch.float32"),
        (numpy.zeros((5, 7), dtype=numpy.int32), "dtype torch.int32"),
        (numpy.zeros((7, 5), dtype=numpy.float32), r"shape \(7, 5\), the parameter \(5, 7\)"),
    ):
        with pytest.raises(ValueError, match=words):
            accumulator.add(0, borrow(grad))
    assert accumulator.state == "empty"


class Elsewhere:
    """An array on a device that is not here."""

    def __init__(self, device: tuple[int, int]) -> None:
        self._device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("not asked for: the device had been refused")


def test_arrays_that_cannot_be_borrowed_are_refused() -> None:
    good = numpy.zeros(4, dtype=numpy.float32)
    for array, options, words in (
        ([1.0, 2.0], {}, "the gradient is a list: pass a torch tensor, or an array with __dlpack__"),
        (Elsewhere((2, 1)), {"device": "cpu"}, "the gradient is on cuda:1, and cpu is asked for"),
        (Elsewhere((2, 1)), {"device": "cuda:0"}, "the gradient is on cuda:1, and cuda:0 is asked for"),
        (Elsewhere((10, 0)), {}, "is on DLPack device 10, number 0: move it"),
        (good, {"device": "cuda"}, "the gradient is on cpu, and cuda is asked for"),
        (torch.zeros(2), {"device": "meta"}, "the gradient is on cpu, and meta is asked for"),
        (good[::-1], {}, r"has strides \(-4,\): make it contiguous"),
        (good.astype(">f4"), {}, r"dtype >f4 cannot be handed over by DLPack \(.*\): copy it"),
        (numpy.array(["a"]), {}, "cannot be handed over by DLPack"),
    ):
        with pytest.raises(ValueError, match=words):
            borrow(array, what="the gradient", **options)
    assert borrow(good, device="cpu").data_ptr() == good.ctypes.data
    assert borrow(good[::2]).stride() == (2,)
    tensor = torch.zeros(2)
    assert borrow(tensor, device="cpu") is tensor


def test_the_pages_example_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "use" / "interop.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})


# --- on a GPU ---


@pytest.mark.gpu
@on_gpu
def test_cupy_sees_the_same_memory_and_gives_gradients_back() -> None:
    cupy = pytest.importorskip("cupy")
    flat = group(device="cuda")
    accumulator = GradAccumulator(flat, buffers=2)
    weight, sums = cupy.from_dlpack(flat.weight), cupy.asarray(accumulator.front_flat)  # DLPack, CUDA array interface
    assert (weight.data.ptr, sums.data.ptr) == (flat.weight.data_ptr(), accumulator.front_flat.data_ptr())
    weight += 1.0
    expected = group().weight + 1.0
    assert torch.equal(flat.weight.cpu()[:35], expected[:35])
    from paci_rt import kernels

    layout = kernels.FlatLayout(flat.segments, flat.numel, flat.device)
    statistics = kernels.GradientStatistics(layout)
    rng = numpy.random.default_rng(0)
    host = [rng.standard_normal(shape).astype(numpy.float32) for shape in ((5, 7), (3,))]
    grads: list[Any] = [borrow(cupy.asarray(grad), device="cuda") for grad in host]
    flags = accumulator.lend([0, 1], stream=torch.cuda.current_stream())
    kernels.accumulate(layout, statistics, accumulator.front_flat, grads, overwrite=flags)
    for position, grad in enumerate(host):
        assert numpy.array_equal(cupy.asnumpy(cupy.from_dlpack(flat.view(accumulator.front_flat, position))), grad)
    assert cupy.array_equal(sums[:35].reshape(5, 7), cupy.asarray(host[0]))
    with pytest.raises(ValueError, match="the gradient is on cuda:0, and cpu is asked for"):
        borrow(cupy.zeros(3), device="cpu", what="the gradient")


@pytest.mark.gpu
@on_gpu
def test_cupys_streams_order_work() -> None:
    cupy = pytest.importorskip("cupy")
    mine, theirs = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    assert native.stream_handle(theirs) == theirs.ptr
    x = torch.zeros(1 << 16, device="cuda")
    torch.cuda.synchronize()
    event = native.make_event(torch.device("cuda", torch.cuda.current_device()))
    native.core().cuda_spin(torch.cuda.current_device(), theirs, 50_000)
    with theirs:
        cupy.from_dlpack(x).fill(3.0)
    event.record(theirs)
    event.block(mine)
    with torch.cuda.stream(mine):  # which item() waits for, too
        assert x.sum().item() == 3.0 * x.numel()


@pytest.mark.gpu
@on_gpu
def test_a_borrowed_array_is_complete_when_it_is_read() -> None:
    """DLPack's stream argument: what CuPy has issued on its stream comes before what torch issues on its own."""
    cupy = pytest.importorskip("cupy")
    theirs, mine = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
    with theirs:
        array = cupy.zeros(1 << 16, dtype=cupy.float32)
        native.core().cuda_spin(torch.cuda.current_device(), theirs, 50_000)
        array.fill(2.0)
        with torch.cuda.stream(mine):
            assert borrow(array).sum().item() == 2.0 * array.size
