"""The cases of ``benchmarks/kernels.py --device cuda``: run under the interpreter, and rivals that do the same work."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import kernels_cupy
from support.deadlines import deadline
from support.interpreted import Interpreter

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = [(33, 40), (65,), (7, 16), (16,)]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def small_cases(device: str) -> Any:
    import kernels_cuda
    import kernels_cuda_sides

    kernels_cuda_sides.BLOCK_SHAPES = SMALL
    return kernels_cuda


def run_flat_cases() -> list[dict[str, Any]]:
    cuda = small_cases("cpu")
    cases = [case for make in (cuda.flat_cases, cuda.other_updates) for case in make(1000, "cpu")]
    return [cuda.run_case(case, 2, cuda.Copy(1000, "cpu"), "cpu") for case in cases]


def run_wgrad_case() -> dict[str, Any]:
    cuda = small_cases("cpu")
    case = cuda.wgrad_case(64, 32, 16, "cpu", lambda run: 1.0)
    row: dict[str, Any] = cuda.run_case(case, 1, cuda.Copy(1000, "cpu"), "cpu")
    return row


def run_with_failures() -> dict[str, Any]:
    """Everything in small, where one rival and one of our own cases fail; what was kept behind each case, too."""
    cuda = small_cases("cpu")
    kept: list[int] = []

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    def small(rows: int, n: int, k: int, device: str) -> Any:
        return cuda.CudaCase(name=f"wgrad {rows}x{n}x{k}", bytes_moved=8, ours=lambda: None)

    changed = {"SETTLE_S": 0.0, "LINEAR_SHAPES": [(32, 16)], "wgrad_case": small}
    with (
        mock.patch.multiple(cuda, **changed),
        mock.patch.object(cuda.Buffers, "step", broken),
        mock.patch.object(cuda.TorchSide, "window", broken),
    ):
        rows = cuda.run_all(1000, 2, rows=64, device="cpu", keep=lambda rows: kept.append(len(rows)))
    return {"rows": rows, "kept": kept}


def run_with_a_broken_rival() -> dict[str, Any]:
    cuda = small_cases("cpu")
    rivals = {"torch": lambda: 1 // 0, "other": lambda: None}
    asked = tuple(cuda.Asked(over=name, rivals=(name,), at_least=0.0) for name in rivals)
    case = cuda.CudaCase(name="x", bytes_moved=8, ours=lambda: sum(range(1000)), rivals=rivals, asked=asked)
    row: dict[str, Any] = cuda.run_case(case, 2, cuda.Copy(1000, "cpu"), "cpu")
    return row


def check_sides(device: str) -> None:
    """Our window and torch's make the same weights of the same gradients."""
    import kernels_cuda_sides

    cuda = small_cases(device)
    buffers = cuda.Buffers(1000, device)
    theirs = cuda.TorchSide(buffers.shapes, buffers.grads, device)
    parts = [slice(offset, offset + length) for offset, length in buffers.layout.segments]
    for param, total, part in zip(theirs.params, theirs.sums, parts, strict=True):
        state = theirs.optimizer.state[param]
        state["step"].fill_(kernels_cuda_sides.FIRST_STEP - 1)
        total.zero_()
        for name, view in (
            ("master", param.detach()),
            ("exp_avg", state["exp_avg"]),
            ("exp_avg_sq", state["exp_avg_sq"]),
        ):
            view.copy_(buffers.flat[name][part].view(view.shape))
    before = buffers.flat["master"].clone()
    buffers.window()
    theirs.window()
    moved = (buffers.flat["master"] - before).abs().max()
    for param, weight, part in zip(theirs.params, theirs.weights, parts, strict=True):
        ours = buffers.flat["master"][part].view(param.shape)
        # The steps are of size 1e-3; both sides round to fp32, in another order.
        assert float((param.detach() - ours).abs().max()) < 2e-6 < float(moved)
        assert torch.equal(weight, param.detach().bfloat16())
    assert not any(total.any() for total in theirs.sums)


def check_other_sides(device: str) -> None:
    """One step of NAdam and of Lion, ours and torch's, makes the same weights."""
    import kernels_cuda_sides

    cuda = small_cases(device)
    for name, make_optimizer, size in (("nadam", cuda.torch_nadam, 1e-3), ("lion", cuda.foreach_lion, 1e-4)):
        buffers = cuda.Buffers(1000, device)
        theirs = cuda.TorchSide(buffers.shapes, buffers.grads, device, make_optimizer)
        momenta = [0.9 * (1 - 0.5 * 0.96 ** (step * 4e-3)) for step in range(1, kernels_cuda_sides.FIRST_STEP)]
        parts = [slice(offset, offset + length) for offset, length in buffers.layout.segments]
        for param, total, part in zip(theirs.params, theirs.sums, parts, strict=True):
            state = theirs.optimizer.state[param]
            if name == "nadam":
                state["step"].fill_(kernels_cuda_sides.FIRST_STEP - 1)
                state["mu_product"].fill_(math.prod(momenta))
            views = {"master": param.detach(), "grad_sum": total, **state}
            for flat in ("master", "grad_sum", "exp_avg", *(["exp_avg_sq"] if name == "nadam" else [])):
                views[flat].copy_(buffers.flat[flat][part].view(param.shape))
        before = buffers.flat["master"].clone()
        getattr(buffers, name)()
        theirs.step()
        assert float((buffers.flat["master"] - before).abs().max()) > size / 2
        for param, weight, part in zip(theirs.params, theirs.weights, parts, strict=True):
            ours = buffers.flat["master"][part].view(param.shape)
            # Both sides round to fp32, in another order; weights are of size 1 and steps of 1e-3 and less.
            assert float((param.detach() - ours).abs().max()) < 2e-6, name
            assert torch.equal(weight, param.detach().bfloat16())
        assert not any(total.any() for total in theirs.sums)


@pytest.mark.slow
def test_flat_cases_run_and_are_judged(interpreter: Interpreter) -> None:
    rows = interpreter(run_flat_cases)
    judged = {row["measure"]: row for case in rows for row in case["measures"]}
    targets = {name: row["target"] for name, row in judged.items()}
    assert targets == {
        "accumulate bf16": ">= 0.92",
        "adamw bf16": ">= 0.92",
        "nadam bf16": None,
        "lion bf16": None,
        "window of 8 over torch": ">= 1.5",
        "window of 8 over CuPy": ">= 1",
    }
    assert judged["window of 8 over CuPy"]["ok"] is None
    assert "CuPy" in judged["window of 8 over CuPy"]["note"]
    moved = {case["case"]: case["gb_per_s"] * case["ours_ms"] for case in rows}
    for name, bytes_each in (("accumulate", 10), ("nadam", 30), ("lion", 22)):
        assert moved[f"{name} bf16"] / moved["adamw bf16"] == pytest.approx(bytes_each / 30)
    assert {"nadam bf16", "lion bf16"} <= {case["case"] for case in rows if "torch" in case["ratios"]}
    json.dumps(rows)


@pytest.mark.slow
def test_a_case_that_fails_costs_no_other(interpreter: Interpreter) -> None:
    found = interpreter(run_with_failures)
    rows = {row["case"]: row for row in found["rows"]}
    for name in ("adamw bf16", "adamw bf16 + last gradients", "window of 8"):
        (judged,) = rows[name]["measures"]
        assert (judged["ok"], judged["target"], judged["note"]) == (False, "to run", "RuntimeError: no such kernel")
    assert rows["accumulate bf16"]["copy_share"] > 0 and "copy_share" in rows["wgrad 64x32x16"]
    assert found["kept"] == list(range(2, len(found["rows"]) + 1))


def test_a_rival_that_fails_costs_its_own_row(interpreter: Interpreter) -> None:
    row = interpreter(run_with_a_broken_rival)
    torch_row, other = row["measures"]
    assert torch_row["ok"] is None and torch_row["note"] == "torch failed: integer division or modulo by zero"
    assert other["ok"] is True and set(row["ratios"]) == {"other"}


def test_wgrad_is_held_against_the_faster_of_two_pairs(interpreter: Interpreter) -> None:
    row = interpreter(run_wgrad_case)
    (judged,) = row["measures"]
    assert (judged["measure"], judged["target"]) == ("wgrad 64x32x16 over the unfused pair", ">= 1.1")
    assert judged["value"] == min(row["ratios"]["pair"], row["ratios"]["pair, our sum"])


def test_torchs_window_does_what_ours_does(interpreter: Interpreter) -> None:
    interpreter(check_sides, "cpu")


def test_torchs_nadam_and_lion_do_what_ours_do(interpreter: Interpreter) -> None:
    interpreter(check_other_sides, "cpu")


def test_every_cpu_case_runs() -> None:
    import kernels as bench

    rows = [bench.run_case(build(), 2, judge=False) for build in bench.cases(4096)]
    names = [row["case"] for row in rows]
    assert len(set(names)) == len(names)
    peers = {row["case"]: row["peer"] for row in rows}
    assert peers["adamw step+reset float32"].startswith("torch.optim.AdamW(fused=True)")
    assert peers["nadam step+reset bfloat16"].startswith("torch.optim.NAdam(foreach=True)")
    assert peers["lion step+reset float32"].startswith("Lion by torch._foreach_*")


def test_the_lion_of_lists_is_lion() -> None:
    from kernels_lion import ForeachLion
    from paci_rt.optim import Lion
    from paci_rt.optim.bind import bind_optimizer

    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(torch.arange(-50.0, 50.0)) for _ in range(2))
    torch.manual_seed(0)
    bound, rival = bind_optimizer(Lion([ours], **options), {"w": ours}), ForeachLion([theirs], **options)
    for _ in range(5):
        theirs.grad = torch.randn(100)
        bound.accumulate(ours, theirs.grad)
        bound.update(1)
        rival.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)


def test_a_missing_cupy_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")

    def absent(name: str) -> str:
        raise kernels_cupy.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kernels_cupy.metadata, "version", absent)
    assert kernels_cupy.why_not() == "cupy not installed: pip install cupy-cuda12x"
    monkeypatch.setattr(kernels_cupy.metadata, "version", lambda name: "14.0")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert (kernels_cupy.why_not() or "").startswith("cupy-cuda12x does not run here: ")


def test_scalars_are_those_of_our_rows() -> None:
    divisor, decay, c1, b2, c2, unbias, eps, step = kernels_cupy.scalars(10, 8.0, OPTIONS)
    assert (divisor, decay, eps) == (8.0, 1 - 1e-5, 1e-8)
    assert (c1, b2, c2) == pytest.approx((0.1, 0.999, 0.001))
    assert unbias == pytest.approx((1 - 0.999**10) ** -0.5)
    assert step == pytest.approx(1e-3 / (1 - 0.9**10))
    assert len(kernels_cupy.SCALARS) == 8


def test_cupys_kernels_compile(tmp_path: Path) -> None:
    """By nvcc, since CuPy needs a GPU for that: the raw source, and the elementwise bodies in a loop."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    values = ", ".join(f"float {name}" for name in kernels_cupy.SCALARS)
    bodies = f"""
        __global__ void put(short g, float& total) {{ total = {kernels_cupy.WIDEN}; }}
        __global__ void step(const float& total, const float* clip, {values}, float& w, float& m, float& v,
                             short& low) {{
          {kernels_cupy.STEP}
        }}"""
    source = tmp_path / "cupy.cu"
    source.write_text(kernels_cupy.SOURCE + bodies)
    command = [nvcc, "-arch=sm_90", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "cupy.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(300))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes spill stores") >= 2


def test_without_a_gpu_the_script_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(120))
    assert done.returncode == 2
    assert "torch sees no CUDA device here" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rivals_do_the_same_work_on_a_gpu() -> None:
    check_sides("cuda")
    check_other_sides("cuda")
    reason = kernels_cupy.why_not()
    if reason is not None:
        pytest.skip(reason)
    import kernels_cuda_sides

    cuda = small_cases("cuda")
    for raw in (False, True):
        buffers = cuda.Buffers(1000, "cuda")
        grads = torch.zeros(buffers.layout.numel, device="cuda", dtype=torch.bfloat16)
        for (offset, length), grad in zip(buffers.layout.segments, buffers.grads, strict=True):
            grads[offset : offset + length] = grad
        flat = {name: tensor.clone() for name, tensor in buffers.flat.items()}
        weight = buffers.weight.clone()
        values = kernels_cupy.scalars(kernels_cuda_sides.FIRST_STEP, float(cuda.WINDOW), kernels_cuda_sides.OPTIONS)
        limits: dict[str, Any] = {"max_norm": kernels_cuda_sides.MAX_NORM, "micro_batches": cuda.WINDOW}
        side = kernels_cupy.CupySide(grads, flat, weight, values=values, raw=raw, **limits)
        buffers.window()
        side.window()
        torch.cuda.synchronize()
        for offset, length in buffers.layout.segments:
            part = slice(offset, offset + length)
            assert torch.equal(flat["grad_sum"][part], buffers.flat["grad_sum"][part])  # additions in the same order
            assert float((flat["master"][part] - buffers.flat["master"][part]).abs().max()) < 2e-6
            assert torch.equal(weight[part], flat["master"][part].bfloat16())
        before = flat["exp_avg"].clone()
        side.step()
        side.accumulate()
        torch.cuda.synchronize()
        assert not torch.equal(flat["exp_avg"], before)
