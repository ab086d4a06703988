"""Builds the native core: drives CMakeLists.txt and puts ``_C`` into the package.

``PACI_RT_CUDA=auto|on|off`` and ``PACI_RT_TESTING=on|off`` (off: what only the tests use is not built in) are passed on
to CMake. Build products stay in ``build/``, so that a second build compiles only what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _tool(name: str) -> str:
    """Path of a build tool: the one in the environment that builds, else the one on PATH."""
    beside = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if beside is None:
        raise SystemExit(f"paci_rt needs {name} to build its native core: pip install {name}")
    return beside


def _switch(name: str, default: str, *others: str) -> str:
    """What the environment sets ``name`` to."""
    value = os.environ.get(name, default).lower()
    if value not in (default, *others):
        raise SystemExit(f"{name}={value} is unknown: set it to {', '.join([default, *others[:-1]])} or {others[-1]}")
    return value


class CMakeBuild(build_ext):
    """Configures and builds with CMake and ninja, then copies the module to where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        build_dir.mkdir(parents=True, exist_ok=True)
        # Passed on every time: under build isolation the tools move to a new folder with each build.
        options = {
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "CMAKE_BUILD_TYPE": "Release",
            "PACI_RT_CUDA": _switch("PACI_RT_CUDA", "auto", "on", "off"),
            "PACI_RT_TESTING": _switch("PACI_RT_TESTING", "off", "on"),
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build_dir / "out"),
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        cmake = _tool("cmake")
        self._run([cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *defines])
        self._run([cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        built = build_dir / "out" / target.name
        # A new file, not new content: a running process may have the old one mapped.
        fresh = target.with_name(target.name + ".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)

    @staticmethod
    def _run(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("paci_rt: the native core did not build; the lines above say why") from None


setup(ext_modules=[Extension("paci_rt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
