"""The accumulation kernel and its statistics, interpreted everywhere and for real where there is a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from paci_rt.kernels import FlatLayout, GradientStatistics, accumulate, accumulate_bytes, clip_coefficient
from support.flat_toy import LARGE, LENGTHS, Flat, assert_bits
from support.interpreted import Interpreter
from support.marks import slow

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check_sums(device: str, dtype: torch.dtype, lengths: tuple[int, ...], shift: int) -> None:
    """Several micro-batches: all overwritten, a mix, some absent; bit-equal with a loop over the parameters."""
    flat = Flat(lengths, device)
    front, statistics = flat.poisoned(), GradientStatistics(flat.layout)
    expected = front.clone()
    count = len(lengths)
    flags: list[Any] = [True, False, [position % 2 == 0 for position in range(count)]]
    for number, overwrite in enumerate(flags):
        grads = flat.grads(dtype)
        if shift:  # a gradient inside a larger buffer, at an address that wide loads cannot use
            grads[-1] = torch.randn(lengths[-1] + shift, device=device).to(dtype)[shift:]
        if number == 1:
            grads[2] = None
        accumulate(flat.layout, statistics, front, grads, overwrite=overwrite)
        for position, (part, grad) in enumerate(zip(flat.parts(expected), grads, strict=True)):
            if grad is not None:
                first = overwrite if isinstance(overwrite, bool) else overwrite[position]
                part.copy_(grad.float() if first else part + grad.float())
    assert_bits(front, expected, "sums")
    totals = statistics.totals().tolist()
    square = float(expected.double().square().sum())
    # Non-negative terms, each exact in fp64, added in another order: at most n roundings of 2^-53.
    assert abs(totals[0] - square) <= flat.numel * 2**-53 * square
    assert totals[1] == 0
    assert statistics.totals().tolist() == totals


def check_nonfinite(device: str) -> None:
    flat = Flat(LENGTHS, device)
    front, statistics = flat.poisoned(), GradientStatistics(flat.layout)
    accumulate(flat.layout, statistics, front, flat.grads(torch.float32), overwrite=True)
    assert statistics.totals().tolist()[1] == 0, "what an overwrite replaced was counted"
    grads: list[Any] = [None] * len(LENGTHS)
    grads[2], grads[5] = torch.zeros(LENGTHS[2], device=device), torch.zeros(LENGTHS[5], device=device)
    grads[2][7], grads[2][1023], grads[5][4096] = float("inf"), float("-inf"), float("nan")
    accumulate(flat.layout, statistics, front, grads, overwrite=False)
    square, count = statistics.totals().tolist()
    assert count == 3
    assert math.isnan(square)
    statistics.clear(front, [2, 5])
    square, count = statistics.totals().tolist()
    assert count == 0
    assert math.isclose(square, float(front.double().square().sum()), rel_tol=1e-12)
    assert not flat.parts(front)[2].any()
    # The largest finite values square far beyond fp32.
    huge = [None if n == 0 else torch.full((n,), 3e38, device=device) for n in LENGTHS]
    accumulate(flat.layout, statistics, front, huge, overwrite=True)
    square, count = statistics.totals().tolist()
    assert count == 0
    assert math.isclose(square, float(front.double().square().sum()), rel_tol=1e-12)


def check_signed_zero_and_cache(device: str) -> None:
    flat = Flat((40, 7), device)
    front, statistics = flat.poisoned(), GradientStatistics(flat.layout)
    grads: list[Any] = [torch.full((40,), -0.0, device=device), None]
    accumulate(flat.layout, statistics, front, grads, overwrite=True)
    assert torch.signbit(front[:40]).all(), "an overwrite must not add"
    assert front[32 + 32 :][:7].isnan().all()
    codes = flat.layout.codes(grads, False)
    first = flat.layout.entries(grads, codes)
    assert flat.layout.entries(grads, codes).table is first.table
    assert flat.layout.entries(grads, flat.layout.codes(grads, True)).table is not first.table
    assert first.table is not None
    assert first.table.tolist() == [grads[0].data_ptr(), 0]
    # An address that was a gradient's of another dtype: freed memory comes back so.
    pattern = torch.full((40,), 1.5, device=device)
    for grad in (pattern.view(torch.bfloat16)[:40], pattern):
        accumulate(flat.layout, statistics, front, [grad, None], overwrite=True)
        assert torch.equal(front[:40], grad.float())
    many = Flat(tuple([3] * 70), device)  # more than one launch writes the table
    grads = many.grads(torch.bfloat16)
    table = many.layout.entries(grads, many.layout.codes(grads, True)).table
    assert table is not None
    assert table.tolist() == [grad.data_ptr() + 1 for grad in grads]


def check_clip(device: str) -> None:
    flat = Flat(LENGTHS, device)
    front, statistics = flat.poisoned(), GradientStatistics(flat.layout)
    grads = flat.grads(torch.float32)
    accumulate(flat.layout, statistics, front, grads, overwrite=True)
    norm = float(torch.cat([grad for grad in grads if grad is not None]).double().norm()) / 4
    for limit in (0.1, 1e6):
        got = clip_coefficient([statistics.totals()], limit, divisor=-4)
        assert got.shape == (1,)
        assert got.dtype is torch.float32
        assert math.isclose(got.item(), min(1.0, limit / (norm + 1e-6)), rel_tol=1e-6)  # rounded to fp32


def check_compiled(device: str) -> None:
    """Under torch.compile, without a graph break, with the bits of the plain call."""
    flat = Flat(LENGTHS, device)
    grads: list[Any] = flat.grads(torch.bfloat16)
    grads[1] = None
    fronts = [flat.poisoned(), flat.poisoned()]
    totals = []
    for number, front in enumerate(fronts):
        statistics = GradientStatistics(flat.layout)

        def run(front: torch.Tensor, statistics: GradientStatistics = statistics) -> torch.Tensor:
            accumulate(flat.layout, statistics, front, grads, overwrite=True)
            accumulate(flat.layout, statistics, front, grads, overwrite=False)
            return statistics.totals()

        call = torch.compile(run, backend="aot_eager", fullgraph=True) if number else run
        totals.append(call(front).tolist())
    assert_bits(fronts[1], fronts[0], "compiled")
    assert totals[0] == totals[1]


def check_limits(device: str) -> None:
    flat = Flat((40, 7), device)
    front, statistics = flat.random(), GradientStatistics(flat.layout)
    grads = flat.grads(torch.float32)
    accumulate(flat.layout, statistics, front, [None, None], overwrite=True)  # nothing to do

    def refused(match: str, grads: list[Any], front: torch.Tensor = front, overwrite: Any = False) -> None:
        with pytest.raises(ValueError, match=match):
            accumulate(flat.layout, statistics, front, grads, overwrite=overwrite)

    refused("1 gradients and 2 overwrite flags for 2 parameters", grads[:1])
    refused("1 overwrite flags", grads, overwrite=[True])
    refused("parameter 1 has 8 elements, the parameter 7", [grads[0], torch.zeros(8, device=device)])
    refused("make one call for each dtype", [grads[0], torch.zeros(7, dtype=torch.float16, device=device)])
    refused("torch.float64: use torch.bfloat16", [grad.double() for grad in grads if grad is not None])
    refused("call .contiguous()", [torch.zeros(80, device=device)[::2], None])
    refused("must be torch.float32", grads, front.half())
    refused("as long as the layout, 96 elements", grads, front[:64])
    refused("a multiple of 16", grads, torch.zeros(97, device=device)[1:])
    other = GradientStatistics(Flat((40, 7), device).layout)
    with pytest.raises(ValueError, match="belong to another layout"):
        accumulate(flat.layout, other, front, grads, overwrite=True)
    with pytest.raises(ValueError, match="divisor not 0"):
        clip_coefficient([statistics.totals()], 1.0, 0.0)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_a_loop(interpreter: Interpreter, dtype: torch.dtype, shift: int) -> None:
    interpreter(check_sums, "cpu", dtype, LENGTHS, shift)


CHECKS = [check_nonfinite, check_signed_zero_and_cache, check_clip, check_limits, check_compiled]
SLOW = (check_compiled,)


@pytest.mark.parametrize("check", [slow(check) if check in SLOW else check for check in CHECKS])
def test_statistics_tables_and_limits(interpreter: Interpreter, check: Any) -> None:
    interpreter(check, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_on_a_gpu(dtype: torch.dtype, shift: int, lengths: tuple[int, ...]) -> None:
    check_sums("cuda", dtype, lengths, shift)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_statistics_tables_and_limits_on_a_gpu(check: Any) -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_captured_graph_adds_again_with_every_replay() -> None:
    flat = Flat(LARGE, "cuda")
    front, statistics, grads = flat.random(), GradientStatistics(flat.layout), flat.grads(torch.bfloat16)
    accumulate(flat.layout, statistics, front, grads, overwrite=True)  # compiles, as the next call does
    statistics.totals()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accumulate(flat.layout, statistics, front, grads, overwrite=False)
        totals = statistics.totals()
    front.zero_()
    for _ in range(3):
        graph.replay()
    for part, grad in zip(flat.parts(front), grads, strict=True):
        assert grad is not None
        assert torch.equal(part, grad.float() + grad.float() + grad.float())
    square = float(front.double().square().sum())
    assert abs(totals[0].item() - square) <= flat.numel * 2**-53 * square


@pytest.mark.gpu
def test_another_stream_gets_a_table_of_its_own() -> None:
    """One that was only just issued on another stream may not be written yet."""
    flat = Flat((40, 7), "cuda")
    grads = flat.grads(torch.bfloat16)
    codes = flat.layout.codes(grads, False)
    first = flat.layout.entries(grads, codes)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert flat.layout.entries(grads, codes).table is not first.table
    assert flat.layout.entries(grads, codes).table is first.table


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    flat = Flat(LARGE, "cuda")
    front, statistics, grads = flat.random(), GradientStatistics(flat.layout), flat.grads(torch.bfloat16)
    accumulate(flat.layout, statistics, front, grads, overwrite=True)
    statistics.totals()
    fresh = [grad.clone() for grad in grads if grad is not None]
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate(flat.layout, statistics, front, fresh, overwrite=False)
        clip_coefficient([statistics.totals()], 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layout_needs_a_gpu_and_room() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="move it to 'cuda', or set TRITON_INTERPRET=1"):
        FlatLayout([(0, 5)], 16, cpu)


def check_layouts(device: str) -> None:
    where = torch.device(device)
    for segments, numel, match in [
        ([(8, 5)], 64, "offset 8 and length 5: offsets must be multiples of 16"),
        ([(0, 17), (16, 4)], 64, "must not overlap"),
        ([(0, 17)], 17, "take 32 elements, the flat buffers have 17"),
        ([(0, 0)], 0, "every segment given is empty"),
        ([(0, -1)], 16, "lengths not negative"),
    ]:
        with pytest.raises(ValueError, match=match):
            FlatLayout(segments, numel, where)
    assert FlatLayout([(32, 4), (0, 5)], 64, where).ranges == ((0, 1), (1, 2))
    # Names of a device that no tensor's has: "cuda", and on the CPU the one with a number.
    where = torch.device("cpu", 0) if device == "cpu" else torch.device("cuda")
    layout = FlatLayout([(0, 5)], 16, where)
    front, grad = torch.zeros(16, device=where), torch.ones(5, device=where)
    assert front.device != where and layout.device == front.device
    accumulate(layout, GradientStatistics(layout), front, [grad], overwrite=True)
    assert torch.equal(front[:5], grad)


@pytest.mark.gpu
def test_layouts_that_cannot_be_on_a_gpu() -> None:
    check_layouts("cuda")


def test_layouts_that_cannot_be(interpreter: Interpreter) -> None:
    interpreter(check_layouts, "cpu")


def test_bytes() -> None:
    assert accumulate_bytes(1, torch.bfloat16, overwrite=False) == 10
    assert accumulate_bytes(1, torch.float16, overwrite=True) == 6
    assert accumulate_bytes(2, torch.float32, overwrite=False) == 24
