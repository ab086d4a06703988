"""The cases of ``benchmarks/kernels.py --device cuda``: run under the interpreter, and rivals that do the same work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import Interpreter

import kernels_cupy

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = [(33, 40), (65,), (7, 16), (16,)]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def small_cases(device: str) -> Any:
    import kernels_cuda

    kernels_cuda.BLOCK_SHAPES = SMALL
    return kernels_cuda


def run_flat_cases() -> list[dict[str, Any]]:
    cuda = small_cases("cpu")
    return [cuda.run_case(case, 2, cuda.Copy(1000, "cpu"), "cpu") for case in cuda.flat_cases(1000, "cpu")]


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
    cuda = small_cases(device)
    buffers = cuda.Buffers(1000, device)
    theirs = cuda.TorchSide(buffers.shapes, buffers.grads, device)
    parts = [slice(offset, offset + length) for offset, length in buffers.layout.segments]
    for param, total, part in zip(theirs.params, theirs.sums, parts, strict=True):
        state = theirs.optimizer.state[param]
        state["step"].fill_(cuda.FIRST_STEP - 1)
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


def test_flat_cases_run_and_are_judged(interpreter: Interpreter) -> None:
    rows = interpreter(run_flat_cases)
    judged = {row["measure"]: row for case in rows for row in case["measures"]}
    targets = {name: row["target"] for name, row in judged.items()}
    assert targets == {
        "accumulate bf16": ">= 0.92",
        "adamw bf16": ">= 0.92",
        "window of 8 over torch": ">= 1.5",
        "window of 8 over CuPy": ">= 1",
    }
    assert judged["window of 8 over CuPy"]["ok"] is None
    assert "CuPy" in judged["window of 8 over CuPy"]["note"]
    json.dumps(rows)


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes spill stores") >= 2


def test_without_a_gpu_the_script_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "torch sees no CUDA device here" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rivals_do_the_same_work_on_a_gpu() -> None:
    check_sides("cuda")
    reason = kernels_cupy.why_not()
    if reason is not None:
        pytest.skip(reason)
    cuda = small_cases("cuda")
    for raw in (False, True):
        buffers = cuda.Buffers(1000, "cuda")
        grads = torch.zeros(buffers.layout.numel, device="cuda", dtype=torch.bfloat16)
        for (offset, length), grad in zip(buffers.layout.segments, buffers.grads, strict=True):
            grads[offset : offset + length] = grad
        flat = {name: tensor.clone() for name, tensor in buffers.flat.items()}
        weight = buffers.weight.clone()
        values = kernels_cupy.scalars(cuda.FIRST_STEP, float(cuda.WINDOW), cuda.OPTIONS)
        limits: dict[str, Any] = {"max_norm": cuda.MAX_NORM, "micro_batches": cuda.WINDOW}
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
