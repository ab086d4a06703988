"""``--activation-limit``: a run in a V holds no more than it says, and trains the same on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paci_rt import cli
from paci_rt.train.config import TrainConfig

SMALL = ["--stages", "2", "--steps", "4", "--batch-size", "4", "--accumulation", "4", "--seq-len", "16"]


@pytest.mark.parametrize("limit", [1.0, 1.5, 2.5])
def test_a_rank_holds_what_it_may(limit: float, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    found: list[dict[str, Any]] = []
    for transport in ("local", "shm"):
        report = tmp_path / "report.json"
        argv = ["train", "--schedule", "paci-v", "--activation-limit", str(limit), *SMALL, "--data", str(text)]
        assert cli.main([*argv, "--transport", transport, "--json", str(report)]) == 0
        found.append(json.loads(report.read_text()))
    here, there = found
    assert here["params_sha256"] == there["params_sha256"] and here["max_drift"] <= here["drift_bound"]
    assert here["config"]["activation_limit"] == limit
    for rank in range(2):
        pieces = [here["peak_in_flight"][str(stage)] for stage in (rank, 3 - rank)]
        assert max(pieces) <= 2 * limit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "paci-v", "activation_limit": 0.5}, "--activation-limit is 0.5"),
        ({"schedule": "paci-v", "activation_limit": float("nan")}, "--activation-limit is nan"),
        ({"schedule": "paci-v", "activation_limit": "2"}, "--activation-limit is '2'"),
        ({"schedule": "paci", "activation_limit": 2.0}, "--activation-limit is 2: paci takes none"),
        ({"schedule": "zb-v", "activation_limit": 2.0}, "--activation-limit is 2: zb-v takes none"),
    ],
)
def test_limits_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        TrainConfig(**options)
