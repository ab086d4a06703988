"""The double buffer: sums, statistics and the state machine."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from paci_rt import native
from paci_rt.errors import AccumulatorStateError
from paci_rt.optim import accumulator
from paci_rt.optim.accumulator import GradAccumulator, merged_is_exact
from paci_rt.optim.flat import FlatGroup

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (15,), (16,), (17, 3), (257,), (130, 127), (3, 5, 7), ()]


def make(shapes: list[tuple[int, ...]] = SHAPES, buffers: int = 1) -> GradAccumulator:
    group = FlatGroup([(f"p{i}", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)])
    accumulator = GradAccumulator(group, buffers=buffers)
    for tensor in accumulator._tensors:
        tensor.fill_(math.nan)  # whatever is read without having been written shows
    return accumulator


def finish(accumulator: GradAccumulator) -> list[Tensor]:
    accumulator.seal()
    accumulator.consume()
    sums = [accumulator.sealed_view(i).clone() for i in range(len(accumulator.group.params))]
    accumulator.release()
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buffers", [1, 2])
def test_sums_equal_torch_to_the_bit(dtype: torch.dtype, buffers: int) -> None:
    accumulator = make(buffers=buffers)
    for _window in range(3):  # the second and third overwrite what the first left
        grads = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(4)]
        for micro_batch in grads:
            for index, grad in enumerate(micro_batch):
                accumulator.add(index, grad)
        for index, total in enumerate(finish(accumulator)):
            expected = grads[0][index].float()
            for micro_batch in grads[1:]:
                expected.add_(micro_batch[index])
            assert total.dtype == torch.float32
            assert torch.equal(total, expected)


def test_gradients_of_several_dtypes_mix() -> None:
    accumulator = make([(40,)])
    grads = [torch.randn(40).to(dtype) for dtype in DTYPES]
    for grad in grads:
        accumulator.add(0, grad)
    assert torch.equal(finish(accumulator)[0], grads[0] + grads[1].float() + grads[2].float())


def test_a_large_first_gradient_may_bypass_the_cache() -> None:
    numel = (64 << 18) + 37  # just over the size from which overwrites use streaming stores
    accumulator = make([(5,), (numel,)])
    grad = torch.randn(numel).bfloat16()
    accumulator.add(1, grad)
    accumulator.seal()
    accumulator.consume()
    assert torch.equal(accumulator.sealed_view(1), grad.float())


def test_strides_do_not_matter() -> None:
    accumulator = make([(6, 4)])
    grad = torch.randn(4, 6).t()
    accumulator.add(0, grad)
    accumulator.add(0, torch.randn(1, 4).expand(6, 4) * 0 + 1.0)
    accumulator.add(0, torch.ones(1, 1).expand(6, 4))
    assert torch.equal(finish(accumulator)[0], grad + 1.0 + 1.0)


def test_parameters_without_a_gradient_read_as_zero() -> None:
    accumulator = make([(5,), (600,), (9,)])
    accumulator.add(0, torch.ones(5))
    accumulator.seal()
    accumulator.consume()
    assert accumulator.touched == (True, False, False)
    assert not accumulator.sealed_view(1).any()
    assert not accumulator.sealed_view(2).any()
    accumulator.release()
    accumulator.add(2, torch.ones(9))  # the next window remembers nothing of the last
    accumulator.seal()
    assert accumulator.touched == (False, False, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_squares_is_that_of_the_sum(dtype: torch.dtype) -> None:
    accumulator = make()
    for _ in range(3):
        for index, shape in enumerate(SHAPES):
            accumulator.add(index, torch.randn(shape).to(dtype))
    accumulator.seal()
    squares, nonfinite = accumulator.sum_of_squares, accumulator.nonfinite_count
    accumulator.consume()
    assert accumulator.sum_of_squares == squares
    expected = sum(accumulator.sealed_view(i).double().square().sum().item() for i in range(len(SHAPES)))
    # Both are sums in double of the same exact squares; only the order differs.
    assert abs(squares - expected) <= 1e-12 * expected
    assert nonfinite == 0


def test_huge_and_tiny_values_neither_overflow_nor_vanish() -> None:
    accumulator = make([(20,), (20,)])
    accumulator.add(0, torch.full((20,), 3e38))
    accumulator.seal()
    assert accumulator.sum_of_squares == pytest.approx(20 * float(torch.tensor(3e38)) ** 2, rel=1e-12)
    assert accumulator.nonfinite_count == 0
    accumulator.consume()
    accumulator.release()
    accumulator.add(1, torch.full((20,), 1e-30))
    accumulator.seal()
    assert accumulator.sum_of_squares == pytest.approx(20 * float(torch.tensor(1e-30)) ** 2, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_elements_of_the_sum_are_counted(dtype: torch.dtype) -> None:
    accumulator = make([(40_000,), (33,)])
    poisoned = torch.randn(40_000).to(dtype)
    poisoned[[0, 17, 16_384, 39_999]] = torch.tensor([math.inf, math.nan, -math.inf, math.inf], dtype=dtype)
    accumulator.add(0, poisoned)
    accumulator.add(0, torch.randn(40_000).to(dtype))  # they stay
    last = torch.zeros(33, dtype=dtype)
    last[32] = math.nan
    accumulator.add(1, last)
    accumulator.seal()
    assert accumulator.nonfinite_count == 5
    assert not math.isfinite(accumulator.sum_of_squares)
    accumulator.consume()
    accumulator.release()
    accumulator.add(0, torch.randn(40_000).to(dtype))  # and are gone with their window
    accumulator.seal()
    assert accumulator.nonfinite_count == 0


VERBS = {
    "add": lambda accumulator: accumulator.add(0, torch.ones(8)),
    "seal": lambda accumulator: accumulator.seal(),
    "consume": lambda accumulator: accumulator.consume(),
    "release": lambda accumulator: accumulator.release(),
}
PATH = {"empty": [], "filling": ["add"], "sealed": ["add", "seal"], "consuming": ["add", "seal", "consume"]}
LEGAL = {("empty", "add"), ("filling", "add"), ("filling", "seal"), ("sealed", "consume"), ("consuming", "release")}
TO = {"add": "filling", "seal": "sealed", "consume": "consuming", "release": "empty"}


@pytest.mark.parametrize("state", PATH)
@pytest.mark.parametrize("verb", VERBS)
def test_transitions_of_one_buffer(state: str, verb: str) -> None:
    accumulator = make([(8,)])
    for step in PATH[state]:
        VERBS[step](accumulator)
    assert accumulator.states == (state,)
    if (state, verb) in LEGAL:
        VERBS[verb](accumulator)
        assert accumulator.state == TO[verb]
    else:
        with pytest.raises(AccumulatorStateError, match=f"{state} -> {TO[verb]} is not a legal transition"):
            VERBS[verb](accumulator)
        assert accumulator.states == (state,)


def test_two_buffers_fill_and_drain_in_any_order() -> None:
    """Random interleavings against a model: a front that fills, a back that is read, each window summed apart."""
    rng = random.Random()
    for _ in range(30):
        accumulator = make([(19,)], buffers=2)
        front, back, consuming = None, None, False
        for _ in range(60):
            verb = rng.choice(["add", "add", "seal", "consume", "release"])
            legal = {
                "add": True,
                "seal": front is not None and back is None,
                "consume": back is not None and not consuming,
                "release": consuming,
            }[verb]
            grad = torch.randn(19)
            if not legal:
                with pytest.raises(AccumulatorStateError):
                    VERBS[verb](accumulator)
                continue
            if verb == "add":
                accumulator.add(0, grad)
                front = grad.clone() if front is None else front + grad
            elif verb == "seal":
                accumulator.seal()
                front, back = None, front
            elif verb == "consume":
                accumulator.consume()
                consuming = True
            else:
                accumulator.release()
                back, consuming = None, False
            if consuming:
                assert torch.equal(accumulator.sealed_view(0), back)


def test_reading_needs_a_finished_window() -> None:
    accumulator = make([(8,)])
    accumulator.add(0, torch.ones(8))
    for read in ("sum_of_squares", "nonfinite_count", "touched"):
        with pytest.raises(AccumulatorStateError, match="sealed or consuming; this accumulator's front is filling"):
            getattr(accumulator, read)
    accumulator.seal()
    with pytest.raises(AccumulatorStateError, match="no buffer is being consumed"):
        accumulator.sealed_view(0)


def test_many_segments_are_lent_at_once() -> None:
    accumulator = make([(4,), (600,), (3,)])
    accumulator.add(1, torch.ones(600))
    assert accumulator.lend([0, 1]) == [True, False]
    accumulator.group.view(accumulator.front_flat, 0).fill_(2.0)
    accumulator.group.view(accumulator.front_flat, 1).add_(1.0)
    assert accumulator.lend([0]) == [False]
    with pytest.raises(ValueError, match="segment 3 does not exist: the group has 3"):
        accumulator.lend([2, 3])
    assert accumulator.sums()[1] == (True, True, False)  # a refused call touches nothing
    accumulator.seal()
    assert accumulator.sum_of_squares == 4 * 4 + 600 * 4
    with pytest.raises(AccumulatorStateError, match="sealed -> filling"):
        accumulator.lend([0])
    with pytest.raises(AccumulatorStateError, match="sealed -> consuming"):
        accumulator.continue_on()
    accumulator.consume()
    accumulator.continue_on()
    assert accumulator.states == ("consuming",)
    assert torch.equal(accumulator.sealed_view(1), torch.full((600,), 2.0))


def test_the_cpu_takes_no_totals() -> None:
    accumulator = make([(4,)])
    accumulator.add(0, torch.ones(4))
    with pytest.raises(ValueError, match="totals= was passed for sums on the CPU"):
        accumulator.seal(totals=torch.zeros(2, dtype=torch.float64))
    assert accumulator.state == "filling"


def test_memory_is_counted() -> None:
    one, two = make([(100,), (3,)]), make([(100,), (3,)], buffers=2)
    assert one.nbytes == one.group.numel * 4
    assert two.nbytes == 2 * one.nbytes


def test_refused_gradients_name_the_parameter() -> None:
    accumulator = make([(4, 3)])
    with pytest.raises(ValueError, match=r"'p0' has shape \(3, 4\), the parameter \(4, 3\)"):
        accumulator.add(0, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"'p0' has dtype torch\.float64"):
        accumulator.add(0, torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'p0' is sparse .*sparse=False"):
        accumulator.add(0, torch.zeros(4, 3).to_sparse())
    with pytest.raises(ValueError, match="'p0' is on meta"):
        accumulator.add(0, torch.zeros(4, 3, device="meta"))
    with pytest.raises(ValueError, match="stream 3 was passed for work on the CPU, which has no streams"):
        accumulator.front(0, stream=3)
    assert accumulator.state == "empty"
    with pytest.raises(ValueError, match="buffers=3"):
        make([(2,)], buffers=3)


def test_the_number_of_threads_changes_nothing() -> None:
    grad = torch.randn(300_001).bfloat16()
    results = []
    for threads in (1, 2, 4):
        native.set_num_threads(threads)
        accumulator = make([(300_001,)])
        accumulator.add(0, grad)
        accumulator.add(0, grad)
        accumulator.seal()
        accumulator.consume()
        results.append((accumulator.sum_of_squares, accumulator.sealed_view(0).clone()))
    native.set_num_threads(None)
    assert len({squares for squares, _ in results}) == 1
    assert all(torch.equal(total, results[0][1]) for _, total in results)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("columns", [1, 2, 3, 8])
@pytest.mark.parametrize("summed", [2, 3, 4, 12, 16, 48])
def test_a_product_is_added_in_one_pass_only_where_that_has_the_bits_of_two(
    rows: int, summed: int, columns: int
) -> None:
    """Also where a matrix has so few elements that one try may agree by chance."""
    if not merged_is_exact(rows, summed, columns, torch.get_num_threads()):
        return  # two passes have their bits by themselves
    generator = torch.Generator().manual_seed(rows * columns)
    for _ in range(50):
        left = torch.randn(summed, rows, generator=generator).t()
        right, start = torch.randn(summed, columns, generator=generator), torch.randn(rows, columns)
        apart = start + left @ right
        assert torch.equal(start.addmm_(left, right), apart)


def test_one_agreeing_element_does_not_make_a_product_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[bool] = []

    def agrees_thrice(*_: object) -> bool:
        tries.append(len(tries) < 3)
        return tries[-1]

    monkeypatch.setattr(accumulator, "_merges", agrees_thrice)
    assert not merged_is_exact.__wrapped__(1, 77, 2, 1) and len(tries) == 4
    tries.clear()
    assert merged_is_exact.__wrapped__(64, 77, 64, 1) and len(tries) == 1
