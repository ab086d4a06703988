"""Puts paci_rt and everything that its tests and its demo need into the environment that runs this file.

Called by ``make venv``; ``tools/install.py docs`` adds what one extra of the installed package needs. Versions come
from constraints.txt. On a machine without an NVIDIA GPU it makes sure that no CUDA packages are downloaded: where the
default index would bring them along with torch, torch comes from PyTorch's index of CPU wheels instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import Distribution, requires
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "train,plot,test"
BUILD_TOOLS = ["setuptools", "wheel", "pybind11", "cmake", "ninja"]


def pip(*arguments: str, remedy: str = "pip's messages above say why") -> None:
    """Run pip under the project's constraints, or end the set-up with a remedy."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt"]
    if subprocess.run([*command, *arguments], cwd=ROOT).returncode != 0:
        raise SystemExit(f"set-up failed at `pip install {' '.join(arguments)}`: {remedy}")


def has_nvidia_gpu() -> bool:
    """Whether a driver shows a device."""
    if Path("/dev/nvidia0").exists():
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def brings_cuda(report: dict[str, Any]) -> bool:
    """Whether what a pip report would install requires CUDA packages on this platform."""
    cuda = re.compile(r"(nvidia|cuda|triton)\b")
    for item in report["install"]:
        for requirement in item["metadata"].get("requires_dist", []):
            name, _, marker = requirement.partition(";")
            if cuda.match(name.strip().lower()) and "extra ==" not in marker and _applies(marker):
                return True
    return False


def _applies(marker: str) -> bool:
    """Whether a requirement's platform marker speaks of this platform; one without a platform always does."""
    platform = re.search(r"""(?:platform_system|sys_platform)\s*==\s*['"](\w+)['"]""", marker)
    return platform is None or platform[1].lower() == sys.platform


def torch_report() -> dict[str, Any]:
    """What pip would install for torch itself, without downloading what torch depends on."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip("--quiet", "--dry-run", "--no-deps", "--report", str(report), "torch")
        loaded: dict[str, Any] = json.loads(report.read_text())
    return loaded


def needed(requirements: Sequence[str] | None, *extras: str) -> list[str]:
    """What a package requires by its metadata: for itself, or, if ``extras`` are named, for these alone."""
    found = []
    for text in requirements or ():
        extra = re.search(r"""\s*(?:;|and)\s*extra\s*==\s*['"]([^'"]+)['"]""", text)
        if extra[1] in extras if extra else not extras:
            found.append(text.replace(extra[0], "") if extra else text)
    return found


def add_extra(extra: str) -> None:
    """Install what an extra of the installed package needs, and leave the package, which takes minutes, as it is."""
    found = needed(requires("paci-rt"), extra)
    if not found:
        raise SystemExit(f"paci_rt has no extra {extra!r}")
    pip(*found)


def own_requirements() -> list[str]:
    """What the package in this folder and its extras need, without building it."""
    with tempfile.TemporaryDirectory() as folder:
        ask = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({folder!r})"
        subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (metadata,) = Path(folder).glob("*.dist-info")
        wanted = Distribution.at(metadata).requires
    return needed(wanted) + needed(wanted, *EXTRAS.split(","))


@contextmanager
def core_in_background() -> Iterator[None]:
    """Compile the native core beside what the caller does, since pip uses one processor; wait for it at the end."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with tempfile.TemporaryFile("w+") as log:
        build = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield
            if build.wait() != 0:
                log.seek(0)
                raise SystemExit(f"{log.read()}\nset-up failed at the native core: the lines above say why")
        finally:
            if build.poll() is None:
                os.killpg(build.pid, signal.SIGKILL)


def main() -> None:
    """Install torch, the build tools, then the package itself in place."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this check is what tells users of older ones
        version = sys.version.split()[0]
        raise SystemExit(f"paci_rt needs Python 3.10 or later, this is {version}: rm -r .venv; make PYTHON=python3.12")
    if sys.prefix == sys.base_prefix:
        raise SystemExit("tools/install.py installs into a virtual environment: run `make venv`")
    pip("pip>=23.2")  # older ones cannot report, or download a whole wheel to read its requirements
    if not has_nvidia_gpu() and brings_cuda(torch_report()):
        index = os.environ.get("PACI_RT_TORCH_INDEX", CPU_INDEX)
        print(f"no NVIDIA GPU here: torch comes from {index}, without CUDA packages", flush=True)
        # Alone: that index need not hold the pinned versions of what torch depends on; the last step brings them.
        pip(
            "--no-deps",
            "--index-url",
            index,
            "torch",
            remedy="set PACI_RT_TORCH_INDEX to another index of CPU wheels if need be",
        )
    pip(*BUILD_TOOLS)
    # The tests need the host twin and the fake NCCL, which a wheel does not have.
    os.environ.setdefault("PACI_RT_TESTING", "on")
    with core_in_background():
        pip(*own_requirements())
    # With the build tools in place, the build needs no environment of its own and is incremental.
    pip("--no-build-isolation", "-e", f".[{EXTRAS}]")


if __name__ == "__main__":
    if sys.argv[1:]:
        add_extra(sys.argv[1])
    else:
        main()
