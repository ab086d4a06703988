"""Replicas: several pipelines over the same stages make one update together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.replicated import Replicated, plain, train_replica
from support.toy import Run, train_local


def gathered(results: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Parameters of each replica."""
    found: dict[int, dict[str, Tensor]] = {}
    for one in results:
        found.setdefault(one["replica"], {}).update(one["params"])
    return [found[at] for at in sorted(found)]


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    wrong = [name for name in one if not torch.equal(one[name], other[name])]
    assert not wrong, wrong


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_flush_equals_plain_sums(workers: Any, schedule: str) -> None:
    given = Replicated(run=Run(schedule=schedule, stages=2, accumulation=3, optimizer="torch-adamw", batch=24))
    replicas = gathered(workers.run(train_replica, 4, given))
    for one in replicas:
        require_equal(one, plain(given))
