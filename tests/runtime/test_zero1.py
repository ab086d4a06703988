"""ZeRO-1: optimizer state shared out among the replicas of a stage, and the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import paci_rt
from support.replicated import Replicated, drive, gathered, groups_of, make, require_equal, train_replica
from support.toy import Run

RUNS = {
    "adamw": Run(schedule="1f1b", stages=2, accumulation=3, batch=24),
    "nadam": Run(schedule="zb-h1", stages=2, accumulation=3, batch=24, optimizer="nadam"),
    "lion": Run(schedule="gpipe", stages=2, accumulation=3, batch=24, optimizer="lion"),
    "sgd": Run(schedule="interleaved-1f1b", stages=4, chunks=2, accumulation=4, batch=32, optimizer="sgd"),
    "paci": Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48),
    "2bw": Run(schedule="pipedream-2bw", stages=2, accumulation=4, windows=6, batch=48),
}


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_as_without(workers: Any, name: str) -> None:
    given = Replicated(run=RUNS[name], clip=0.5 if name == "adamw" else None)
    whole = gathered(workers.run(train_replica, 4, given))
    results = workers.run(train_replica, 4, replace(given, shard=True))
    for one in gathered(results):
        require_equal(one, whole[0])


@pytest.mark.parametrize(("replicas", "dtype"), [(2, "bfloat16"), (3, "float32"), (4, "bfloat16")])
def test_optimizer_and_masters_fall_by_the_number_of_replicas(workers: Any, replicas: int, dtype: str) -> None:
    run = Run(schedule="1f1b", stages=1, accumulation=2, batch=24, wide=True)
    given = Replicated(run=run, replicas=replicas, dtype=dtype)
    whole = workers.run(train_replica, 4, given)
    shards = workers.run(train_replica, 4, replace(given, shard=True))
    for one in gathered(shards):
        require_equal(one, gathered(whole)[0])
    for before, after in zip(filter(None, whole), filter(None, shards), strict=True):
        old, new = before["stats"]["memory"][0], after["stats"]["memory"][0]
        assert new["weights"] == old["weights"]
        for part in ("masters", "optimizer"):
            if old[part]:
                assert new[part] / old[part] == pytest.approx(1 / replicas, rel=0.01)
        assert (old["masters"] > 0) == (dtype == "bfloat16")


def _spoiled(rank: int, group: Any, given: Replicated) -> Any:
    return train_replica(rank, group, given)


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_a_skipped_window(workers: Any, schedule: str) -> None:
    run = Run(schedule=schedule, stages=2, accumulation=3, windows=5, batch=24)
    given = Replicated(run=run, on_nonfinite="skip-window", spoil=(1, 2, 5))
    whole = gathered(workers.run(_spoiled, 4, given))
    for one in gathered(workers.run(_spoiled, 4, replace(given, shard=True))):
        require_equal(one, whole[0])


def _state_moves(rank: int, group: Any, one: Replicated, other: Replicated) -> Any:
    """Train as ``one``, and go on as ``other`` from its state."""
    groups, more = groups_of(one), groups_of(other)
    torch.manual_seed(0)
    first, replica = make(groups, one)
    drive(first, one, replica)
    state = first.state_dict()
    first.close()
    second, replica = make(more, other)
    second.load_state_dict(state)
    result = drive(second, other, replica)
    second.close()
    return result


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_state_moves_between_sharded_and_whole(workers: Any, schedule: str) -> None:
    run = Run(schedule=schedule, stages=2, accumulation=4, windows=3, batch=48)
    ways = [Replicated(run=run, shard=shard) for shard in (False, True)]
    found = [gathered(workers.run(_state_moves, 4, one, other))[0] for one in ways for other in ways]
    for one in found[1:]:
        require_equal(one, found[0])


REFUSED = {
    "shard_optimizer=True with Muon": {"optimizer": "muon"},
    "shard_optimizer=True with AdamW": {"optimizer": "torch-adamw"},
    "policy 'predict'": {"schedule": "paci", "policy": "predict"},
}


def _refused(rank: int, group: Any, options: dict[str, Any]) -> str:
    run = Run(**{"schedule": "1f1b", "stages": 2, "accumulation": 2, **options})
    given = Replicated(run=run, shard=True)
    try:
        make(groups_of(given), given)
    except (ValueError, paci_rt.PaciError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("text", REFUSED)
def test_refused(workers: Any, text: str) -> None:
    said = workers.run(_refused, 4, REFUSED[text])
    assert all(text in one and "\n" not in one for one in said), said
