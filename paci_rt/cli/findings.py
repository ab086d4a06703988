"""What this machine has: what was built, found and usable, and what to do about what is not.

Nothing here creates a context on a GPU: GPUs are asked for through ``nvidia-smi``, package metadata and, last, the
native core, which asks NVIDIA's driver for their number; the libraries that would do more are not imported.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import paci_rt
from paci_rt import launch, native
from paci_rt.errors import NativeCoreError, NcclError, StageFailed
from paci_rt.report import text
from paci_rt.transport.nccl import load_nccl
from paci_rt.transport.shm import why_unusable

GLOO_TIMEOUT_S = 60.0
NVIDIA_SMI_TIMEOUT_S = 20.0
GPU_FIELDS = ("index", "name", "memory.total", "compute_cap", "driver_version")


def examine(*, try_gloo: bool = True) -> dict[str, Any]:
    """All findings, JSON-ready. ``usable``: training works here; ``advice``: what to do, by name of the finding.

    Args:
        try_gloo: start two processes and let them exchange a tensor.
    """
    gpus = find_gpus()
    findings: dict[str, Any] = {
        "paci_rt": paci_rt.__version__,
        "native": {"version": paci_rt.__version__, **native.info()},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "gloo": _gloo(try_gloo),
        "shm": _shm(),
        "cuda": _cuda(gpus),  # after gloo: processes are not started once the driver is up
        "nccl": _nccl(),
        "triton": _package("triton"),
        "cupy": _package("cupy-cuda12x", "cupy-cuda13x", "cupy"),
        "gpus": gpus,
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "matplotlib": _package("matplotlib"),
        "tqdm": _package("tqdm"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
    findings["advice"] = _advice(findings)
    findings["usable"] = findings["native"]["available"] and findings["gloo"]["available"]
    return findings


def report_text(findings: dict[str, Any]) -> str:
    """The findings as a table, and what to do below it."""
    rows = [(name, state, what) for name, state, what in _rows(findings)]
    widths = [max(len(row[at]) for row in rows) for at in range(2)]
    lines = [f"{name:<{widths[0]}}  {state:<{widths[1]}}  {what}".rstrip() for name, state, what in rows]
    advice = [f"  {name}: {what}" for name, what in findings["advice"].items()]
    verdict = "This machine can train." if findings["usable"] else "This machine cannot train yet."
    return "\n".join([*lines, "", verdict, *(["", "What to do:", *advice] if advice else [])])


def _rows(findings: dict[str, Any]) -> list[tuple[str, str, str]]:
    core, gloo, cuda = findings["native"], findings["gloo"], findings["cuda"]
    built = f"{core['version']}, {core['isa']} (of {', '.join(core['isas'])})" if core["available"] else core["error"]
    torch_build = f"for CUDA {findings['torch']['cuda']}" if findings["torch"]["cuda"] else "for the CPU"
    rows = [
        ("native core", _state(core["available"]), str(built)),
        ("torch", "ok", f"{findings['torch']['version']}, built {torch_build}"),
        ("gloo", _state(gloo["available"]), gloo["detail"]),
        ("shm", _state(findings["shm"]["available"]), findings["shm"]["detail"]),
        ("cuda", _state(cuda["available"]), cuda["detail"]),
    ]
    rows.append(("nccl", _state(findings["nccl"]["available"]), _nccl_detail(findings["nccl"])))
    for name in ("triton", "cupy"):
        found = findings[name]
        rows.append((name, _state(found["available"]), found["version"] or "not installed"))
    for gpu in findings["gpus"]:
        memory = text.size(gpu["memory_bytes"]) if gpu["memory_bytes"] else "unknown memory"
        detail = f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability'] or 'unknown'}"
        rows.append((f"gpu {gpu['index']}", "found", detail))
    if not findings["gpus"]:
        rows.append(("gpus", "none", ""))
    rows.append(("cores", "ok", f"{findings['cores']}: room for as many stages with one thread each"))
    rows.append(("memory", "ok", text.size(findings["memory_bytes"]) if findings["memory_bytes"] else "unknown"))
    for name, purpose in (("matplotlib", "plots of compare"), ("tqdm", "live progress bar")):
        found = findings[name]
        rows.append((name, _state(found["available"]), f"{found['version'] or 'not installed'} ({purpose})"))
    rows.append(("python", "ok", f"{findings['python']} on {findings['platform']}"))
    return rows


def _state(available: bool) -> str:
    return "ok" if available else "missing"


def _advice(findings: dict[str, Any]) -> dict[str, str]:
    advice = {}
    if not findings["native"]["available"]:
        advice["native core"] = (
            "run `pip install -e .` in the source folder; it needs a C++17 compiler (Debian: apt install g++, "
            "Fedora: dnf install gcc-c++, macOS: xcode-select --install)"
        )
    gloo = findings["gloo"]
    if not gloo["available"]:
        advice["gloo"] = "use --transport local, which needs one process only; " + (
            "or check that processes may connect to each other on 127.0.0.1"
            if gloo["tried"]
            else "or install a torch that was built with torch.distributed"
        )
    if findings["native"]["available"] and not findings["shm"]["available"]:
        advice["shm"] = "nothing need be done: --transport auto takes gloo then; the reason stands above"
    if findings["gpus"] and findings["torch"]["cuda"] is None:
        advice["torch"] = (
            "there is a GPU, but this torch was built for the CPU: install a CUDA build, see "
            "https://pytorch.org/get-started/locally"
        )
    cuda = findings["cuda"]
    if findings["gpus"] and findings["native"]["available"] and not cuda["core"]:
        advice["cuda"] = f"{cuda['reason']}: PACI_RT_CUDA=on pip install -e . in the source folder builds it" + (
            "" if cuda["nvcc"] else "; first install the CUDA toolkit (12.0 or later), so that nvcc is on PATH"
        )
    elif findings["gpus"] and cuda["core"] and not cuda["devices"]:
        advice["cuda"] = cuda["reason"]
    if not findings["gpus"]:
        advice["gpus"] = "if this machine has one, install NVIDIA's driver, so that nvidia-smi runs; else nothing to do"
    if findings["gpus"]:
        for name in ("triton", "cupy"):
            if not findings[name]["available"]:
                major = (findings["torch"]["cuda"] or "12").split(".")[0]
                advice[name] = f'pip install "paci-rt[cuda{major}]"'
        if not findings["nccl"]["available"]:
            advice["nccl"] = findings["nccl"]["reason"]
    for name, extra in (("matplotlib", "plot"), ("tqdm", "train")):
        if not findings[name]["available"]:
            advice[name] = f'pip install "paci-rt[{extra}]"'
    return advice


def _exchange(ctx: launch.Context) -> float:
    total = torch.ones(1) * (ctx.rank + 1)
    dist.all_reduce(total)
    return float(total)


def _gloo(try_it: bool) -> dict[str, Any]:
    """Whether stages can live in processes of their own."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return {"available": False, "tried": False, "detail": "this torch was built without it"}
    if not try_it:
        return {"available": True, "tried": False, "detail": "built into torch, not tried"}
    try:
        results = launch.run(_exchange, 2, timeout_s=GLOO_TIMEOUT_S)
    except (StageFailed, TimeoutError, RuntimeError, OSError) as error:
        return {"available": False, "tried": True, "detail": str(error).splitlines()[0]}
    if results != [3.0, 3.0]:
        return {"available": False, "tried": True, "detail": f"two processes added 1 and 2 and got {results}"}
    return {"available": True, "tried": True, "detail": "two processes exchanged a tensor"}


def _shm() -> dict[str, Any]:
    """Whether stages can exchange messages through shared memory, how much of it there is, and what is in ``/dev/shm``,
    which other programs use and this one does not."""
    reason = why_unusable()
    if reason:
        return {"available": False, "detail": reason}
    limit_bytes, limit = native.shm_memory_limit()
    found: dict[str, Any] = {"available": True, "limit_bytes": limit_bytes, "limit": limit, "dev_shm": None}
    detail = f"room for messages of {text.size(limit_bytes)} ({limit})"
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        detail += "; there is no /dev/shm, which is not needed"
    else:
        found["dev_shm"] = {"total_bytes": usage.total, "free_bytes": usage.free}
        size = f"{text.size(usage.free)} of {text.size(usage.total)}"
        detail += f"; /dev/shm, which is not needed, has {size} free"
    return found | {"detail": detail}


def _cuda(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether paci_rt could train on a GPU: core, torch, driver; and the toolkit to build the core's half."""
    compiler = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if compiler is None and home and Path(home, "bin", "nvcc").is_file():
        compiler = str(Path(home, "bin", "nvcc"))
    core, build = bool(native.info()["cuda"]), torch.version.cuda is not None
    devices, reason = native.cuda_devices()
    missing = [
        name
        for name, found in (
            ("the core's CUDA half", core),
            ("a torch built for CUDA", build),
            ("a GPU with its driver", bool(gpus)),
            ("GPUs that the core can use", devices > 0 or not (core and gpus)),
        )
        if not found
    ]
    return {
        "available": not missing,
        "core": core,
        "core_runtime": native.info().get("cuda_runtime"),
        "devices": devices,
        "reason": reason,
        "torch": build,
        "driver": gpus[0]["driver"] if gpus else None,
        "nvcc": compiler,
        "detail": _cuda_built(core) + ("; needs " + ", ".join(missing) if missing else f", driver {gpus[0]['driver']}"),
    }


def _cuda_built(core: bool) -> str:
    if not core:
        return "not built into the core"
    info = native.info()
    archs = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"])
    return f"built for CUDA {info['cuda_runtime']}" + (f" ({archs})" if archs else ", without device code")


NCCL_FEATURES = {
    "registered_p2p": "registered buffers",
    "launch_order": "NCCL_LAUNCH_ORDER_IMPLICIT",
    "multi_rank_gpu": "several processes a GPU with NCCL_MULTI_RANK_GPU_ENABLE=1",
}


def _nccl() -> dict[str, Any]:
    """The NCCL that the ``nccl`` transport takes, its version, path and features; asks no GPU."""
    try:
        nccl = load_nccl()
    except (NcclError, NativeCoreError) as error:
        return {"available": False, "version": None, "path": None, "features": {}, "reason": str(error)}
    return {
        "available": True,
        "version": nccl.version_text,
        "path": nccl.path,
        "features": nccl.features,
        "reason": "",
    }


def _nccl_detail(found: dict[str, Any]) -> str:
    if not found["available"]:
        return str(found["reason"]).partition(";")[0]
    has = [words for name, words in NCCL_FEATURES.items() if found["features"][name]]
    return ", ".join([f"{found['version']} ({found['path']})", *has])


def _package(*names: str) -> dict[str, Any]:
    """Version of the first of these distributions that is installed, without importing it."""
    for name in names:
        try:
            return {"available": True, "version": metadata.version(name)}
        except metadata.PackageNotFoundError:
            module = name.split("-")[0]
            if len(names) == 1 and find_spec(module) is not None:  # not from a wheel
                return {"available": True, "version": "unknown version"}
    return {"available": False, "version": None}


def find_gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs as ``nvidia-smi`` names them; ``[]`` where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(listing: str) -> list[dict[str, Any]]:
    """The lines of ``nvidia-smi --query-gpu=...``; fields that it does not know are None."""
    gpus = []
    for line in listing.splitlines():
        cells = [None if cell.strip().startswith("[") else cell.strip() for cell in line.split(",")]
        if len(cells) != len(GPU_FIELDS):
            continue
        index, name, memory_mib, capability, driver = cells
        gpus.append(
            {
                "index": int(index or 0),
                "name": name,
                "memory_bytes": int(memory_mib) << 20 if memory_mib else None,
                "compute_capability": capability,
                "driver": driver,
            }
        )
    return gpus


def usable_cores() -> int:
    """Cores that this process may use, also inside a container with a limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(limit) == 2 and limit[0].isdigit():
        cores = min(cores, max(1, int(limit[0]) // int(limit[1])))
    return cores


def memory_bytes() -> int | None:
    """Memory that this process may use, also inside a container with a limit; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = _first_line("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError:
        return ""
