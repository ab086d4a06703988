"""``benchmarks/tied.py`` on a table that takes no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_row_for_each_schedule(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/tied.py", "--rows", "64", "--width", "8", "--stages", "2"]
    command += ["--accumulation", "2", "--emulate-ms", "2,4", "--windows", "3", "--json", str(tmp_path / "tied.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=deadline(120))
    assert done.returncode in (0, 1), done.stderr  # 1 is a machine that is too busy for its own limit
    rows = json.loads((tmp_path / "tied.json").read_text())["rows"]
    assert [row["schedule"] for row in rows] == ["paci", "1f1b"] and all(row["equal_copies"] for row in rows)
    assert all(row["window_s"] >= 0.012 and 0 < row["exposed_share"] < 1 for row in rows)
