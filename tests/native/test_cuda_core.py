"""The CUDA half of the native core: what can be known without a GPU, and the rest where there is one."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from paci_rt import native
from paci_rt.errors import AccumulatorStateError, CudaError
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.flat import FlatGroup
from support.deadlines import deadline

BUILT = bool(native.info()["cuda"])
DEVICES = native.cuda_devices()[0]
needs_build = pytest.mark.skipif(not BUILT, reason="the core was built without CUDA: PACI_RT_CUDA=on where nvcc is")
needs_none = pytest.mark.skipif(DEVICES > 0, reason="there is a GPU, so nothing is missing")
needs_gpu = pytest.mark.skipif(DEVICES == 0 or not torch.cuda.is_available(), reason="needs a GPU, and torch for it")
SPIN_US = 50_000


def test_cuda_is_built_where_its_compiler_is() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    if "PACI_RT_CUDA=off" in native.cuda_devices()[1]:
        pytest.skip("built with PACI_RT_CUDA=off")
    assert BUILT, f"{nvcc} was there, but the core was built without CUDA: build it again"
    info = native.info()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    assert info["cuda_archs"] == [arch for arch in (80, 90, 100, 120) if f"sm_{arch}" in listed]
    assert float(info["cuda_runtime"]) >= 12


def fat_binary_entries(data: bytes) -> set[tuple[str, int]]:
    """``("sass", 90)`` or ``("ptx", 120)`` for every entry of the fat binaries in a module."""
    magic, entries = struct.pack("<IH", 0xBA55ED50, 1), set()
    for found in re.finditer(re.escape(magic), data):
        header_size, size = struct.unpack_from("<HQ", data, found.start() + 6)
        at, end = found.start() + header_size, found.start() + header_size + size
        while at < end:
            kind, entry_header, entry_size = struct.unpack_from("<HxxIQ", data, at)
            entries.add(({1: "ptx", 2: "sass"}.get(kind, "?"), struct.unpack_from("<I", data, at + 28)[0]))
            at += entry_header + entry_size
    return entries


@needs_build
def test_device_code_of_every_architecture_is_in_the_module() -> None:
    archs = native.info()["cuda_archs"]
    if not archs:
        pytest.skip("the core was built without device code: there was no nvcc that works")
    entries = fat_binary_entries(Path(native.core().__file__).read_bytes())
    assert entries == {*(("sass", arch) for arch in archs), ("ptx", archs[-1])}


@pytest.mark.slow
def test_import_asks_no_driver_and_counting_creates_no_context() -> None:
    code = (
        "import torch\n"
        "driver = lambda: 'libcuda.so' in open('/proc/self/maps').read()\n"
        "before = driver()\n"
        "from paci_rt import native\n"
        "native.info()\n"
        "assert driver() == before, 'the driver was loaded by the import or by info()'\n"
        "count, reason = native.cuda_devices()\n"
        "assert count > 0 or reason, (count, reason)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=deadline(120))


@pytest.mark.skipif(BUILT, reason="this build has the CUDA half")
def test_a_build_without_cuda_says_so() -> None:
    core = native.core()
    for attempt in (
        lambda: core.Stream(0),
        lambda: core.Event(0),
        lambda: core.WeightGate(1, 0),
        lambda: core.Accumulator([(0, 16)], 16, [torch.zeros(16)], 0),
        lambda: core.cuda_spin(0, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"device 0 needs the CUDA half of paci_rt, .* with PACI_RT_CUDA=on"):
            attempt()
    count, reason = native.cuda_devices()
    assert (count, "the native core was built without CUDA (" in reason) == (0, True)
    with pytest.raises(ValueError, match="build it again with PACI_RT_CUDA=on"):
        native.device_code(torch.device("cuda", 0), "parameter 'w'")


@needs_build
@needs_none
def test_without_a_gpu_errors_carry_cudas_words_and_the_remedy() -> None:
    core = native.core()
    for attempt in (
        lambda: native.make_stream(torch.device("cuda", 0)),
        lambda: native.make_event(torch.device("cuda", 0)),
        lambda: native.make_weight_gate(1, torch.device("cuda", 0)),
        lambda: core.Accumulator([(0, 16)], 16, [torch.zeros(16)], 0),
        lambda: core.cuda_fill(0, 0, 64, 1, 0.0),
    ):
        with pytest.raises(CudaError, match=r"device 0 is not usable: .*cudaError\w+ \(\d+\): .*install or update"):
            attempt()
    with pytest.raises(ValueError, match="has neither streams nor events"):
        core.Stream(-1)


def warm_up(device: torch.device) -> None:
    """Kernels are loaded at their first launch, which may wait for those that run."""
    x = torch.zeros(2, 1 << 16, device=device)
    native.core().cuda_fill(device.index, 0, x.data_ptr(), x.numel(), 1.0)
    native.core().cuda_spin(device.index, 0, 1)
    (x.add_(1.0).sum() + x[0].sum()).item()
    x.copy_(x.clone())
    torch.cuda.synchronize()


@pytest.fixture
def device() -> Iterator[torch.device]:
    device = torch.device("cuda", torch.cuda.current_device())
    warm_up(device)
    yield device
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_gpu
def test_owned_streams_are_torchs_too(device: torch.device) -> None:
    stream = native.make_stream(device, priority=-1)
    assert stream.owned and stream.device == device.index
    x = torch.zeros(1000, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle, device)):
        x += 1
    native.core().cuda_fill(device.index, stream, x[:500].data_ptr(), 500, 7.0)
    stream.synchronize()
    assert x.sum().item() == 500 * 7 + 500


@pytest.mark.gpu
@needs_gpu
def test_events_order_torchs_streams(device: torch.device) -> None:
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    event, spin = native.make_event(device), native.core().cuda_spin
    assert event.done
    x = torch.zeros(1 << 20, device=device)
    torch.cuda.synchronize()
    spin(device.index, first, SPIN_US)
    native.core().cuda_fill(device.index, first, x.data_ptr(), x.numel(), 3.0)
    event.record(first)
    assert not event.done
    event.block(second)
    with torch.cuda.stream(second):  # which item() waits for, too
        assert x.sum().item() == 3.0 * x.numel()
    event.synchronize()
    assert event.done


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("buffers", [1, 2])
def test_windows_keep_their_order_with_slow_streams(device: torch.device, buffers: int) -> None:
    """Whichever side is slow: no update reads a window before it is complete, none is overwritten while it is read."""
    group = FlatGroup([("a", nn.Parameter(torch.zeros(300_001, device=device))), ("b", nn.Parameter(
        torch.zeros(7, device=device)))])  # fmt: skip
    accumulator = GradAccumulator(group, buffers=buffers)
    compute, update, core = torch.cuda.Stream(device), torch.cuda.Stream(device), native.core()
    totals = [torch.zeros(2, dtype=torch.float64, device=device) for _ in range(6)]
    seen = [torch.empty(group.numel, device=device) for _ in range(6)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for window in range(6):
        core.cuda_spin(device.index, (compute, update)[window % 2], SPIN_US // 10)
        with torch.cuda.stream(compute):
            assert accumulator.lend([0], stream=compute) == [True]
            accumulator.group.view(accumulator.front_flat, 0).fill_(float(window + 1))
            assert accumulator.lend([0], stream=compute) == [False]
            accumulator.group.view(accumulator.front_flat, 0).add_(1.0)
            totals[window][0].fill_(float(window))
        accumulator.seal(stream=compute, totals=totals[window])
        accumulator.consume(stream=update)
        with torch.cuda.stream(update):
            seen[window].copy_(accumulator.sealed_flat)
        if window == 3:
            assert (accumulator.sum_of_squares, accumulator.nonfinite_count) == (3.0, 0)
        accumulator.release(stream=update)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for window, flat in enumerate(seen):
        assert torch.all(group.view(flat, 0) == window + 2), window
        assert not group.view(flat, 1).any()  # no gradient: cleared at the seal


@pytest.mark.gpu
@needs_gpu
def test_forwards_wait_for_their_bucket_only(device: torch.device) -> None:
    gate = native.make_weight_gate(2, device)
    compute, update, spin = torch.cuda.Stream(device), torch.cuda.Stream(device), native.core().cuda_spin
    weights = torch.zeros(2, 1 << 16, device=device)
    torch.cuda.synchronize()
    gate.claim(update)
    native.core().cuda_fill(device.index, update, weights[0].data_ptr(), weights[0].numel(), 1.0)
    gate.publish(0, update)
    spin(device.index, update, 10 * SPIN_US)
    native.core().cuda_fill(device.index, update, weights[1].data_ptr(), weights[1].numel(), 1.0)
    gate.publish(1, update)
    late = native.make_event(device)
    late.record(update)
    gate.wait(0, compute)
    with torch.cuda.stream(compute):
        assert weights[0].sum().item() == weights[0].numel()
    assert not late.done  # the first layers did not wait for the last
    gate.wait(1, compute)
    with torch.cuda.stream(compute):
        assert weights[1].sum().item() == weights[1].numel()


@pytest.mark.gpu
@needs_gpu
def test_errors_of_real_calls_carry_file_line_and_call(device: torch.device) -> None:
    with pytest.raises(ValueError, match="does not exist: CUDA sees"):
        native.core().Stream(99)
    elsewhere = native.core().Event.borrow(device.index, 1234567)
    del elsewhere  # borrowed: nothing is destroyed
    group = FlatGroup([("a", nn.Parameter(torch.zeros(5, device=device)))])
    accumulator = GradAccumulator(group)
    with pytest.raises(AccumulatorStateError, match="empty -> sealed"):
        accumulator.seal()
    with pytest.raises(ValueError, match=r"are added by paci_rt\.kernels\.accumulate"):
        accumulator.add(0, torch.zeros(5, device=device))
    # Beyond every allocation; in a process of its own, since a GPU that follows host pointers may die of it.
    code = (
        "import torch\n"
        "from paci_rt import native\n"
        "from paci_rt.errors import CudaError\n"
        "address = torch.zeros(64, device='cuda').data_ptr()\n"
        "wild = native.core().Accumulator([(0, 16), (16, 1 << 40)], 1 << 41, [address], torch.cuda.current_device())\n"
        "wild.lend(0, 0, 1)\n"
        "try:\n"
        "    wild.seal(0)\n"
        "except CudaError as error:\n"
        "    print(error, wild.states)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=deadline(120)).stdout
    assert re.search(
        r"cuda_ops\.cpp:\d+: cudaMemsetAsync\(.*\) failed with cudaError\w+ \(\d+\): .*\['filling'\]", said
    )


@pytest.mark.multigpu
@pytest.mark.skipif(DEVICES < 2, reason="needs two GPUs")
def test_the_current_device_stays_and_no_other_gets_a_context() -> None:
    code = (
        "import ctypes\n"
        "import torch\n"
        "from paci_rt import native\n"
        "native.make_stream(torch.device('cuda', 1)).synchronize()\n"
        "native.core().DeviceEngine(1, 0, 2, 5.0).close()\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "driver = ctypes.CDLL('libcuda.so.1')\n"
        "assert driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0\n"
        "assert not active.value, 'device 0 got a context'\n"
        "assert torch.cuda.current_device() == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=deadline(120))
