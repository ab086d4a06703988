"""The border to the native core, and what holds for all of its kernels: conversions, instruction sets, threads."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from paci_rt import native
from paci_rt.errors import NativeCoreError
from paci_rt.optim import steps_native
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.flat import FlatGroup

ISAS = native.info()["isas"]


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    native.set_isa("auto")
    native.set_num_threads(None)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to the bit, except that any NaN equals any NaN."""
    equal = (bits(ours) == bits(theirs)) | (ours.isnan() & theirs.isnan())
    return bool(equal.all())


def random_floats(count: int) -> Tensor:
    """Every kind of float: random bit patterns."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32).view(torch.float32)


def accumulate(grads: list[Tensor], param_dtype: torch.dtype = torch.float32) -> Tensor:
    group = FlatGroup([("w", nn.Parameter(torch.zeros(grads[0].shape, dtype=param_dtype)))])
    accumulator = GradAccumulator(group)
    for grad in grads:
        accumulator.add(0, grad)
    accumulator.seal()
    accumulator.consume()
    return accumulator.sealed_view(0)


def rounded_by_native(master: Tensor, dtype: torch.dtype) -> Tensor:
    """``master`` as the update writes it into a bf16/fp16 parameter: a step of SGD with learning rate 0."""
    weight = torch.full(master.shape, 7.0, dtype=dtype)
    steps_native.sgd_step(
        master=master,
        weight=weight,
        grad_sum=torch.zeros_like(master),
        momentum_buffer=None,
        pieces=[(0, master.numel(), 1)],
        lr=0.0,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        divisor=1,
    )
    return weight


def test_baseline_is_always_there() -> None:
    info = native.info()
    assert info["available"]
    assert info["error"] is None
    assert ISAS[0] == "baseline"
    assert info["isa"] == ISAS[-1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_widens_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    native.set_isa(isa)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same_values(accumulate([values]), values.float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_round_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    native.set_isa(isa)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    above = torch.nextafter(every, torch.full_like(every, torch.inf))
    ties = (every[:-1] + every[1:]) / 2
    for master in (random_floats(100_003), every, above, ties, torch.nextafter(ties, torch.zeros_like(ties))):
        # Random patterns hold NaN and infinity; 0 * inf in the update turns an infinity into NaN.
        master = torch.where(master.isinf(), 1e30, master)
        assert same_values(rounded_by_native(master.clone(), dtype), master.to(dtype))


def _all_kernels(threads: int) -> list[Tensor]:
    """Results of every kernel on odd sizes that span several chunks, with non-round scalars."""
    native.set_num_threads(threads)
    generator = torch.Generator().manual_seed(5)
    n = 3 * 16384 + 77
    grads = [torch.randn(n, generator=generator).to(d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    total = accumulate(grads)
    group = FlatGroup([("w", nn.Parameter(torch.zeros(n)))])
    accumulator = GradAccumulator(group)
    for grad in grads:
        accumulator.add(0, grad)
    accumulator.seal()
    out = [total.clone(), torch.tensor([accumulator.sum_of_squares], dtype=torch.float64).view(torch.float32)]
    for dtype in (None, torch.bfloat16, torch.float16):
        master = torch.randn(n, generator=generator)
        weight = None if dtype is None else torch.empty(n, dtype=dtype)
        moments = [torch.randn(n, generator=generator), torch.rand(n, generator=generator)]
        buffer = torch.randn(n, generator=generator)
        shared = {"master": master, "weight": weight, "grad_sum": total, "pieces": [(0, n - 40, 3), (n - 40, 40, 1)]}
        steps_native.adamw_step(
            **shared, exp_avg=moments[0], exp_avg_sq=moments[1], lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
            weight_decay=0.1, divisor=3,
        )  # fmt: skip
        steps_native.adamw_step(
            **shared, exp_avg=moments[0], exp_avg_sq=moments[1], lr=1e-3, betas=(0.6, 0.95), eps=1e-8,
            weight_decay=0.1, divisor=-4, step_sizes=[(1e-3, 3e-4), (2e-3, 5e-3)],
        )  # fmt: skip
        steps_native.lion_step(
            **shared, exp_avg=buffer, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, divisor=5, clip=0.3
        )
        steps_native.sgd_step(
            **shared, momentum_buffer=buffer, lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.1, nesterov=True,
            divisor=-7,
        )  # fmt: skip
        out += [master, *moments, buffer, *([] if weight is None else [weight])]
    return out


@pytest.mark.parametrize(("isa", "threads"), [(isa, threads) for isa in ISAS for threads in (1, 2, 5)])
def test_results_depend_on_neither_instruction_set_nor_threads(isa: str, threads: int) -> None:
    native.set_isa("baseline")
    expected = _all_kernels(1)
    native.set_isa(isa)
    for ours, theirs in zip(_all_kernels(threads), expected, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def test_callers_from_several_threads_share_the_workers() -> None:
    native.set_num_threads(3)
    grads = [torch.randn(100_003) for _ in range(4)]

    def work(grad: Tensor) -> bool:
        return all(torch.equal(accumulate([grad, grad, grad]), grad + grad + grad) for _ in range(25))

    with ThreadPoolExecutor(len(grads)) as callers:
        assert all(callers.map(work, grads))


def test_kernels_work_after_a_fork() -> None:
    native.set_num_threads(3)
    group = FlatGroup([("w", nn.Parameter(torch.zeros(200_000)))])
    accumulator, grad = GradAccumulator(group), torch.ones(200_000)
    accumulator.add(0, grad)  # starts this process's workers
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        accumulator.add(0, grad)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_threads_follow_torch_until_set() -> None:
    assert native.get_num_threads() == torch.get_num_threads()
    native.set_num_threads(3)
    assert native.get_num_threads() == 3
    native.set_num_threads(None)
    assert native.get_num_threads() == torch.get_num_threads()
    with pytest.raises(ValueError, match="threads=0"):
        native.set_num_threads(0)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r'"sse9" is not usable on this CPU: choose one of auto, baseline'):
        native.set_isa("sse9")


def test_absent_core_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_core", None)
    monkeypatch.setattr(native, "_import_error", ImportError("no module"))
    with pytest.raises(NativeCoreError, match=r"pip install -e \."):
        native.core()
    assert native.info()["available"] is False


def test_stream_handles() -> None:
    class Method:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, 41)

    class Attribute:
        __cuda_stream__ = (0, 42)

    class OldTorch:
        cuda_stream = 43

    class OldCuPy:
        ptr = 44

        def wait_event(self, event: object) -> None: ...

    class Memory:
        ptr = 45

    core = native.core()
    ops = native.testing().HostTwin()
    for stream, handle in ((0, 0), (7, 7), (Method(), 41), (Attribute(), 42), (OldTorch(), 43), (OldCuPy(), 44)):
        assert native.stream_handle(stream) == core.Stream.borrow(0, stream, ops).handle == handle
    for take in (native.stream_handle, lambda stream: core.Stream.borrow(0, stream, ops)):
        with pytest.raises(TypeError, match="'default' is no stream"):
            take("default")
        with pytest.raises(TypeError, match=r"Memory object.*is no stream"):
            take(Memory())


def test_cpu_refuses_other_devices_and_streams() -> None:
    with pytest.raises(ValueError, match="works on the CPU only"):
        native.device_code(torch.device("meta"), "parameter 'w'")
    master = torch.zeros(4)
    with pytest.raises(ValueError, match="stream 9 was passed for work on the CPU"):
        steps_native.sgd_step(
            master=master, weight=None, grad_sum=master, momentum_buffer=None, pieces=[(0, 4, 1)], lr=1.0, momentum=0.0,
            dampening=0.0, weight_decay=0.0, nesterov=False, divisor=1, stream=9,
        )  # fmt: skip


def test_core_checks_its_arguments() -> None:
    accumulator = native.core().Accumulator
    flat = native.empty_flat(32, torch.float32, torch.device("cpu"))
    four = torch.zeros(4)
    with pytest.raises(ValueError, match="1 or 2 buffers, got 3"):
        accumulator([(0, 4)], 16, [flat, flat, flat])
    with pytest.raises(ValueError, match="not aligned to 64 bytes"):
        accumulator([(0, 4)], 16, [flat[1:]])
    with pytest.raises(ValueError, match="overlaps"):
        accumulator([(0, 4), (3, 4)], 16, [flat])
    with pytest.raises(ValueError, match="beyond the buffer of 16"):
        accumulator([(0, 4), (16, 4)], 16, [flat])
    with pytest.raises(ValueError, match="a buffer has 64 bytes, and 32 elements of 4"):
        accumulator([(0, 4)], 32, [flat[:16]])
    with pytest.raises(ValueError, match="dtype code 5"):
        accumulator([(0, 4)], 16, [flat]).add(0, four, 5, 4, 0, 1)
    with pytest.raises(ValueError, match="segment 1 does not exist"):
        accumulator([(0, 4)], 16, [flat]).add(1, four, 0, 4, 0, 1)
    with pytest.raises(ValueError, match="3 elements was given for segment 0 of 4"):
        accumulator([(0, 4)], 16, [flat]).add(0, four, 0, 3, 0, 1)
    with pytest.raises(ValueError, match="the gradient has 12 bytes, and 4 elements of 4"):
        accumulator([(0, 4)], 16, [flat]).add(0, torch.zeros(3), 0, 4, 0, 1)
    with pytest.raises(TypeError, match="of type int was passed for memory"):
        accumulator([(0, 4)], 16, [flat]).add(0, flat.data_ptr(), 0, 4, 0, 1)


def test_flat_memory_is_zeroed_and_aligned() -> None:
    for numel in (1, 100, 3_000_000):
        tensor = native.empty_flat(numel, torch.float32, torch.device("cpu"))
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
