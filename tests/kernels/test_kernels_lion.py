"""The Lion kernels against the definition in plain torch and against the native CPU kernels, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paci_rt.kernels import ScalarRows, lion_ahead, lion_ahead_bytes, lion_bytes, lion_step
from paci_rt.optim import steps_native
from support.flat_toy import LARGE, LENGTHS, Flat, assert_bits
from support.interpreted import Interpreter
from support.marks import slow

DECAYING: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
SHORT: dict[str, Any] = {"lr": 1e-2, "betas": (0.3, 0.5), "weight_decay": 0.0}
NO_MEMORY: dict[str, Any] = {"lr": 1e-2, "betas": (0.0, 0.0), "weight_decay": 0.3}
KINDS = [DECAYING, SHORT, NO_MEMORY]


def reference(weight: Tensor, mean: Tensor, total: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Lion's definition in fp32, one rounding an operation; ``total`` is divided."""
    beta1, beta2 = options["betas"]
    direction = mean * beta1 + (1 - beta1) * total
    sign = torch.where(direction > 0, 1.0, torch.where(direction < 0, -1.0, direction))
    weight = weight * (1 - options["lr"] * options["weight_decay"]) + (-options["lr"]) * sign
    return weight, mean * beta2 + (1 - beta2) * total


class Group:
    """Buffers of a step; parameter 4 has seen nothing but zeros."""

    def __init__(self, device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
        self.flat = Flat(lengths, device)
        self.master, self.grad_sum = self.flat.random(), self.flat.random(scale=3.0)
        self.exp_avg = self.flat.random()
        for flat in (self.grad_sum, self.exp_avg):
            self.flat.parts(flat)[4].zero_()
        self.weight = None if dtype is torch.float32 else self.flat.poisoned(dtype)

    def buffers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("master", "weight", "grad_sum", "exp_avg")}

    def copy_(self, other: Group) -> None:
        for name, buffer in other.buffers().items():
            if buffer is not None:
                getattr(self, name).copy_(buffer)

    def state_of(self, position: int) -> tuple[Tensor, Tensor]:
        first, second = (self.flat.parts(flat)[position].cpu().clone() for flat in (self.master, self.exp_avg))
        return first, second

    def assert_state(self, position: int, weight: Tensor, mean: Tensor) -> None:
        got = self.state_of(position)
        assert_bits(got[0], weight, f"master of parameter {position}")
        assert_bits(got[1], mean, f"momentum of parameter {position}")
        if self.weight is not None:
            low = self.flat.parts(self.weight)[position].cpu()
            assert_bits(low, weight.to(low.dtype), f"weight of parameter {position}")

    def assert_padding(self) -> None:
        for name, buffer in self.buffers().items():
            if buffer is not None:
                rest = buffer.clone()
                for part in self.flat.parts(rest):
                    part.zero_()
                assert not rest.any(), f"padding of {name}"


def check_step(device: str, dtype: torch.dtype, lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    """Plain, clipped, with last gradients added, absent and overwriting; parameters left alone."""
    group, count = Group(device, dtype, lengths), len(lengths)
    rows = ScalarRows(group.flat.layout)
    steps: list[Any] = [1 if position % 2 == 0 else 5 for position in range(count)]
    for fused in (False, True):
        before = [group.state_of(position) for position in range(count)]
        rows.set_lion(steps, divisor=-3.0, **options)
        grads = group.flat.grads(dtype) if fused else None
        overwrite = [position == 2 for position in range(count)]
        if grads is not None:
            grads[0] = None
        clip = torch.tensor([0.7], device=device) if fused else None
        lion_step(group.flat.layout, rows, clip=clip, grads=grads, overwrite=overwrite, **group.buffers())
        for position, step in enumerate(steps):
            expected = before[position]
            if step is not None:
                total = group.flat.parts(group.grad_sum)[position].cpu()
                grad = None if grads is None else grads[position]
                if grad is not None:
                    total = grad.cpu().float() if overwrite[position] else total + grad.cpu().float()
                expected = reference(*expected, total / -3.0 * (0.7 if fused else 1.0), **options)
            group.assert_state(position, *expected)
        group.assert_padding()
        steps = [None if position == 1 else 2 for position in range(count)]


def check_ahead(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...], options: dict[str, Any], repeats: int
) -> None:
    """Weights are where that many steps would bring them, nothing else has moved; unknown gradients too."""
    group, count = Group(device, dtype, lengths), len(lengths)
    rows = ScalarRows(group.flat.layout, repeats)
    steps: list[Any] = [1, None, *range(2, count)]
    known = [position % 3 != 2 for position in range(count)]
    for position, part in enumerate(group.flat.parts(group.grad_sum)):
        if not known[position]:
            part.fill_(float("nan"))
    rows.set_lion(steps, divisor=5.0, known=known, **options)
    kept = group.flat.poisoned() if group.weight is None else None
    before = {name: None if buffer is None else buffer.clone() for name, buffer in group.buffers().items()}
    states = [group.state_of(position) for position in range(count)]
    lion_ahead(group.flat.layout, rows, kept=kept, **group.buffers())
    for name in ("grad_sum", "exp_avg", *(["master"] if group.weight is not None else [])):
        assert_bits(group.buffers()[name], before[name], name)  # type: ignore[arg-type]
    moved = "master" if group.weight is None else "weight"
    for position, step in enumerate(steps):
        (weight, mean), part = states[position], group.flat.parts(group.buffers()[moved])[position].cpu()
        if step is None:
            old = group.flat.parts(before[moved])[position].cpu()  # type: ignore[arg-type]
            assert_bits(part, old, "left alone")
            continue
        if kept is not None:
            assert_bits(group.flat.parts(kept)[position].cpu(), weight, "kept")
        total = group.flat.parts(group.grad_sum)[position].cpu() / 5.0 if known[position] else mean
        for _ in range(repeats):
            weight, mean = reference(weight, mean, total, **options)
        assert_bits(part, weight.to(part.dtype), f"parameter {position}")
    group.assert_padding()


def check_against_native(dtype: torch.dtype, options: dict[str, Any], repeats: int) -> None:
    """The same bits as the CPU kernels of the native core, step and look-ahead."""
    ours, theirs = Group("cpu", dtype, LENGTHS), Group("cpu", dtype, LENGTHS)
    theirs.copy_(ours)
    positions = [position for position, length in enumerate(LENGTHS) if length]
    rows, ahead, known, kept = ScalarRows(ours.flat.layout, max(repeats, 1)), None, None, None
    if repeats:
        known = [position % 2 == 0 for position in range(len(LENGTHS))]
        kept = ours.flat.poisoned() if dtype is torch.float32 else None
        theirs_kept = None if kept is None else kept.clone()
        ahead = steps_native.Ahead([known[position] for position in positions], repeats, theirs_kept)
    rows.set_lion([2] * len(LENGTHS), divisor=6.0, known=known, **options)
    if repeats:
        lion_ahead(ours.flat.layout, rows, kept=kept, **ours.buffers())
    else:
        lion_step(ours.flat.layout, rows, **ours.buffers())
    pieces = [(*ours.flat.segments[position], 2) for position in positions]
    steps_native.lion_step(pieces=pieces, divisor=6.0, ahead=ahead, **theirs.buffers(), **options)
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            assert_bits(buffer, getattr(theirs, name), name)
    if kept is not None and ahead is not None:
        assert_bits(kept, ahead.kept, "kept")  # type: ignore[arg-type]


def check_special_values(device: str) -> None:
    """Zero has no sign, NaN stays NaN and reaches no neighbour and no padding, infinities have signs."""
    group = Group(device, torch.float32, (40, 7, 3, 5, 2))
    group.master.fill_(0.0)
    group.exp_avg.zero_()
    group.grad_sum.zero_()
    values = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40], device=device)
    group.flat.parts(group.grad_sum)[1].copy_(values)
    rows = ScalarRows(group.flat.layout)
    rows.set_lion([1] * 5, divisor=1.0, lr=0.5, betas=(0.9, 0.9), weight_decay=0.0)
    lion_step(group.flat.layout, rows, **group.buffers())
    moved = group.flat.parts(group.master)[1].cpu()
    assert moved[0].isnan()
    assert moved[1:].tolist() == [0.0, 0.0, -0.5, 0.5, -0.5, 0.5]
    others = group.master.clone()
    group.flat.parts(others)[1].zero_()
    assert not others.any()
    before = {name: buffer.clone() for name, buffer in group.buffers().items() if buffer is not None}
    lion_step(group.flat.layout, rows, clip=torch.tensor([float("nan")], device=device), **group.buffers())
    for name, buffer in before.items():  # nothing has been written
        assert_bits(group.buffers()[name], buffer, name)
    group.assert_padding()


def check_compiled_and_limits(device: str) -> None:
    groups = [Group(device, torch.float16, LENGTHS) for _ in range(2)]
    groups[1].copy_(groups[0])
    grads, count = groups[0].flat.grads(torch.float16), len(LENGTHS)
    for number, group in enumerate(groups):
        rows, ahead = ScalarRows(group.flat.layout), ScalarRows(group.flat.layout, 2)
        rows.set_lion([1] * count, divisor=2.0, **DECAYING)
        ahead.set_lion([2] * count, divisor=2.0, **DECAYING)

        def run(group: Group = group, rows: ScalarRows = rows, ahead: ScalarRows = ahead) -> None:
            lion_step(group.flat.layout, rows, grads=grads, **group.buffers())
            lion_ahead(group.flat.layout, ahead, kept=None, **group.buffers())

        (torch.compile(run, backend="aot_eager", fullgraph=True) if number else run)()
    assert not groups[0].weight.isnan().any()  # type: ignore[union-attr]
    for name, buffer in groups[0].buffers().items():
        assert_bits(groups[1].buffers()[name], buffer, name)
    layout, buffers = group.flat.layout, group.buffers()
    for call, changes, match in [
        (lion_step, {"exp_avg": group.weight}, r"exp_avg has dtype torch\.float16"),
        (lion_step, {"grad_sum": group.grad_sum[:80]}, "as long as the layout"),
        (lion_step, {"clip": torch.ones(2, device=device)}, "give one fp32 element"),
        (lion_step, {"grads": group.flat.grads(torch.bfloat16)}, r"the last gradients have dtype torch\.bfloat16"),
        (lion_ahead, {"weight": None, "kept": None}, "got neither"),
        (lion_ahead, {"kept": group.flat.random()}, "got both"),
    ]:
        with pytest.raises(ValueError, match=match):
            call(layout, rows, **{**buffers, **changes})  # type: ignore[operator]
    other = ScalarRows(Flat((4,), device).layout)
    with pytest.raises(ValueError, match=r"the scalars are not set: call set_lion\(\)"):
        lion_step(layout, other, **buffers)
    other.set_lion([1], divisor=1.0, **DECAYING)
    with pytest.raises(ValueError, match="scalars are for 1 parameters"):
        lion_step(layout, other, **buffers)
    with pytest.raises(ValueError, match="divisor=0"):
        rows.set_lion([1] * count, divisor=0.0, **DECAYING)


@pytest.mark.parametrize(
    ("options", "dtype"), list(zip(KINDS, [torch.bfloat16, torch.float32, torch.float16], strict=True))
)
def test_steps_are_the_definitions(interpreter: Interpreter, options: dict[str, Any], dtype: torch.dtype) -> None:
    interpreter(check_step, "cpu", dtype, LENGTHS, options)


@pytest.mark.parametrize(
    ("options", "dtype", "repeats"),
    [(DECAYING, torch.float32, 3), (SHORT, torch.bfloat16, 2), (NO_MEMORY, torch.float16, 1)],
)
def test_looking_ahead(interpreter: Interpreter, options: Any, dtype: torch.dtype, repeats: int) -> None:
    interpreter(check_ahead, "cpu", dtype, LENGTHS, options, repeats)


@pytest.mark.parametrize("repeats", [slow(0), 2])
@pytest.mark.parametrize("options", KINDS)
def test_same_bits_as_the_native_core(interpreter: Interpreter, options: dict[str, Any], repeats: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        interpreter(check_against_native, dtype, options, repeats)


CHECKS = [check_special_values, check_compiled_and_limits]


@pytest.mark.parametrize("check", CHECKS)
def test_special_values_compilation_and_limits(interpreter: Interpreter, check: Any) -> None:
    interpreter(check, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, options: dict[str, Any], lengths: tuple[int, ...]) -> None:
    check_step("cuda", dtype, lengths, options)
    check_ahead("cuda", dtype, lengths, options, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_special_values_compilation_and_limits_on_a_gpu(check: Any) -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_captured_step_takes_new_scalars() -> None:
    plain, captured, scratch = (Group("cuda", torch.bfloat16, LARGE) for _ in range(3))
    captured.copy_(plain)
    rows = [ScalarRows(group.flat.layout) for group in (plain, captured)]
    rows[1].set_lion([1] * len(LARGE), divisor=2.0, **DECAYING)
    lion_step(scratch.flat.layout, rows[1], **scratch.buffers())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lion_step(captured.flat.layout, rows[1], **captured.buffers())
    for step, lr in ((1, 1e-3), (2, 5e-4)):
        for row in rows:
            row.set_lion([step] * len(LARGE), divisor=2.0, **{**DECAYING, "lr": lr})
        lion_step(plain.flat.layout, rows[0], **plain.buffers())
        graph.replay()
    for name, buffer in plain.buffers().items():
        assert_bits(captured.buffers()[name], buffer, name)


def test_bytes() -> None:
    assert lion_bytes(1, torch.bfloat16) == 22
    assert lion_bytes(1, torch.float32) == 20
    assert lion_bytes(1, torch.float16, fused_gradient=True) == 24
    assert lion_ahead_bytes(1, torch.bfloat16) == 14
    assert lion_ahead_bytes(1, torch.float32) == 20
