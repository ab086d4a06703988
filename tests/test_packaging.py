"""What a fresh machine meets: metadata, constraints, stubs, build switches, the installer's choices and archives."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import check_sdist
import paci_rt
from paci_rt import native
from paci_rt.errors import NativeCoreError
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


def test_an_extra_is_added_without_building_the_package_again(monkeypatch: pytest.MonkeyPatch) -> None:
    installer, asked = load_installer(), list[str]()
    monkeypatch.setattr(installer, "pip", lambda *arguments: asked.extend(arguments))
    installer.add_extra("docs")
    docs = {one.name for one in requirements() if one.marker is not None and one.marker.evaluate({"extra": "docs"})}
    plain = {one.name for one in requirements() if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert {Requirement(text).name for text in asked} == docs - plain
    assert "mkdocs" in docs
    with pytest.raises(SystemExit, match="no extra 'dcs'"):
        installer.add_extra("dcs")


def test_what_the_package_needs_is_known_before_it_is_built() -> None:
    installer = load_installer()
    asked = [Requirement(text) for text in installer.own_requirements()]
    extras = ["", *installer.EXTRAS.split(",")]
    every = [
        one for one in requirements() if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)
    ]
    assert {one.name for one in asked if one.marker is None or one.marker.evaluate()} == {one.name for one in every}
    assert installer.needed(['a>=1; sys_platform == "linux" and extra == "x"', 'b; extra == "y"', "c>2"], "x", "y") == [
        'a>=1; sys_platform == "linux"',
        "b",
    ]


@pytest.mark.parametrize(("program", "printed"), [("print('bad core'); raise SystemExit(3)", "bad core"), ("", None)])
def test_a_core_that_does_not_build_ends_the_set_up_with_its_messages(
    program: str, printed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer = load_installer()
    monkeypatch.setattr(installer, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text(program)
    if printed is None:
        with installer.core_in_background():
            pass
    else:
        with pytest.raises(SystemExit, match=f"{printed}(.|\n)*native core"), installer.core_in_background():
            pass


def test_constraints_pin_versions_inside_the_declared_ranges() -> None:
    pins: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins.setdefault(pin.name, []).append(Version(specifier.version))
    unpinned = {"cupy-cuda12x", "cupy-cuda13x", "tiktoken"}  # no machine to test them on
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


def test_nothing_but_torch_and_numpy_is_needed_at_run_time() -> None:  # and tomli before Python 3.11
    core = {r.name for r in requirements() if r.marker is None or "extra" not in str(r.marker)}
    assert core == {"torch", "numpy", "tomli"}


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
    public = {name: node for name, node in declared.items() if not name.startswith("_")}
    assert set(public) == {name for name in dir(core) if not name.startswith("_")}
    for name, node in public.items():
        if isinstance(node, ast.FunctionDef):
            same_arguments(getattr(core, name), node, declared)
        elif isinstance(node, ast.ClassDef):
            methods = methods_declared(node, declared)
            bound = getattr(core, name)
            assert set(methods) - {"__init__", "__cuda_stream__"} == {n for n in dir(bound) if not n.startswith("_")}
            for method, declaration in methods.items():
                if not declaration.decorator_list:
                    same_arguments(getattr(bound, method), declaration, declared)


def methods_declared(node: ast.ClassDef, classes: dict[str, Any]) -> dict[str, ast.FunctionDef]:
    """Methods of a class of the stub, those of its bases included."""
    methods = {}
    for base in node.bases:
        assert isinstance(base, ast.Name)
        methods |= methods_declared(classes[base.id], classes)
    return methods | {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}


def same_arguments(function: Any, node: ast.FunctionDef, classes: dict[str, Any]) -> None:
    """In the same order, unless the stub takes some from a typed dictionary, whose order means nothing."""
    declared, real = (
        [one.arg for one in [*node.args.args, *node.args.kwonlyargs] if one.arg != "self"],
        arguments_of(function),
    )
    if node.args.kwarg is not None:
        unpacked = node.args.kwarg.annotation
        assert isinstance(unpacked, ast.Subscript) and isinstance(unpacked.slice, ast.Name)
        declared, real = sorted(declared + keys_of(classes[unpacked.slice.id], classes)), sorted(real)
    assert declared == real, node.name


def keys_of(node: ast.ClassDef, classes: dict[str, Any]) -> list[str]:
    """Keys of a typed dictionary of the stub, those of its bases included."""
    own = [
        member.target.id
        for member in node.body
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)
    ]
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "TypedDict"]
    return own + [key for base in bases for key in keys_of(classes[base], classes)]


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


def test_unknown_testing_switch_fails_in_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "PACI_RT_TESTING=maybe is unknown: set it to on or off" in configure(tmp_path, "-DPACI_RT_TESTING=maybe")
    monkeypatch.setenv("PACI_RT_TESTING", "maybe")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "PACI_RT_TESTING=maybe is unknown: set it to off or on"


def test_what_only_tests_use_is_in_this_build_and_says_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"HostTwin", "FakeNccl"} <= set(dir(native.testing()))
    assert b"HostTwin" in Path(native.core().__file__).read_bytes()
    monkeypatch.setattr(native, "_core", ModuleType("_C"))
    with pytest.raises(NativeCoreError, match=r"no host twin .*PACI_RT_TESTING=on pip install -e \."):
        native.testing()


@pytest.mark.slow
def test_a_build_without_the_option_has_nothing_of_the_tests(tmp_path: Path) -> None:
    """A copy of the build folder with the option off compiles only what the option changes."""
    built = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    cmake, ninja = (Path(sys.executable).parent / name for name in ("cmake", "ninja"))
    if not (built / "build.ninja").exists() or not cmake.exists() or not ninja.exists():
        pytest.skip("the native core was not built in this folder by this environment")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path / "build"
    shutil.copytree(built, folder)
    cache = folder / "CMakeCache.txt"
    cuda = re.search(r"^PACI_RT_CUDA:STRING=(\w+)", cache.read_text(), re.MULTILINE)
    assert cuda is not None
    cache.unlink()  # names the folder that it was made in
    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "PACI_RT_CUDA": cuda[1],
        "CMAKE_BUILD_TYPE": "Release",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tmp_path,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    for command in ([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *options], [cmake, "--build", folder]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    (module,) = tmp_path.glob("_C*.so")
    for name in (b"HostTwin", b"FakeNccl", b"_testing"):
        assert name not in module.read_bytes()
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("paci_rt._C", {str(module)!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(hasattr(core, "_testing"), core.cuda, sorted(name for name in dir(core) if not name.startswith("_")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    public = sorted(name for name in dir(native.core()) if not name.startswith("_"))
    assert done.stdout.strip() == f"False {native.core().cuda} {public}"


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


def git_files(*options: str) -> set[str]:
    """Files of this checkout that git lists, below its root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: nothing says which files there must be")
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if (ROOT / name).is_file() or (ROOT / name).is_symlink()}


def test_kernels_are_one_folder_under_two_names() -> None:
    git_files()  # a source distribution has the files twice instead
    link = ROOT / "paci_rt" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_every_check_looks_into_kernels() -> None:
    makefile = (ROOT / "Makefile").read_text()
    folders = re.search(r"^PY_DIRS := (.*)$", makefile, re.MULTILINE)
    assert folders is not None and {"paci_rt", "kernels"} <= set(folders[1].split())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text().split("- id: ")[1:]
    patterns = {hook.split()[0]: re.search(r"files: (.*)", hook) for hook in hooks}
    of_package = {name: found[1] for name, found in patterns.items() if found and "paci_rt" in found[1]}
    assert {"mypy", "imports"} <= set(of_package)
    for name, pattern in of_package.items():
        for file in ("kernels/adamw.py", "kernels/device/adamw.py", "paci_rt/optim/adam.py"):
            assert re.search(pattern, file), (name, file)


def test_mypy_finds_kernels_as_part_of_the_package() -> None:
    find_sources = pytest.importorskip("mypy.find_sources")
    options = importlib.import_module("mypy.options").Options()
    files = re.search(r"^files = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert files is not None
    names = [str(ROOT / name.strip().strip('"')) for name in files[1].split(",")]
    modules = {source.module for source in find_sources.create_source_list(names, options)}
    assert {"paci_rt.kernels", "paci_rt.kernels.adamw", "paci_rt.kernels.device.adamw"} <= modules


# Compiling the native core takes minutes, so the one that runs the tests stands in for it.
BACKEND = """
import subprocess, sys
from pathlib import Path
from setuptools import build_meta
run = subprocess.run
subprocess.run = lambda command, **options: Path(command[0]).name == "cmake" or run(command, **options)
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""


def build(kind: str, folder: Path, out: Path) -> Path:
    """Builds the ``sdist`` or the ``wheel`` of the sources in ``folder``, without build isolation; the archive."""
    core = Path(native.core().__file__)
    there = folder / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}" / "out"
    there.mkdir(parents=True, exist_ok=True)
    shutil.copy2(core, there / core.name)
    command = [sys.executable, "-c", BACKEND, kind, str(out)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PACI_RT_CUDA": "off"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.iterdir()
    return archive


def imported_from(folder: Path, python: Path | None = None) -> Path:
    """Where ``paci_rt.kernels`` is found by a program that runs in ``folder``, under ``python``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import paci_rt.kernels.device.adamw; print(paci_rt.kernels.__file__)"
    done = subprocess.run(
        [str(python or sys.executable), "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()).parent


@pytest.mark.slow
def test_archives_hold_the_whole_package(tmp_path: Path) -> None:
    """From a checkout a source distribution and a wheel; from the former the same wheel, which trains a step where it
    is installed."""
    pytest.importorskip("triton")
    pytest.importorskip("pybind11")
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in git_files("--cached", "--others", "--exclude-standard"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name, follow_symlinks=False)
    assert imported_from(checkout) == checkout / "paci_rt" / "kernels"

    sdist = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    missing = {name for name in git_files() if not (unpacked / name).exists()}
    assert missing <= {".ci/run", ".gitignore"}
    configures(unpacked, tmp_path / "configured")

    wheel = build("wheel", checkout, tmp_path / "wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in git_files() if name.startswith("paci_rt/")} - {"paci_rt/kernels"}
    kernels = {f"paci_rt/{name}" for name in git_files() if name.startswith("kernels/")}
    core = f"paci_rt/{Path(native.core().__file__).name}"
    assert {name for name in names if ".dist-info/" not in name} == package | kernels | {core}
    again = build("wheel", unpacked, tmp_path / "wheel_of_sdist")
    assert set(zipfile.ZipFile(again).namelist()) == names

    python = check_sdist.install(again, tmp_path)
    assert "trained a step with" in check_sdist.trains(python, tmp_path)
    kernels_there = imported_from(elsewhere, python=python)
    assert kernels_there.parts[-3:] == ("site-packages", "paci_rt", "kernels")
    assert tmp_path in kernels_there.parents


def configures(source: Path, folder: Path) -> None:
    """CMake finds every source that it names."""
    cmake, ninja = (Path(sys.executable).parent / name for name in ("cmake", "ninja"))
    if not cmake.exists() or not ninja.exists():
        return
    pybind11 = importlib.import_module("pybind11")
    options = [
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DPACI_RT_CUDA=off",
        "-DPYBIND11_FINDPYTHON=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command = [str(cmake), "-S", str(source), "-B", str(folder), "-G", "Ninja", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
