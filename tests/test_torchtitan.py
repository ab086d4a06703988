"""torchtitan's trainer on our stages and schedules, where torchtitan is installed; see ``examples/torchtitan``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.deadlines import deadline

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "torchtitan"


def test_the_patch_is_small() -> None:
    lines = (FOLDER / "trainer.patch").read_text(encoding="utf-8").splitlines()
    changed = [line for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    assert 0 < len(changed) <= 30
    assert [line for line in lines if line.startswith("+++")] == ["+++ b/torchtitan/trainer.py"]


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[int, dict[str, Any]]]:
    """What each rank told, by schedule."""
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan, needed here alone, is not installed: see examples/torchtitan/README.md")
    found = {}
    for schedule in ("1f1b", "zb-h1", "paci"):
        done = subprocess.run(
            [sys.executable, str(FOLDER / "run.py"), "--schedule", schedule],
            capture_output=True,
            text=True,
            timeout=deadline(240),
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        found[schedule] = {one["rank"]: one for one in told}
    return found


@pytest.mark.slow
def test_it_trains_under_every_kind_of_schedule(runs: dict[str, dict[int, dict[str, Any]]]) -> None:
    for schedule, told in runs.items():
        losses = told[1]["losses"]
        assert len(losses) == 6 and losses[-1] < losses[0] - 1, schedule
        # Of a block fused q, k and v, output, and three matrices; three blocks a stage, and the head on the last.
        assert [told[rank]["split_layers"] for rank in (0, 1)] == [15, 16]


@pytest.mark.slow
def test_a_flush_schedule_equals_another_and_paci_drifts(runs: dict[str, dict[int, dict[str, Any]]]) -> None:
    for rank in (0, 1):
        assert runs["zb-h1"][rank]["params_sha256"] == runs["1f1b"][rank]["params_sha256"]
        assert runs["paci"][rank]["params_sha256"] != runs["1f1b"][rank]["params_sha256"]
    assert runs["zb-h1"][1]["losses"] == runs["1f1b"][1]["losses"]
    assert [runs["paci"][rank]["max_drift"] for rank in (0, 1)] == [1, 0]
