"""NAdam, AdamW's kernels with another switch, against plain torch and against the native CPU kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paci_rt.kernels import (
    ScalarRows,
    adamw_step,
    lion_step,
    nadam_ahead,
    nadam_ahead_bytes,
    nadam_bytes,
    nadam_step,
    sgd_step,
)
from paci_rt.optim import steps_native
from support.flat_toy import LARGE, LENGTHS, Flat, assert_bits
from support.groups import Group
from support.interpreted import Interpreter
from support.marks import slow

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
Sizes = tuple[float, float]


def size_of(position: int, step: int) -> Sizes:
    """Different for each parameter and step; two gradients do not move their parameter, one for want of range."""
    fresh = {2: 0.0, 4: 1e-50}.get(position, 1e-3 * (position + 1) / step)
    return (0.0 if position == 2 else 2e-3 * (position + 2) / step), fresh


def reference(
    state: list[Tensor], total: Tensor, step: int, sizes: Sizes, clip: float = 1.0, **options: Any
) -> list[Tensor]:
    """torch.optim.NAdam's operations one by one in fp32; ``state`` is weight and both moments, ``total`` divided."""
    (weight, mean, square), (beta1, beta2) = state, options["betas"]
    gradient = total * clip
    if 1 - beta1 < 0.5:
        mean = mean + (1 - beta1) * (gradient - mean)
    else:
        mean = gradient - (gradient - mean) * beta1
    square = square * beta2 + ((1 - beta2) * gradient) * gradient
    # torch's own fp32 root is not always correctly rounded; the root in fp64, rounded once more, is.
    denominator = square.double().sqrt().float() * (1 / math.sqrt(1 - beta2**step)) + options["eps"]
    move = -sizes[0] * mean
    if torch.tensor(sizes[1], dtype=torch.float32) != 0:
        move = move + (-sizes[1]) * gradient
    return [weight * (1 - options["lr"] * options["weight_decay"]) + move / denominator, mean, square]


def make(device: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> Group:
    group = Group(device, dtype, lengths)
    # Here it shows if a size of 0 is multiplied with: a zero would change its sign.
    group.flat.parts(group.master)[2].fill_(-0.0)
    return group


def sizes_of(steps: list[Any], repeats: int = 1) -> list[Sizes]:
    taken = [(position, step) for position, step in enumerate(steps) if step is not None]
    return [size_of(position, step + repeat) for position, step in taken for repeat in range(repeats)]


def check_step(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...], divisor: float, clip: float | None, beta1: float
) -> None:
    """Two steps, the second one with parameters left alone, others further on, and last gradients folded in."""
    group, count = make(device, dtype, lengths), len(lengths)
    rows, options = ScalarRows(group.flat.layout), {**OPTIONS, "betas": (beta1, 0.95)}
    steps: list[Any] = [1] * count
    given = None if clip is None else torch.tensor([clip], device=device)
    for fused in (False, True):
        before = [group.state_of(position) for position in range(count)]
        rows.set_nadam(steps, step_sizes=sizes_of(steps), divisor=divisor, **options)
        grads = group.flat.grads(dtype) if fused else None
        overwrite = [position == 3 for position in range(count)]
        nadam_step(group.flat.layout, rows, clip=given, grads=grads, overwrite=overwrite, **group.buffers())
        for position, step in enumerate(steps):
            expected = before[position]
            if step is not None:
                total = group.flat.parts(group.grad_sum)[position].cpu()
                if grads is not None:
                    grad = grads[position].cpu().float()  # type: ignore[union-attr]
                    total = grad if overwrite[position] else total + grad
                factor = 1.0 if given is None else float(given.cpu())
                expected = reference(expected, total / divisor, step, size_of(position, step), factor, **options)
            group.assert_state(position, expected)
        group.assert_padding()
        steps = [None if position in (0, 5) else position + 2 for position in range(count)]


def check_ahead(device: str, dtype: torch.dtype, lengths: tuple[int, ...], repeats: int) -> None:
    """Weights are where that many steps would bring them, nothing else has moved; unknown gradients too."""
    group, count = make(device, dtype, lengths), len(lengths)
    rows = ScalarRows(group.flat.layout, repeats)
    steps: list[Any] = [None, None, *range(4, count + 2)]
    known = [position % 3 != 1 for position in range(count)]
    for position, part in enumerate(group.flat.parts(group.grad_sum)):
        if not known[position]:
            part.fill_(float("nan"))
    rows.set_nadam(steps, step_sizes=sizes_of(steps, repeats), divisor=5.0, known=known, **OPTIONS)
    kept = group.flat.poisoned() if group.weight is None else None
    before = {name: None if buffer is None else buffer.clone() for name, buffer in group.buffers().items()}
    states = [group.state_of(position) for position in range(count)]
    nadam_ahead(group.flat.layout, rows, kept=kept, **group.buffers())
    for name in ("grad_sum", "exp_avg", "exp_avg_sq", *(["master"] if group.weight is not None else [])):
        assert_bits(group.buffers()[name], before[name], name)  # type: ignore[arg-type]
    moved, old = ("master", before["master"]) if group.weight is None else ("weight", before["weight"])
    for position, step in enumerate(steps):
        part = group.flat.parts(group.buffers()[moved])[position].cpu()
        state = states[position]
        if step is None:
            assert_bits(part, group.flat.parts(old)[position].cpu(), "left alone")  # type: ignore[arg-type]
            continue
        if kept is not None:
            assert_bits(group.flat.parts(kept)[position].cpu(), state[0], "kept")
        total = group.flat.parts(group.grad_sum)[position].cpu() / 5.0
        if not known[position]:
            total = state[1] * (1 / (1 - OPTIONS["betas"][0] ** (step - 1)))
        for repeat in range(repeats):
            state = reference(state, total, step + repeat, size_of(position, step + repeat), **OPTIONS)
        assert_bits(part, state[0].to(part.dtype), f"parameter {position}")
    group.assert_padding()


def check_against_native(dtype: torch.dtype, repeats: int, beta1: float) -> None:
    """The same bits as the CPU kernels of the native core, step and look-ahead."""
    ours, theirs = make("cpu", dtype, LENGTHS), make("cpu", dtype, LENGTHS)
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            getattr(theirs, name).copy_(buffer)
    options = {**OPTIONS, "betas": (beta1, 0.95)}
    steps = [position + 2 if length else None for position, length in enumerate(LENGTHS)]
    positions = [position for position, step in enumerate(steps) if step is not None]
    pieces = [(*ours.flat.segments[position], position + 2) for position in positions]
    sizes = sizes_of(steps, max(repeats, 1))
    rows, ahead, known, kept = ScalarRows(ours.flat.layout, max(repeats, 1)), None, None, None
    if repeats:
        known = [position % 2 == 0 for position in range(len(LENGTHS))]
        kept = ours.flat.poisoned() if dtype is torch.float32 else None
        theirs_kept = None if kept is None else kept.clone()
        ahead = steps_native.Ahead([known[position] for position in positions], repeats, theirs_kept)
    rows.set_nadam(steps, step_sizes=sizes, divisor=6.0, known=known, **options)
    if repeats:
        nadam_ahead(ours.flat.layout, rows, kept=kept, **ours.buffers())
    else:
        nadam_step(ours.flat.layout, rows, **ours.buffers())
    steps_native.adamw_step(pieces=pieces, step_sizes=sizes, divisor=6.0, ahead=ahead, **theirs.buffers(), **options)
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            assert_bits(buffer, getattr(theirs, name), name)
    if kept is not None and ahead is not None:
        assert_bits(kept, ahead.kept, "kept")  # type: ignore[arg-type]


def check_training(device: str) -> None:
    """Five updates end where torch.optim.NAdam ends: the row holds what its formulas ask for."""
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    group = Group(device, torch.float32, (300, 41))
    for state in (group.exp_avg, group.exp_avg_sq):
        state.zero_()
    params = [part.clone().requires_grad_() for part in group.flat.parts(group.master)]
    theirs = torch.optim.NAdam(params, momentum_decay=0.004, decoupled_weight_decay=True, **options)
    rows, product = ScalarRows(group.flat.layout), 1.0

    def momentum(step: int) -> float:
        return 0.9 * (1 - 0.5 * 0.96 ** (step * 0.004))

    for step in range(1, 6):
        group.grad_sum.copy_(group.flat.random())
        for param, part in zip(params, group.flat.parts(group.grad_sum), strict=True):
            param.grad = part.clone()
        theirs.step()
        now, later = momentum(step), momentum(step + 1)
        product *= now
        sizes = (options["lr"] * later / (1 - product * later), options["lr"] * (1 - now) / (1 - product))  # type: ignore
        rows.set_nadam([step] * 2, step_sizes=[sizes] * 2, divisor=1.0, **options)
        nadam_step(group.flat.layout, rows, **group.buffers())
    for part, param in zip(group.flat.parts(group.master), params, strict=True):
        # A dozen roundings of 6e-8 a step, most of them of changes that are a hundredth of a weight.
        assert (part - param).norm() <= 3e-7 * param.norm()


def check_compiled(device: str) -> None:
    groups = [make(device, torch.bfloat16, LENGTHS) for _ in range(2)]
    for name, buffer in groups[0].buffers().items():
        getattr(groups[1], name).copy_(buffer)
    grads, count = groups[0].flat.grads(torch.bfloat16), len(LENGTHS)
    for number, group in enumerate(groups):
        rows, ahead = ScalarRows(group.flat.layout), ScalarRows(group.flat.layout, 2)
        rows.set_nadam([1] * count, step_sizes=sizes_of([1] * count), divisor=2.0, **OPTIONS)
        ahead.set_nadam([2] * count, step_sizes=sizes_of([2] * count, 2), divisor=2.0, **OPTIONS)

        def run(group: Group = group, rows: ScalarRows = rows, ahead: ScalarRows = ahead) -> None:
            nadam_step(group.flat.layout, rows, grads=grads, **group.buffers())
            nadam_ahead(group.flat.layout, ahead, kept=None, **group.buffers())

        (torch.compile(run, backend="aot_eager", fullgraph=True) if number else run)()
    assert not groups[0].weight.isnan().any()  # type: ignore[union-attr]
    for name, buffer in groups[0].buffers().items():
        assert_bits(groups[1].buffers()[name], buffer, name)


def check_limits(device: str) -> None:
    group = Group(device, torch.bfloat16, (40, 7))
    layout, rows = group.flat.layout, ScalarRows(group.flat.layout)
    with pytest.raises(ValueError, match=r"the scalars are not set: call set_nadam\(\) before"):
        nadam_step(layout, rows, **group.buffers())
    rows.set_nadam([1, None], step_sizes=[(0.1, 0.1)], divisor=1.0, **OPTIONS)
    for call, changes, match in [
        (nadam_step, {"exp_avg": group.weight}, r"exp_avg has dtype torch\.bfloat16"),
        (nadam_step, {"clip": torch.ones(2, device=device)}, "give one fp32 element"),
        (nadam_step, {"grads": group.flat.grads(torch.float32)}, r"the last gradients have dtype torch\.float32"),
        (nadam_ahead, {"weight": None, "kept": None}, "got neither"),
        (nadam_ahead, {"kept": group.flat.random()}, "got both"),
    ]:
        with pytest.raises(ValueError, match=match):
            call(layout, rows, **{**group.buffers(), **changes})  # type: ignore[operator]
    other = ScalarRows(Flat((4,), device).layout)
    other.set_nadam([1], step_sizes=[(0.1, 0.1)], divisor=1.0, **OPTIONS)
    with pytest.raises(ValueError, match="scalars are for 1 parameters"):
        nadam_step(layout, other, **group.buffers())
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"{count} step sizes for 2 parameters that take 1 steps each"):
            rows.set_nadam([1, 1], step_sizes=[(0.1, 0.1)] * count, divisor=1.0, **OPTIONS)
    with pytest.raises(ValueError, match="no mean of past ones"):
        rows.set_nadam([1, 1], step_sizes=[(0.1, 0.1)] * 2, known=[True, False], divisor=1.0, **OPTIONS)


def check_confusion(device: str) -> None:
    """Scalars of one optimizer are no other's, whatever tensors fit."""
    group = Group(device, torch.bfloat16, (40, 7))
    buffers, rows = group.buffers(), ScalarRows(group.flat.layout)
    momentum = {name: buffers[name] for name in ("master", "weight", "grad_sum")}
    moments, one = {**momentum, "exp_avg": group.exp_avg}, {"lr": 0.1, "weight_decay": 0.0, "divisor": 1.0}
    betas = {"betas": (0.9, 0.9)}
    setters: dict[str, Any] = {
        "adamw": lambda: rows.set_adamw([1, 1], eps=1.0, **betas, **one),
        "nadam": lambda: rows.set_nadam([1, 1], step_sizes=[(0.1, 0.1)] * 2, eps=1.0, **betas, **one),
        "sgd": lambda: rows.set_sgd([1, 1], momentum=0.0, dampening=0.0, nesterov=False, **one),
        "lion": lambda: rows.set_lion([1, 1], **betas, **one),
    }
    calls: dict[str, Any] = {
        "adamw": lambda: adamw_step(group.flat.layout, rows, **buffers),
        "nadam": lambda: nadam_step(group.flat.layout, rows, **buffers),
        "sgd": lambda: sgd_step(group.flat.layout, rows, momentum_buffer=None, **momentum),
        "lion": lambda: lion_step(group.flat.layout, rows, **moments),
    }
    for ours, setter in setters.items():
        setter()
        assert rows.optimizer == ours
        for theirs, call in calls.items():
            if ours == theirs:
                call()
                continue
            with pytest.raises(ValueError, match=rf"the scalars are those of {ours}: call set_{theirs}\(\)"):
                call()


STEPS = [(torch.float32, 8.0, None, 0.9), (torch.bfloat16, -3.0, 0.37, 0.9), (torch.float16, 3.0, 1.0, 0.4)]


@pytest.mark.parametrize(("dtype", "divisor", "clip", "beta1"), STEPS)
def test_steps_are_torchs(interpreter: Interpreter, dtype: Any, divisor: float, clip: Any, beta1: float) -> None:
    interpreter(check_step, "cpu", dtype, LENGTHS, divisor, clip, beta1)


@pytest.mark.parametrize(("dtype", "repeats"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)])
def test_looking_ahead(interpreter: Interpreter, dtype: torch.dtype, repeats: int) -> None:
    interpreter(check_ahead, "cpu", dtype, LENGTHS, repeats)


@pytest.mark.parametrize(("repeats", "beta1"), [(0, 0.9), (2, 0.9), (0, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_the_native_core(interpreter: Interpreter, dtype: torch.dtype, repeats: int, beta1: float) -> None:
    interpreter(check_against_native, dtype, repeats, beta1)


CHECKS = [check_training, check_compiled, check_limits, check_confusion]
SLOW = (check_compiled,)


@pytest.mark.parametrize("check", [slow(check) if check in SLOW else check for check in CHECKS])
def test_training_compilation_and_limits(interpreter: Interpreter, check: Any) -> None:
    interpreter(check, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize(("dtype", "divisor", "clip", "beta1"), STEPS)
def test_on_a_gpu(dtype: Any, divisor: float, clip: Any, beta1: float, lengths: tuple[int, ...]) -> None:
    check_step("cuda", dtype, lengths, divisor, clip, beta1)
    for repeats in (1, 3):
        check_ahead("cuda", dtype, lengths, repeats)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_training_compilation_and_limits_on_a_gpu(check: Any) -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_captured_step_takes_new_scalars() -> None:
    plain, captured, scratch = (make("cuda", torch.bfloat16, LARGE) for _ in range(3))
    for name, buffer in plain.buffers().items():
        getattr(captured, name).copy_(buffer)
    rows = [ScalarRows(group.flat.layout) for group in (plain, captured)]
    steps = [1] * len(LARGE)
    rows[1].set_nadam(steps, step_sizes=sizes_of(steps), divisor=2.0, **OPTIONS)
    nadam_step(scratch.flat.layout, rows[1], **scratch.buffers())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nadam_step(captured.flat.layout, rows[1], **captured.buffers())
    for step in (1, 2):
        for row in rows:
            row.set_nadam([step] * len(LARGE), step_sizes=sizes_of([step] * len(LARGE)), divisor=2.0, **OPTIONS)
        nadam_step(plain.flat.layout, rows[0], **plain.buffers())
        graph.replay()
    for name, buffer in plain.buffers().items():
        assert_bits(captured.buffers()[name], buffer, name)


def test_bytes() -> None:
    assert nadam_bytes(1, torch.bfloat16) == 30
    assert nadam_bytes(1, torch.float32) == 28
    assert nadam_bytes(1, torch.float16, fused_gradient=True) == 32
    assert nadam_ahead_bytes(1, torch.float16) == 18
    assert nadam_ahead_bytes(1, torch.float32) == 24
