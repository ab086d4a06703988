"""Who may import whom. The levels of the architecture hold because this test fails when they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import imports
from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[1]


def test_the_package_keeps_its_levels() -> None:
    assert list(imports.violations(ROOT)) == []


def test_the_picture_is_that_of_the_imports() -> None:
    assert imports.PICTURE.read_text(encoding="utf-8") == imports.picture(ROOT), "run python tools/imports.py"


def test_every_package_has_a_level_and_a_meaning() -> None:
    listed = [name for level in imports.LEVELS for name in level]
    assert sorted(listed) == sorted(imports.MEANING)
    assert len(set(listed)) == len(listed)
    there = {imports.package_of(name) for name in imports.files_of(ROOT)} - {""}
    assert set(listed) - there <= {"hf"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("optim/flat.py", "from paci_rt import _C", "only paci_rt.native may"),
        ("optim/flat.py", "def f():\n    import paci_rt._C as c", "only paci_rt.native may"),
        ("action.py", "from . import errors", "errors stands above action"),
        ("clock.py", "import torch", "paci_rt.clock reaches torch"),
        ("schedules/paci.py", "import torch", "paci_rt.schedules.paci reaches torch"),
        ("schedules/lowering.py", "from paci_rt.transport.base import x", "transport stands above schedules"),
        ("planner/choose.py", "from torch import nn", "paci_rt.planner.choose reaches torch"),
        ("planner/choose.py", "from paci_rt.profiling import x", "profiling stands above planner"),
        ("simulate/run.py", "from paci_rt.native import x", "native stands above simulate"),
        ("simulate/costs.py", "from paci_rt.simulate import run", "import circle: paci_rt.simulate.costs"),
        ("runtime/executor.py", "from ..transport.gloo import G", "no schedule, transport or kernel by name"),
        ("runtime/executor.py", "from paci_rt.schedules import paci", "no schedule, transport or kernel by name"),
        ("runtime/stage.py", "from paci_rt import native", "no schedule, transport or kernel by name"),
        ("pipelining.py", "from .train import gpt", "train stands above pipelining"),
        ("launch/parent.py", "import paci_rt.cli", "cli stands above launch"),
        ("weights/base.py", "def f():\n    from paci_rt.runtime import stage", "runtime stands above weights"),
        ("optim/flat.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import paci_rt.weights.base",
         "weights stands above optim"),
        ("train/gpt.py", "import benchmarks.kernels", "imports benchmarks"),
        ("optim/fused.py", "import triton.language as tl", "only paci_rt.kernels may"),
        ("__init__.py", "from paci_rt.kernels import accumulate", "works without Triton"),
        ("helper.py", "", "helper is in no level"),
    ],
)  # fmt: skip
def test_every_rule_bites(tmp_path: Path, file: str, text: str, message: str) -> None:
    package = tmp_path / "paci_rt"
    (tmp_path / "kernels").mkdir()
    for folder in ("", "schedules", "transport", "train", "optim", "runtime", "weights", "simulate", "planner",
                   "launch", "profiling", "cli"):  # fmt: skip
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").write_text("")
    for other in ("schedules/paci.py", "transport/gloo.py", "transport/base.py", "native.py", "train/gpt.py",
                  "errors.py", "weights/base.py", "runtime/stage.py"):  # fmt: skip
        (package / other).write_text("")
    (package / "simulate" / "run.py").write_text("from paci_rt.simulate import costs")
    (package / "simulate" / "costs.py").write_text("")
    (tmp_path / "kernels" / "__init__.py").write_text("import triton")
    assert list(imports.violations(tmp_path)) == []
    (package / file).write_text(text)
    assert any(message in line for line in imports.violations(tmp_path)), list(imports.violations(tmp_path))


def test_importing_touches_neither_environment_nor_gpu_nor_nccl() -> None:
    program = """
import os, sys, torch
loaded = set(sys.modules)
before, maps = dict(os.environ), open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
import paci_rt
assert dict(os.environ) == before, "environment changed"
assert not torch.cuda.is_initialized(), "CUDA initialised"
assert not torch.distributed.is_initialized(), "torch.distributed initialised"
if maps and "libnccl" not in maps:
    assert "libnccl" not in open("/proc/self/maps").read(), "NCCL loaded"
for module in ("matplotlib", "tqdm", "triton", "paci_rt.kernels", "paci_rt.cli", "paci_rt.train"):
    assert module not in sys.modules or module in loaded, module + " imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=deadline(120)
    )
    assert done.returncode == 0, done.stderr


def test_kernels_refuse_a_triton_that_flushes_subnormals() -> None:
    program = """
import sys, types
sys.modules["triton"] = types.SimpleNamespace(__version__="3.5.1")
import paci_rt
try:
    import paci_rt.kernels
except paci_rt.TritonMissingError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=deadline(120)
    )
    assert done.returncode == 0, done.stderr
    assert "needs Triton 3.6 or later, this is 3.5.1" in done.stdout


@pytest.mark.slow
def test_kernels_without_triton_say_how_to_get_it() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import paci_rt
try:
    import paci_rt.kernels
except paci_rt.TritonMissingError as error:
    assert isinstance(error, ImportError)
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=deadline(120)
    )
    assert done.returncode == 0, done.stderr
    assert "paci_rt.kernels needs Triton" in done.stdout
    assert "pip install 'paci-rt[cuda13]'" in done.stdout
