"""What ``gpu.py`` needs of a machine, and what it notes about one.

torch and Triton are asked in a process of their own (``PROBE``), so that this one holds no memory on the GPU and
survives a torch that does not import.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PROBE_LIMIT_S = 120.0
TRITON = (3, 6)
SETUPTOOLS = (77, 0)
TORCH = (2, 6)

PROBE = """
import importlib.metadata as metadata, json, sys
found = {"python": sys.version.split()[0], "modules": {}}
for name in ("torch", "triton", "numpy", "setuptools", "pybind11", "pytest", "cmake", "ninja", "packaging"):
    try:
        found["modules"][name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found["modules"][name] = None
for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
    try:
        found["modules"].setdefault("cupy", metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
try:
    import torch
    found["torch_cuda"] = torch.version.cuda
    torch.zeros(1, device="cuda")
    found["gpus"] = [
        {
            "name": props.name,
            "compute_capability": f"{props.major}.{props.minor}",
            "memory_bytes": props.total_memory,
            "multiprocessors": props.multi_processor_count,
        }
        for props in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("PROBED " + json.dumps(found))
"""


def examine(python: str, root: Path) -> dict[str, Any]:
    """Everything that the report says about the machine.

    Keys: ``date revision python platform processor cores modules torch_cuda torch_error gpus driver nvcc cxx tools``;
    ``probe_error`` where the interpreter itself could not be asked.
    """
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(root),
        "platform": platform.platform(terse=True),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "driver": driver(),
        "nvcc": nvcc(),
        "cxx": compiler(),
        "tools": {name: tool(name, python) for name in ("cmake", "ninja")},
        "interpreter": python,
    }
    return {**found, **probe(python)}


def probe(python: str) -> dict[str, Any]:
    """What an interpreter has: its version, packages, torch's CUDA and GPUs."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"probe_error": str(error), "modules": {}}
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROBED ")]
    if not lines:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"probe_error": said, "modules": {}}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("PROBED "))
    return found


def problems(found: Mapping[str, Any]) -> list[str]:
    """What stands in the way, one sentence each with its remedy; empty where nothing does."""
    if found.get("probe_error"):
        return [
            f"{found['interpreter']} could not be asked what it has ({found['probe_error']}): "
            "name another one with make gpu PYTHON=..."
        ]
    modules, wrong = found["modules"], []
    if modules["torch"] is None:
        wrong.append(f"{found['interpreter']} has no torch: pip install torch, or name another with PYTHON=...")
    elif below(modules["torch"], TORCH):
        wrong.append(f"torch is {modules['torch']}: paci_rt needs 2.6 or later, pip install --upgrade torch")
    elif found.get("torch_cuda") is None:
        error = f" ({found['torch_error']})" if found.get("torch_error") else ""
        wrong.append(
            f"torch {modules['torch']} was built without CUDA{error}: install a CUDA build, see "
            "https://pytorch.org/get-started/locally"
        )
    elif not found.get("gpus"):
        wrong.append(
            f"torch {modules['torch']} (CUDA {found['torch_cuda']}) sees no GPU ({found.get('torch_error')}): run this "
            "where nvidia-smi shows one, with a driver for that CUDA version, and look at CUDA_VISIBLE_DEVICES"
        )
    if modules["triton"] is None:
        wrong.append("Triton is not installed: pip install 'triton>=3.6' (torch's CUDA builds bring it)")
    elif below(modules["triton"], TRITON):
        wrong.append(
            f"Triton is {modules['triton']}: the kernels need 3.6 or later, pip install --upgrade torch triton"
        )
    if found["nvcc"] is None:
        wrong.append(
            "there is no nvcc on PATH, nor in CUDA_HOME: install the CUDA toolkit, 12.0 or later, with its bin on PATH"
        )
    if found["cxx"] is None:
        wrong.append("there is no C++ compiler: install g++ (Debian: apt install g++), or set CXX")
    for name, path in found["tools"].items():
        if path is None:
            wrong.append(f"there is no {name}: pip install {name}")
    for name in ("pybind11", "pytest", "numpy", "packaging"):
        if modules[name] is None:
            wrong.append(f"{name} is not installed: pip install {name}")
    if modules["setuptools"] is None or below(modules["setuptools"], SETUPTOOLS):
        wrong.append(f"setuptools is {modules['setuptools'] or 'not installed'}: pip install 'setuptools>=77'")
    return wrong


def below(version: str, least: tuple[int, int]) -> bool:
    """Whether a version's first two numbers are smaller."""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return tuple([*numbers, 0][:2]) < least


def heading(found: Mapping[str, Any]) -> str:
    """Two lines that say what was measured on what."""
    gpu = (found.get("gpus") or [{}])[0]
    modules, nvcc_version = found["modules"], (found.get("nvcc") or {}).get("version")
    what = [
        f"GPU {gpu.get('name', 'none')}, driver {found.get('driver') or 'unknown'}",
        f"CUDA {found.get('torch_cuda') or 'none'} (torch), {nvcc_version or 'none'} (nvcc)",
        f"torch {modules.get('torch')}",
        f"Triton {modules.get('triton')}",
        f"CuPy {modules.get('cupy')}",
        f"Python {found.get('python')}",
    ]
    return f"{'; '.join(what)}\nrevision {found['revision']}; {found['date']}"


# --- single facts ---


def revision(root: Path) -> str:
    """The commit that is checked out, with ``+`` where files differ from it; ``unknown`` outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=30)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def driver() -> str | None:
    """Version of NVIDIA's driver."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def nvcc() -> dict[str, str] | None:
    """Path and version of the CUDA compiler, None without one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return {"path": path, "version": found[1] if found else "unknown"}


def compiler() -> str | None:
    """The C++ compiler that CMake would take."""
    wanted = os.environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path is not None), None)


def tool(name: str, python: str) -> str | None:
    """A build tool: beside the interpreter, as in a virtual environment, else on PATH, as setup.py looks for it."""
    beside = str(Path(shutil.which(python) or python).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def processor() -> str:
    """The CPU's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
