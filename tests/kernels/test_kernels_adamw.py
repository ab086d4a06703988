"""The AdamW kernels against plain torch and against the native CPU kernels, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paci_rt.kernels import FlatLayout, ScalarRows, adamw_ahead, adamw_ahead_bytes, adamw_bytes, adamw_step
from paci_rt.optim import steps_native
from support.flat_toy import LARGE, LENGTHS, Flat, assert_bits
from support.groups import Group
from support.interpreted import Interpreter
from support.marks import slow

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def reference(state: list[Tensor], total: Tensor, step: int, clip: float, **options: Any) -> list[Tensor]:
    """torch.optim.AdamW's operations one by one in fp32; ``state`` is weight and both moments, ``total`` divided."""
    (weight, mean, square), (beta1, beta2) = state, options["betas"]
    gradient = total * clip
    if 1 - beta1 < 0.5:
        mean = mean + (1 - beta1) * (gradient - mean)
    else:
        mean = gradient - (gradient - mean) * beta1
    square = square * beta2 + ((1 - beta2) * gradient) * gradient
    # torch's own fp32 root is not always correctly rounded; the root in fp64, rounded once more, is.
    denominator = square.double().sqrt().float() * (1 / math.sqrt(1 - beta2**step)) + options["eps"]
    change = (-(options["lr"] / (1 - beta1**step)) * mean) / denominator
    return [weight * (1 - options["lr"] * options["weight_decay"]) + change, mean, square]


def check_step(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...], divisor: float, clip: float | None, beta1: float
) -> None:
    """Two steps; the second with parameters left alone and others further on; eps 0 must not reach the padding."""
    group = Group(device, dtype, lengths)
    rows = ScalarRows(group.flat.layout)
    steps: list[Any] = [1] * len(lengths)
    for eps in (1e-8, 0.0):
        options = {**OPTIONS, "eps": eps, "betas": (beta1, 0.95)}
        before = [group.state_of(position) for position in range(len(lengths))]
        rows.set_adamw(steps, divisor=divisor, **options)
        given = None if clip is None else torch.tensor([clip], device=device)
        adamw_step(group.flat.layout, rows, clip=given, **group.buffers())
        for position, step in enumerate(steps):
            total = group.flat.parts(group.grad_sum)[position].cpu() / divisor
            factor = 1.0 if given is None else float(given.cpu())
            expected = before[position]
            if step is not None:
                expected = reference(before[position], total, step, factor, **options)
            group.assert_state(position, expected)
        group.assert_padding()
        steps = [None if position in (0, 5) else position + 2 for position in range(len(lengths))]


def check_last_gradients(device: str, dtype: torch.dtype, lengths: tuple[int, ...], shift: int) -> None:
    """Folded in, absent and overwriting gradients give what accumulating them first would."""
    group = Group(device, dtype, lengths)
    rows = ScalarRows(group.flat.layout)
    rows.set_adamw([4] * len(lengths), divisor=3.0, **OPTIONS)
    grads = group.flat.grads(dtype)
    grads[2] = None
    if shift:
        grads[-1] = torch.randn(lengths[-1] + shift, device=device).to(dtype)[shift:]
    overwrite = [position == 4 for position in range(len(lengths))]
    group.flat.parts(group.grad_sum)[4].fill_(float("nan"))  # must not be read
    before = [group.state_of(position) for position in range(len(lengths))]
    sums = group.grad_sum.clone()
    adamw_step(group.flat.layout, rows, grads=grads, overwrite=overwrite, **group.buffers())
    assert_bits(group.grad_sum, sums, "sums")
    for position, grad in enumerate(grads):
        total = group.flat.parts(sums)[position].cpu()
        if grad is not None:
            total = grad.cpu().float() if overwrite[position] else total + grad.cpu().float()
        group.assert_state(position, reference(before[position], total / 3.0, 4, 1.0, **OPTIONS))
    group.assert_padding()


def check_ahead(device: str, dtype: torch.dtype, lengths: tuple[int, ...], repeats: int) -> None:
    """Weights are where that many steps would bring them, nothing else has moved; unknown gradients too."""
    group = Group(device, dtype, lengths)
    layout, count = group.flat.layout, len(lengths)
    rows = ScalarRows(layout, repeats)
    steps: list[Any] = [position + 2 for position in range(count)]
    steps[3] = steps[0] = None
    known = [position % 3 != 1 for position in range(count)]
    for position, part in enumerate(group.flat.parts(group.grad_sum)):
        if not known[position]:
            part.fill_(float("nan"))
    rows.set_adamw(steps, divisor=5.0, known=known, **OPTIONS)
    kept = group.flat.poisoned() if group.weight is None else None
    before = {name: None if buffer is None else buffer.clone() for name, buffer in group.buffers().items()}
    states = [group.state_of(position) for position in range(count)]
    adamw_ahead(layout, rows, kept=kept, **group.buffers())
    for name in ("grad_sum", "exp_avg", "exp_avg_sq", *(["master"] if group.weight is not None else [])):
        assert_bits(group.buffers()[name], before[name], name)  # type: ignore[arg-type]
    moved = group.master if group.weight is None else group.weight
    for position, step in enumerate(steps):
        state, part = states[position], group.flat.parts(moved)[position].cpu()
        if step is None:
            old = before["master" if group.weight is None else "weight"]
            assert old is not None
            assert_bits(part, group.flat.parts(old)[position].cpu(), "left alone")
            continue
        if kept is not None:
            assert_bits(group.flat.parts(kept)[position].cpu(), state[0], "kept")
        total = group.flat.parts(group.grad_sum)[position].cpu() / 5.0
        if not known[position]:
            total = state[1] * (1 / (1 - OPTIONS["betas"][0] ** (step - 1)))
        for repeat in range(repeats):
            state = reference(state, total, step + repeat, 1.0, **OPTIONS)
        assert_bits(part, state[0].to(part.dtype), f"parameter {position}")
    group.assert_padding()


def check_against_native(dtype: torch.dtype, repeats: int) -> None:
    """The same bits as the CPU kernels of the native core, step and look-ahead."""
    lengths = LENGTHS
    ours, theirs = Group("cpu", dtype, lengths), Group("cpu", dtype, lengths)
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            getattr(theirs, name).copy_(buffer)
    positions = [position for position, length in enumerate(lengths) if length]
    steps = [7 if position in positions else None for position in range(len(lengths))]
    pieces = [(*ours.flat.segments[position], 7) for position in positions]
    known, kept = None, [None, None]
    ahead, rows = None, ScalarRows(ours.flat.layout, max(repeats, 1))
    if repeats:
        known = [position % 2 == 0 for position in range(len(lengths))]
        kept = [ours.flat.poisoned(), ours.flat.poisoned()] if dtype is torch.float32 else [None, None]  # type: ignore
        ahead = steps_native.Ahead([known[position] for position in positions], repeats, kept[1])
    rows.set_adamw(steps, divisor=6.0, known=known, **OPTIONS)
    if repeats:
        adamw_ahead(ours.flat.layout, rows, kept=kept[0], **ours.buffers())
    else:
        adamw_step(ours.flat.layout, rows, **ours.buffers())
    steps_native.adamw_step(pieces=pieces, divisor=6.0, ahead=ahead, **theirs.buffers(), **OPTIONS)
    for name, buffer in ours.buffers().items():
        if buffer is not None:
            assert_bits(buffer, getattr(theirs, name), name)
    if kept[0] is not None:
        assert_bits(kept[0], kept[1], "kept")  # type: ignore[arg-type]


def check_rounding(device: str) -> None:
    """Every kind of fp32 value is rounded to bf16 and fp16 as torch rounds it: ties, overflow, subnormals, NaN."""
    patterns = torch.arange(0, 1 << 16, 7, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (patterns[:, None] | low[None, :]).flatten().view(torch.float32).to(device)
    for dtype in (torch.bfloat16, torch.float16):
        layout = FlatLayout([(0, values.numel())], -(-values.numel() // 16) * 16, torch.device(device))
        master = torch.zeros(layout.numel, device=device)
        master[: values.numel()] = values
        weight, rest = torch.zeros_like(master, dtype=dtype), torch.zeros_like(master)
        rows = ScalarRows(layout)
        rows.set_adamw([1], lr=0.0, betas=(0.9, 0.9), eps=1.0, weight_decay=0.0, divisor=1.0)
        adamw_step(
            layout, rows, master=master, weight=weight, grad_sum=rest, exp_avg=rest.clone(), exp_avg_sq=rest.clone()
        )
        expected = master.cpu().to(dtype)
        number = ~expected.isnan()
        assert_bits(weight.cpu()[number], expected[number], str(dtype))
        assert weight.cpu()[~number].isnan().all()
        assert (~number).sum() > 100


def check_compiled(device: str) -> None:
    flats = [Group(device, torch.bfloat16, LENGTHS) for _ in range(2)]
    for name, buffer in flats[0].buffers().items():
        getattr(flats[1], name).copy_(buffer)
    grads = flats[0].flat.grads(torch.bfloat16)
    for number, group in enumerate(flats):
        rows, ahead = ScalarRows(group.flat.layout), ScalarRows(group.flat.layout, 2)
        rows.set_adamw([1] * len(LENGTHS), divisor=2.0, **OPTIONS)
        ahead.set_adamw([2] * len(LENGTHS), divisor=2.0, **OPTIONS)

        def run(group: Group = group, rows: ScalarRows = rows, ahead: ScalarRows = ahead) -> None:
            adamw_step(group.flat.layout, rows, grads=grads, **group.buffers())
            adamw_ahead(group.flat.layout, ahead, kept=None, **group.buffers())

        (torch.compile(run, backend="aot_eager", fullgraph=True) if number else run)()
    for name, buffer in flats[0].buffers().items():
        assert_bits(flats[1].buffers()[name], buffer, name)


def check_limits(device: str) -> None:
    group = Group(device, torch.bfloat16, (40, 7))
    layout, rows = group.flat.layout, ScalarRows(group.flat.layout)
    rows.set_adamw([1, 1], divisor=1.0, **OPTIONS)
    kept = group.flat.random()

    def refused(match: str, call: Any, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            call(layout, changes.pop("rows", rows), **{**group.buffers(), **changes})

    refused("exp_avg has dtype torch.bfloat16: it must be torch.float32", adamw_step, exp_avg=group.weight)
    refused("weight has dtype torch.float32: it must be torch.bfloat16 or", adamw_step, weight=group.master)
    refused("as long as the layout, 96 elements", adamw_step, grad_sum=group.grad_sum[:80])
    refused("give one fp32 element", adamw_step, clip=torch.ones(2, device=device))
    refused("the last gradients have dtype torch.float32", adamw_step, grads=group.flat.grads(torch.float32))
    other = ScalarRows(Flat((4,), device).layout)
    other.set_adamw([1], divisor=1.0, **OPTIONS)
    refused("scalars are for 1 parameters", adamw_step, rows=other)
    refused("got neither", adamw_ahead, weight=None, kept=None)
    refused("got both", adamw_ahead, kept=kept)
    for match, steps, changes in [
        ("2 steps and 1 known flags", [1, 1], {"known": [True]}),
        ("step 0 of a parameter", [0, 1], {}),
        ("cannot be divided by 0", [1, 1], {"divisor": 0.0}),
        ("no mean of past ones", [1, 1], {"known": [True, False]}),
    ]:
        with pytest.raises(ValueError, match=match):
            rows.set_adamw(steps, **{**OPTIONS, "divisor": 1.0, **changes})
    with pytest.raises(ValueError, match="repeats=0"):
        ScalarRows(layout, 0)


STEPS = [
    (torch.float32, 8.0, None, 0.9),
    (torch.bfloat16, -3.0, 0.37, 0.9),
    (torch.float16, 3.0, 1.0, 0.4),
]


@pytest.mark.parametrize(("dtype", "divisor", "clip", "beta1"), STEPS)
def test_steps_are_torchs(interpreter: Interpreter, dtype: Any, divisor: float, clip: Any, beta1: float) -> None:
    interpreter(check_step, "cpu", dtype, LENGTHS, divisor, clip, beta1)


@pytest.mark.parametrize(("dtype", "shift"), [(torch.bfloat16, 0), (torch.float32, 1), (torch.float16, 1)])
def test_last_gradients_are_folded_in(interpreter: Interpreter, dtype: torch.dtype, shift: int) -> None:
    interpreter(check_last_gradients, "cpu", dtype, LENGTHS, shift)


@pytest.mark.parametrize(("dtype", "repeats"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 2)])
def test_looking_ahead(interpreter: Interpreter, dtype: torch.dtype, repeats: int) -> None:
    interpreter(check_ahead, "cpu", dtype, LENGTHS, repeats)


@pytest.mark.parametrize("repeats", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_the_native_core(interpreter: Interpreter, dtype: torch.dtype, repeats: int) -> None:
    interpreter(check_against_native, dtype, repeats)


CHECKS = [check_rounding, check_compiled, check_limits]
SLOW = (check_rounding, check_compiled)


@pytest.mark.parametrize("check", [slow(check) if check in SLOW else check for check in CHECKS])
def test_rounding_compilation_and_limits(interpreter: Interpreter, check: Any) -> None:
    interpreter(check, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize(("dtype", "divisor", "clip", "beta1"), STEPS)
def test_steps_on_a_gpu(dtype: Any, divisor: float, clip: Any, beta1: float, lengths: tuple[int, ...]) -> None:
    check_step("cuda", dtype, lengths, divisor, clip, beta1)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_last_gradients_and_looking_ahead_on_a_gpu(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    for shift in (0, 1):
        check_last_gradients("cuda", dtype, lengths, shift)
    for repeats in (1, 3):
        check_ahead("cuda", dtype, lengths, repeats)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_rounding_compilation_and_limits_on_a_gpu(check: Any) -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_captured_step_takes_new_scalars() -> None:
    plain, captured = Group("cuda", torch.bfloat16, LARGE), Group("cuda", torch.bfloat16, LARGE)
    for name, buffer in plain.buffers().items():
        getattr(captured, name).copy_(buffer)
    rows = [ScalarRows(group.flat.layout) for group in (plain, captured)]
    scratch = Group("cuda", torch.bfloat16, LARGE)
    rows[1].set_adamw([1] * len(LARGE), divisor=2.0, **OPTIONS)
    adamw_step(scratch.flat.layout, rows[1], **scratch.buffers())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_step(captured.flat.layout, rows[1], **captured.buffers())
        with pytest.raises(ValueError, match="while a CUDA graph is captured"):
            rows[1].set_adamw([1] * len(LARGE), divisor=2.0, **OPTIONS)
    for step, lr in ((1, 1e-3), (2, 5e-4)):
        for row in rows:
            row.set_adamw([step] * len(LARGE), divisor=2.0, **{**OPTIONS, "lr": lr})
        adamw_step(plain.flat.layout, rows[0], **plain.buffers())
        graph.replay()
    for name, buffer in plain.buffers().items():
        assert_bits(captured.buffers()[name], buffer, name)


@pytest.mark.gpu
def test_no_step_compiles_again_or_waits() -> None:
    from paci_rt.kernels.device.adamw import adamw_kernel

    group = Group("cuda", torch.bfloat16, LARGE)
    rows = ScalarRows(group.flat.layout)
    rows.set_adamw([1] * len(LARGE), divisor=2.0, **OPTIONS)
    adamw_step(group.flat.layout, rows, **group.buffers())
    compiled = len(adamw_kernel.device_caches[torch.cuda.current_device()][0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 20):
            rows.set_adamw([step] * len(LARGE), divisor=float(step), **{**OPTIONS, "lr": 1e-3 / step})
            adamw_step(group.flat.layout, rows, **group.buffers())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(adamw_kernel.device_caches[torch.cuda.current_device()][0]) == compiled


def test_bytes() -> None:
    assert adamw_bytes(1, torch.bfloat16) == 30
    assert adamw_bytes(1, torch.float32) == 28
    assert adamw_bytes(1, torch.bfloat16, fused_gradient=True) == 32
    assert adamw_ahead_bytes(1, torch.float16) == 18
    assert adamw_ahead_bytes(1, torch.float32) == 24
