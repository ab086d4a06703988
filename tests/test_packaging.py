"""What a fresh machine meets: metadata, constraints, stubs, build switches and the installer's choices."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import paci_rt
from paci_rt import native
from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[1]


def load_installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer", ROOT / "tools" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires("paci-rt") or []]


def test_constraints_pin_versions_inside_the_declared_ranges() -> None:
    pins: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins.setdefault(pin.name, []).append(Version(specifier.version))
    unpinned = {"cupy-cuda12x", "cupy-cuda13x", "datasets", "tiktoken"}  # no machine to test them on
    for requirement in requirements():
        if requirement.name in unpinned:
            continue
        assert requirement.name in pins, f"{requirement.name} has no tested version in constraints.txt"
        for version in pins[requirement.name]:
            assert version in requirement.specifier, f"{requirement.name} {version} is outside {requirement.specifier}"


def test_extras_and_command() -> None:
    extras = importlib.metadata.metadata("paci-rt").get_all("Provides-Extra") or []
    assert {"train", "plot", "test", "cuda12", "cuda13", "openwebtext"} <= set(extras)
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="paci-rt")
    assert command.value == "paci_rt.cli:main"


def test_nothing_but_torch_and_numpy_is_needed_at_run_time() -> None:
    core = {r.name for r in requirements() if r.marker is None or "extra" not in str(r.marker)}
    assert core == {"torch", "numpy"}


def test_versions_agree() -> None:
    assert paci_rt.__version__ == importlib.metadata.version("paci-rt")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(paci_rt.__version__)}\b", changelog, re.MULTILINE)


def test_package_is_typed_and_stubs_match_the_native_module() -> None:
    package = Path(paci_rt.__file__).parent
    assert (package / "py.typed").exists()
    tree = ast.parse((package / "_C.pyi").read_text())
    declared: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            declared[node.target.id] = node
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            declared[node.name] = node
    core = native.core()
    assert set(declared) == {name for name in dir(core) if not name.startswith("_")}
    for name, node in declared.items():
        if isinstance(node, ast.FunctionDef):
            assert arguments_of(getattr(core, name)) == arguments_declared(node), name
        elif isinstance(node, ast.ClassDef):
            methods = methods_declared(node, declared)
            bound = getattr(core, name)
            assert set(methods) - {"__init__", "__cuda_stream__"} == {n for n in dir(bound) if not n.startswith("_")}
            for method, declaration in methods.items():
                if not declaration.decorator_list:
                    assert arguments_of(getattr(bound, method)) == arguments_declared(declaration), (name, method)


def methods_declared(node: ast.ClassDef, classes: dict[str, Any]) -> dict[str, ast.FunctionDef]:
    """Methods of a class of the stub, those of its bases included."""
    methods = {}
    for base in node.bases:
        assert isinstance(base, ast.Name)
        methods |= methods_declared(classes[base.id], classes)
    return methods | {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}


def arguments_declared(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs] if argument.arg != "self"]


def arguments_of(function: Any) -> list[str]:
    signature = function.__doc__.splitlines()[0]
    return re.findall(r"(\w+): ", re.sub(r"self: [\w.]+", "", signature.partition(") ->")[0]))


def test_native_core_links_no_torch_and_no_shared_cuda() -> None:
    data = Path(native.core().__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so", b"libnccl"):
        assert library not in data


def configure(folder: Path, *options: str) -> str:
    """Runs cmake, which must fail; what it says."""
    cmake = Path(sys.executable).parent / "cmake"
    if not cmake.exists():
        pytest.skip("cmake is not installed in this environment")
    command = [str(cmake), "-S", str(ROOT), "-B", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline(120))
    assert done.returncode != 0
    return " ".join(done.stderr.split())


def test_unknown_cuda_switch_fails_in_one_clear_sentence(tmp_path: Path) -> None:
    assert "PACI_RT_CUDA=maybe is unknown: set it to auto, on or off" in configure(tmp_path, "-DPACI_RT_CUDA=maybe")


def test_cuda_on_demand_says_what_is_missing(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    said = configure(
        tmp_path,
        "-DPACI_RT_CUDA=on",
        "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    assert "PACI_RT_CUDA=on: no CUDA toolkit from version 12.0 was found; install the toolkit" in said
    assert "PACI_RT_CUDA=auto or off" in said


def report(*requires: str) -> dict[str, Any]:
    return {"install": [{"metadata": {"name": "torch", "requires_dist": list(requires)}}]}


def test_installer_recognises_wheels_that_bring_cuda() -> None:
    installer = load_installer()
    on_linux = 'platform_system == "Linux"'
    assert installer.brings_cuda(report("filelock", f"nvidia-cudnn-cu13==9.1; {on_linux}")) is (sys.platform == "linux")
    assert installer.brings_cuda(report(f'triton==3.7.0; {on_linux} and platform_machine == "x86_64"')) is (
        sys.platform == "linux"
    )
    assert installer.brings_cuda(report("cuda-bindings>=13"))
    assert not installer.brings_cuda(report("filelock", "sympy>=1.13", 'optree>=0.13; extra == "optree"'))
    assert not installer.brings_cuda(report('nvidia-ml-py; extra == "gpu"'))
    assert not installer.brings_cuda(report('nvidia-cudnn-cu13; platform_system == "Windows"'))
    assert not installer.brings_cuda({"install": [{"metadata": {"name": "torch"}}]})
    assert not installer.brings_cuda({"install": []})  # torch is there already
