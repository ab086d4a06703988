"""Builds the source distribution, from it a wheel, installs that outside the checkout, and trains a step with it.

    python tools/check_sdist.py                # compiles the native core: minutes
    python tools/check_sdist.py --wheel FILE   # only installs and trains

Uses the build tools and the torch of the environment that runs this file; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STEP = """
import sys
from pathlib import Path
import torch
import paci_rt
from paci_rt import checkpoint, native

place = Path(paci_rt.__file__).resolve()
assert Path(sys.prefix).resolve() in place.parents, f"paci_rt was taken from {place}"
assert Path(native.core().__file__).parent == place.parent
torch.manual_seed(0)
pipeline = paci_rt.LocalPipeline(
    [torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)],
    n_microbatches=2,
    loss_fn=torch.nn.MSELoss(),
    optimizer=lambda named: paci_rt.AdamW(named, lr=1e-2),
)
before = paci_rt.params_sha256(pipeline.named_parameters())
pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
checkpoint.save("saved", pipeline)
assert checkpoint.verify("saved")["windows"] == 1
assert paci_rt.params_sha256(pipeline.named_parameters()) != before
print("trained a step with", native.core().__file__)
"""


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """What a program prints; ends in an error with all of it if the program fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, cwd=cwd, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed in {cwd}:\n{done.stdout}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel of the source distribution of this checkout."""
    source = folder / "source"
    source.mkdir()
    names = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    backend = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", backend, str(folder)], source)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Python of a new environment with the wheel in it, and the torch of this one."""
    home = folder / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", str(home)], folder)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    run([*pip, str(wheel)], folder)
    (packages,) = home.glob("lib/python*/site-packages")
    # A folder in a .pth file is searched last, and .pth files in it are not read: an editable install stays outside.
    (packages / "torch-of-the-builder.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def trains(python: Path, folder: Path) -> str:
    """What a program in an empty folder prints that takes a training step with what is installed."""
    empty = folder / "empty"
    empty.mkdir()
    said = run([str(python), "-I", "-c", STEP], empty)
    said += run([str(python.with_name("paci-rt")), "--version"], empty)
    simulate = ["simulate", "--schedule", "paci", "--stages", "2", "--micro-batches", "4"]
    run([str(python.with_name("paci-rt")), *simulate], empty)
    return said


def main() -> None:
    """Build if need be, install, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="install this one, and build none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder) if arguments.wheel is None else arguments.wheel.resolve()
        print(trains(install(wheel, folder), folder), end="")


if __name__ == "__main__":
    main()
