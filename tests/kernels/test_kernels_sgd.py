"""The SGD kernels against plain torch and against the native CPU kernels, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paci_rt.kernels import ScalarRows, sgd_ahead, sgd_ahead_bytes, sgd_bytes, sgd_step
from paci_rt.optim import steps_native
from support.flat_toy import LARGE, LENGTHS, Flat, assert_bits
from support.interpreted import Interpreter
from support.marks import slow

PLAIN = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.01, "nesterov": False}
HEAVY = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "nesterov": False}
NESTEROV = {"lr": 0.1, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True}
KINDS = [PLAIN, HEAVY, NESTEROV]


def reference(weight: Tensor, buffer: Tensor, total: Tensor, *, first: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """torch.optim.SGD's operations one by one in fp32; ``total`` is divided."""
    gradient = total + options["weight_decay"] * weight
    if options["momentum"]:
        later = buffer * options["momentum"] + (1 - options["dampening"]) * gradient
        buffer = gradient if first else later
        gradient = gradient + options["momentum"] * buffer if options["nesterov"] else buffer
    return weight + (-options["lr"]) * gradient, buffer


class Group:
    """Buffers of a step; the momentum buffer holds NaN until a first step sets it."""

    def __init__(self, device: str, dtype: torch.dtype, lengths: tuple[int, ...], options: dict[str, Any]) -> None:
        self.flat = Flat(lengths, device)
        self.master, self.grad_sum = self.flat.random(), self.flat.random(scale=3.0)
        self.momentum_buffer = self.flat.random() if options["momentum"] else None
        self.weight = None if dtype is torch.float32 else self.flat.poisoned(dtype)

    def buffers(self) -> dict[str, Any]:
        names = ("master", "weight", "grad_sum", "momentum_buffer")
        return {name: getattr(self, name) for name in names}

    def state_of(self, position: int) -> tuple[Tensor, Tensor]:
        buffer = self.master if self.momentum_buffer is None else self.momentum_buffer
        first, second = (self.flat.parts(flat)[position].cpu().clone() for flat in (self.master, buffer))
        return first, second

    def assert_state(self, position: int, weight: Tensor, buffer: Tensor) -> None:
        got = self.state_of(position)
        assert_bits(got[0], weight, f"master of parameter {position}")
        if self.momentum_buffer is not None:
            assert_bits(got[1], buffer, f"momentum of parameter {position}")
        if self.weight is not None:
            low = self.flat.parts(self.weight)[position].cpu()
            assert_bits(low, weight.to(low.dtype), f"weight of parameter {position}")


def check_step(device: str, dtype: torch.dtype, lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    """First and later steps, parameters left alone, clipping, and last gradients folded in."""
    group = Group(device, dtype, lengths, options)
    rows, count = ScalarRows(group.flat.layout), len(lengths)
    if group.momentum_buffer is not None:
        group.flat.parts(group.momentum_buffer)[0].fill_(float("nan"))
    steps: list[Any] = [1 if position % 2 == 0 else 5 for position in range(count)]
    clip = torch.tensor([0.7], device=device)
    for fused in (False, True):
        before = [group.state_of(position) for position in range(count)]
        rows.set_sgd(steps, divisor=-3.0, **options)
        grads = group.flat.grads(dtype) if fused else None
        sgd_step(group.flat.layout, rows, clip=clip, grads=grads, **group.buffers())
        for position, step in enumerate(steps):
            expected = before[position]
            if step is not None:
                total = group.flat.parts(group.grad_sum)[position].cpu()
                if grads is not None:
                    total = total + grads[position].cpu().float()  # type: ignore[union-attr]
                expected = reference(*expected, total / -3.0 * 0.7, first=step == 1, **options)
            group.assert_state(position, *expected)
        steps = [None if position == 1 else 2 for position in range(count)]


def check_ahead(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...], options: dict[str, Any], repeats: int
) -> None:
    group = Group(device, dtype, lengths, options)
    count, rows = len(lengths), ScalarRows(group.flat.layout, repeats)
    steps: list[Any] = [1, None, *range(2, count)]
    known = [position % 3 != 2 for position in range(count)]
    rows.set_sgd(steps, divisor=5.0, known=known, **options)
    kept = group.flat.poisoned() if group.weight is None else None
    before = {name: None if buffer is None else buffer.clone() for name, buffer in group.buffers().items()}
    states = [group.state_of(position) for position in range(count)]
    sgd_ahead(group.flat.layout, rows, kept=kept, **group.buffers())
    for name in ("grad_sum", "momentum_buffer", *(["master"] if group.weight is not None else [])):
        assert_bits(group.buffers()[name], before[name], name)  # type: ignore[arg-type]
    moved = group.master if group.weight is None else group.weight
    share = (1 - options["momentum"]) / (1 - options["dampening"])
    for position, step in enumerate(steps):
        if step is None:
            continue
        weight, buffer = states[position]
        if kept is not None:
            assert_bits(group.flat.parts(kept)[position].cpu(), weight, "kept")
        total = group.flat.parts(group.grad_sum)[position].cpu() / 5.0 if known[position] else buffer * share
        mine = options if known[position] else {**options, "weight_decay": 0.0}
        for repeat in range(repeats):
            weight, buffer = reference(weight, buffer, total, first=step + repeat == 1, **mine)
        part = group.flat.parts(moved)[position].cpu()
        assert_bits(part, weight.to(part.dtype), f"parameter {position}")


def check_against_native(dtype: torch.dtype, options: dict[str, Any], repeats: int) -> None:
    ours, theirs = (Group("cpu", dtype, LENGTHS, options) for _ in range(2))
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            getattr(theirs, name).copy_(buffer)
    positions = [position for position, length in enumerate(LENGTHS) if length]
    rows = ScalarRows(ours.flat.layout, max(repeats, 1))
    known = [position % 2 == 0 for position in range(len(LENGTHS))] if repeats else None
    ahead, kept = None, None
    if repeats and known:
        kept = ours.flat.poisoned() if dtype is torch.float32 else None
        theirs_kept = None if kept is None else kept.clone()
        ahead = steps_native.Ahead([known[position] for position in positions], repeats, theirs_kept)
    rows.set_sgd([2] * len(LENGTHS), divisor=6.0, known=known, **options)
    if repeats:
        sgd_ahead(ours.flat.layout, rows, kept=kept, **ours.buffers())
    else:
        sgd_step(ours.flat.layout, rows, **ours.buffers())
    pieces = [(*ours.flat.segments[position], 2) for position in positions]
    steps_native.sgd_step(pieces=pieces, divisor=6.0, ahead=ahead, **theirs.buffers(), **options)
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            assert_bits(buffer, getattr(theirs, name), name)


def check_compiled_and_limits(device: str) -> None:
    groups = [Group(device, torch.float16, LENGTHS, HEAVY) for _ in range(2)]
    for name, buffer in groups[0].buffers().items():
        getattr(groups[1], name).copy_(buffer)
    for number, group in enumerate(groups):
        rows, ahead = ScalarRows(group.flat.layout), ScalarRows(group.flat.layout, 2)
        rows.set_sgd([1] * len(LENGTHS), divisor=2.0, **HEAVY)
        ahead.set_sgd([2] * len(LENGTHS), divisor=2.0, **HEAVY)

        def run(group: Group = group, rows: ScalarRows = rows, ahead: ScalarRows = ahead) -> None:
            sgd_step(group.flat.layout, rows, **group.buffers())
            sgd_ahead(group.flat.layout, ahead, kept=None, **group.buffers())

        (torch.compile(run, backend="aot_eager", fullgraph=True) if number else run)()
    for name, buffer in groups[0].buffers().items():
        assert_bits(groups[1].buffers()[name], buffer, name)
    with pytest.raises(ValueError, match="momentum=0 says nothing"):
        rows.set_sgd([1] * len(LENGTHS), known=[False] * len(LENGTHS), divisor=1.0, **PLAIN)
    with pytest.raises(ValueError, match=r"momentum_buffer has dtype torch\.float16"):
        sgd_step(group.flat.layout, rows, **{**group.buffers(), "momentum_buffer": group.weight})


@pytest.mark.parametrize(
    ("options", "dtype"), list(zip(KINDS, [torch.bfloat16, torch.float32, torch.float16], strict=True))
)
def test_steps_are_torchs(interpreter: Interpreter, options: dict[str, Any], dtype: torch.dtype) -> None:
    interpreter(check_step, "cpu", dtype, LENGTHS, options)


@pytest.mark.parametrize(("options", "dtype", "repeats"), [(HEAVY, torch.float32, 3), (NESTEROV, torch.bfloat16, 2)])
def test_looking_ahead(interpreter: Interpreter, options: Any, dtype: torch.dtype, repeats: int) -> None:
    interpreter(check_ahead, "cpu", dtype, LENGTHS, options, repeats)


@pytest.mark.parametrize(
    ("options", "repeats"), [(PLAIN, 0), slow(HEAVY, 0), slow(NESTEROV, 0), (HEAVY, 2), (NESTEROV, 2)]
)
def test_same_bits_as_the_native_core(interpreter: Interpreter, options: dict[str, Any], repeats: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        interpreter(check_against_native, dtype, options, repeats)


def test_compilation_and_limits(interpreter: Interpreter) -> None:
    interpreter(check_compiled_and_limits, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    check_step("cuda", dtype, lengths, options)
    if options["momentum"]:
        check_ahead("cuda", dtype, lengths, options, 3)


@pytest.mark.gpu
def test_compilation_and_limits_on_a_gpu() -> None:
    check_compiled_and_limits("cuda")


def test_bytes() -> None:
    assert sgd_bytes(1, torch.bfloat16, momentum=True) == 22
    assert sgd_bytes(1, torch.float32, momentum=True) == 20
    assert sgd_bytes(1, torch.float16, momentum=False, fused_gradient=True) == 16
    assert sgd_ahead_bytes(1, torch.bfloat16) == 14
    assert sgd_ahead_bytes(1, torch.float32) == 20
