"""Runs the tests that need a GPU, several files at a time, and goes on behind tests that hang or end their process.

    python tools/gpu_tests.py --json FILE [--limit-s 180] [--test-limit-s 80] [--workers 8] [paths]

Each file of tests has a pytest of its own. Most of their time is the compiler's, so they run side by side; files that
look at what runs when on the GPU (``ALONE``) come after, one by one. A test over its limit ends its process, and so
does one that leaves CUDA unusable; a new process goes on with the tests behind it. Results are written as they come.

Exit code 0 where all passed, 1 where not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_runner import end_group
from gpu_tests_plugin import SPOILED, read

TOOLS = Path(__file__).resolve().parent
TESTS = TOOLS.parent / "tests"
ALONE = ("native/test_cuda_core.py", "native/test_green.py")
MARK = "mark.gpu"
END_S = 4.0
"""Of the time that there is, for ending what still runs and writing down what was found."""
NO_TESTS = 5
"""Exit code of pytest where there is nothing to run."""


@dataclass(eq=False)
class File:
    """A file of tests.

    Attributes:
        path: where it is. folder: for its record and what its processes print.
        broken: why no test of it can be run, None where they can.
    """

    path: Path
    folder: Path
    broken: str | None = None
    process: subprocess.Popen[bytes] | None = None
    finished_before: int = 0

    @property
    def record(self) -> Path:
        return self.folder / f"{self.path.stem}.record"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.path.stem}.log"

    def start(self, test_limit_s: float) -> None:
        """Begin, or go on behind what has been run."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "-p",
            "gpu_tests_plugin",
        ]
        command += ["--record", str(self.record), "--test-limit-s", str(test_limit_s)]
        # Names of tests depend on it, and the next process has to know them.
        command += ["--rootdir", str(self.path.parent.parent), str(self.path)]
        paths = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.path.parent.parent,
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def look(self, test_limit_s: float) -> bool:
        """Whether it is done; a process that has ended in the middle is followed by another one."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        end_group(self.process)
        entries = read(self.record)
        ended = {entry["ends"] for entry in entries if "ends" in entry}
        begun = [entry["begins"] for entry in entries if entry.get("begins") and entry["begins"] not in ended]
        for name in begun:  # one at most: what the process was at when it ended
            message = f"it hung for {test_limit_s:g} s or ended its process (exit code {code}); gpu.log has where"
            self._fail(name, message)
        finished = len(ended) + len(begun)
        progressed, self.finished_before = finished > self.finished_before, finished
        if code in (0, 1, NO_TESTS) and not begun and entries:
            return True
        if progressed and (begun or code == SPOILED):
            self.start(test_limit_s)
            return False
        self.broken = f"pytest ended with exit code {code}"
        return True

    def _fail(self, name: str, message: str) -> None:
        entry = {"ends": name, "outcome": "failed", "message": message, "seconds": 0.0}
        with self.record.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry) + "\n")

    def stop(self) -> None:
        """End what still runs."""
        if self.process is not None:
            end_group(self.process)

    def printed(self) -> str:
        """What its processes printed, and where they hung."""
        paths = (self.log, self.record.with_suffix(".traces"))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths if path.exists())


@dataclass
class Found:
    """Results of all files.

    Attributes:
        ended: results by name of the test. collected: names of all tests. broken: why files could not be run, by name.
    """

    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    collected: set[str] = field(default_factory=set)
    broken: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Sequence[File]) -> Found:
        found = cls()
        for file in files:
            for entry in read(file.record):
                found.collected.update(entry.get("collected", ()))
                if "ends" in entry:
                    found.ended[entry["ends"]] = entry
            if file.broken is not None:
                found.broken[file.path.name] = file.broken
        return found

    def named(self, outcome: str) -> list[str]:
        """Tests with an outcome, with what they said."""
        chosen = [entry for entry in self.ended.values() if entry["outcome"] == outcome]
        return [f"{entry['ends']}: {entry['message']}" for entry in chosen]

    def document(self, unseen: int = 0) -> dict[str, Any]:
        """``measures``, and tests by outcome; ``unseen`` files have not begun."""
        failed, skipped = self.named("failed"), self.named("skipped")
        passed = sum(entry["outcome"] == "passed" for entry in self.ended.values())
        missing = sorted(self.collected - self.ended.keys())
        ran = passed + len(failed)
        unit = f"of {ran} passed" + (f", {len(skipped)} skipped" if skipped else "")
        unit += f", {len(missing)} not run" if missing else ""
        unit += f", {unseen} files not begun" if unseen else ""
        unit += f", {len(self.broken)} files broken" if self.broken else ""
        row = {
            "measure": "tests that need a GPU",
            "value": passed,
            "unit": unit,
            "target": "all, and at least one",
            "ok": passed > 0 and not (failed or missing or unseen or self.broken),
        }
        slowest = sorted(self.ended.values(), key=lambda entry: -entry["seconds"])[:15]
        return {
            "measures": [row],
            "failed": failed,
            "skipped": skipped,
            "not_run": missing,
            "broken": self.broken,
            "slowest_s": {entry["ends"]: round(entry["seconds"], 1) for entry in slowest},
        }


def _is_alone(path: Path) -> bool:
    return path.name in {Path(name).name for name in ALONE}


def write(path: Path, document: dict[str, Any]) -> None:
    """All of it or nothing."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def run(files: Sequence[File], options: argparse.Namespace) -> Found:
    """All files, within the time that there is."""
    end = time.monotonic() + options.limit_s - END_S
    together = deque(file for file in files if not _is_alone(file.path))
    alone = deque(file for file in files if _is_alone(file.path))
    running: list[File] = []
    written = 0.0
    try:
        while (together or alone or running) and time.monotonic() < end:
            while together and len(running) < options.workers:
                running.append(together.popleft())
                running[-1].start(options.test_limit_s)
            if alone and not running:
                running.append(alone.popleft())
                running[-1].start(options.test_limit_s)
            for file in [file for file in running if file.look(options.test_limit_s)]:
                running.remove(file)
                print(f"--- {file.path.name}\n{file.printed()}", flush=True)
            if time.monotonic() - written > 1.0:
                write(options.json, Found.of(files).document(len(together) + len(alone)))
                written = time.monotonic()
            time.sleep(0.1)
    finally:
        for file in running:
            file.stop()
            print(f"--- {file.path.name}, ended in the middle\n{file.printed()}", flush=True)
        found = Found.of(files)
        write(options.json, found.document(len(together) + len(alone)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files of tests (default: all in tests/ with the mark)")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where results go")
    parser.add_argument("--limit-s", type=float, default=180.0, help="seconds for everything (default 180)")
    parser.add_argument("--test-limit-s", type=float, default=80.0, help="seconds for one test (default 80)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="files at a time")
    options = parser.parse_args(arguments)
    for name in ("limit_s", "test_limit_s", "workers"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be positive")
    paths = options.paths or [path for path in sorted(TESTS.rglob("test_*.py")) if MARK in path.read_text("utf-8")]
    with tempfile.TemporaryDirectory() as folder:
        files = [File(path=path.resolve(), folder=Path(folder)) for path in paths]
        found = run(files, options)
        document = json.loads(options.json.read_text(encoding="utf-8"))
    for key in ("failed", "not_run"):
        for line in document[key]:
            print(f"{key.replace('_', ' ')}: {line}")
    for name, why in found.broken.items():
        print(f"broken: {name}: {why}")
    (row,) = document["measures"]
    print(f"{row['value']} {row['unit']}")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    # Ended from outside, it ends its processes, which are in sessions of their own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
