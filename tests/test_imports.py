"""Who may import whom. The layers in docs and code stay apart because this test fails when they do not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_FREE = ("action", "schedules", "policies", "lowering", "simulate", "timegrid", "planner")
TOP = ("cli", "cli_simulate", "cli_plan", "train", "__main__")
CONCRETE_TRANSPORTS = ("local", "gloo", "shm", "nccl", "ipc", "device")


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, root: Path) -> set[str]:
    """Every module that a file imports anywhere in it; ``from a import b`` gives both a and a.b."""
    name = module_name(file, root)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything that a module imports, directly or through modules of the package (its ``__init__`` aside)."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in graph.get(todo.pop(), set()):
            if target not in seen:
                seen.add(target)
                if target != "paci_rt":
                    todo.append(target)
    return seen


def violations(root: Path) -> Iterator[str]:
    """One line for every import under ``root`` that breaks a rule."""
    files = {module_name(file, root): file for file in sorted((root / "paci_rt").rglob("*.py"))}
    graph = {name: imports_of(file, root) for name, file in files.items()}
    concrete = {f"paci_rt.transport.{name}" for name in CONCRETE_TRANSPORTS}
    schedules = {name for name in files if name.startswith("paci_rt.schedules.")}
    for name, direct in graph.items():
        ours = {target for target in direct if within(target, "paci_rt")}
        if any(within(target, "paci_rt._C") for target in ours) and name != "paci_rt.native":
            yield f"{name} imports paci_rt._C: only paci_rt.native may"
        if name == "paci_rt.action" and ours:
            yield f"paci_rt.action imports {sorted(ours)}: it stands below everything"
        if any(within(name, f"paci_rt.{part}") for part in TORCH_FREE):
            for target in sorted(reachable(name, graph)):
                if within(target, "torch"):
                    yield f"{name} reaches {target}: schedules and their lowering work without torch"
        if name == "paci_rt.executor":
            banned = concrete | schedules | {"paci_rt.native"}
            for target in sorted(ours):
                if any(within(target, part) for part in banned):
                    yield f"{name} imports {target}: the executor knows no concrete schedule, transport or kernel"
        if not any(within(name, f"paci_rt.{part}") for part in TOP):
            for target in sorted(ours):
                if any(within(target, f"paci_rt.{part}") for part in TOP):
                    yield f"{name} imports {target}: nothing below the commands imports them"
        if any(within(target, "triton") for target in direct) and not within(name, "paci_rt.kernels"):
            yield f"{name} imports triton: only paci_rt.kernels may"
        if name == "paci_rt":
            for target in sorted(ours):
                if within(target, "paci_rt.kernels"):
                    yield f"{name} imports {target}: the package works without Triton"
        if any(within(target, "benchmarks") for target in direct):
            yield f"{name} imports benchmarks"


def test_the_package_keeps_its_layers() -> None:
    assert list(violations(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("flat.py", "from paci_rt import _C", "only paci_rt.native may"),
        ("flat.py", "def f():\n    import paci_rt._C as c", "only paci_rt.native may"),
        ("action.py", "from . import errors", "stands below everything"),
        ("schedules/paci.py", "import torch", "paci_rt.schedules.paci reaches torch"),
        ("lowering.py", "from paci_rt.helper import x", "paci_rt.lowering reaches torch.nn"),
        ("planner.py", "from torch import nn", "paci_rt.planner reaches torch"),
        ("policies.py", "import torch", "paci_rt.policies reaches torch"),
        ("simulate.py", "from paci_rt.helper import x", "paci_rt.simulate reaches torch.nn"),
        ("executor.py", "from .transport.gloo import G", "imports paci_rt.transport.gloo"),
        ("executor.py", "from paci_rt.schedules import paci", "imports paci_rt.schedules.paci"),
        ("executor.py", "from paci_rt import native", "imports paci_rt.native"),
        ("pipeline.py", "from .train import gpt", "nothing below the commands"),
        ("launch.py", "import paci_rt.cli", "nothing below the commands"),
        ("planner.py", "from paci_rt import cli_simulate", "nothing below the commands"),
        ("train/gpt.py", "import benchmarks.kernels", "imports benchmarks"),
        ("fused.py", "import triton.language as tl", "only paci_rt.kernels may"),
        ("__init__.py", "from paci_rt.kernels import accumulate", "works without Triton"),
    ],
)
def test_every_rule_bites(tmp_path: Path, file: str, text: str, message: str) -> None:
    package = tmp_path / "paci_rt"
    for folder in ("", "schedules", "transport", "train"):
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").write_text("")
    (package / "helper.py").write_text("import torch.nn")
    for other in ("schedules/paci.py", "transport/gloo.py", "native.py", "train/gpt.py"):
        (package / other).write_text("")
    assert list(violations(tmp_path)) == []
    (package / file).write_text(text)
    assert any(message in line for line in violations(tmp_path))


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "needs Triton 3.6 or later, this is 3.5.1" in done.stdout


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "paci_rt.kernels needs Triton" in done.stdout
    assert "pip install 'paci-rt[cuda13]'" in done.stdout
