"""Builds the C++ stress programs of ``tests/cpp`` under a sanitizer, by the Makefile's own rules."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, sanitizer: str, variable: str, *options: str) -> Path:
    """The program that the Makefile calls ``variable``, in ``folder``; skips where ``sanitizer`` (``thread`` or
    ``address``) does not work here.

    Args:
        options: more settings of make, for example ``P2P_BREAK=-DNAME=value``.
    """
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    make = shutil.which("make")
    if compiler is None or make is None:
        pytest.skip("no C++ compiler or no make on PATH")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [compiler, f"-fsanitize={sanitizer}", str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode or subprocess.run([folder / "probe"]).returncode:
        pytest.skip(f"this compiler, or this kernel, has no sanitizer for {sanitizer}")
    program = folder / variable.lower()
    arguments = [make, "-s", "-C", str(ROOT), f"{variable}={program}", *options, str(program)]
    subprocess.run(arguments, check=True, timeout=deadline(300))
    return program
