"""Replicas: several pipelines over the same stages make one update together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.replicated import Replicated, plain, train_replica
from support.toy import Run, train_local


def gathered(results: list[Any]) -> list[dict[str, Tensor]]:
    """Parameters of each replica."""
    found: dict[int, dict[str, Tensor]] = {}
    for one in filter(None, results):
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


@pytest.mark.parametrize(
    ("schedule", "stages", "chunks", "replicas"),
    [("1f1b", 1, 1, 4), ("interleaved-1f1b", 4, 2, 2), ("zb-2p", 2, 1, 2), ("1f1b", 1, 1, 3), ("1f1b", 1, 1, 1)],
)
def test_layouts(workers: Any, schedule: str, stages: int, chunks: int, replicas: int) -> None:
    run = Run(schedule=schedule, stages=stages, accumulation=4, chunks=chunks, optimizer="torch-sgd", batch=48)
    given = Replicated(run=run, replicas=replicas, lr_scheduler=True)
    found = gathered(workers.run(train_replica, 4, given))
    assert len(found) == replicas
    for one in found:
        require_equal(one, plain(given))


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_one_micro_batch_a_replica_is_one_pipeline_bit_for_bit(workers: Any, optimizer: str) -> None:
    """Two sums of one term each are added in the order in which one pipeline adds its two micro-batches."""
    run = Run(schedule="1f1b", stages=2, accumulation=1, optimizer=optimizer, batch=24)
    found = gathered(workers.run(train_replica, 4, Replicated(run=run)))
    one_pipeline = train_local(Run(schedule="1f1b", stages=2, accumulation=2, optimizer=optimizer, batch=24))
    for one in found:
        require_equal(one, one_pipeline["params"])


@pytest.mark.parametrize("scale_grads", [True, False])
def test_close_to_one_pipeline_with_all_micro_batches(workers: Any, scale_grads: bool) -> None:
    """The order of a sum of 2 x 3 terms differs, so a few roundings do: 1e-6 of a weight after five updates by SGD."""
    run = Run(schedule="1f1b", stages=2, accumulation=3, optimizer="sgd", batch=24)
    found = gathered(workers.run(train_replica, 4, Replicated(run=run, scale_grads=scale_grads)))
    whole = Run(schedule="1f1b", stages=2, accumulation=6, optimizer="sgd", batch=24)
    one_pipeline = train_local(whole, scale_grads=scale_grads)["params"]
    require_equal(found[0], found[1])
    for name, param in found[0].items():
        error = float((param - one_pipeline[name]).norm() / one_pipeline[name].norm())
        assert error < 1e-6, (name, error)


def test_clipping_by_the_norm_of_the_reduced_gradient(workers: Any) -> None:
    """The norm is summed in double precision, torch's is not: the coefficient may differ by a few roundings."""
    run = Run(schedule="1f1b", stages=2, accumulation=3, optimizer="torch-sgd", batch=24)
    given = Replicated(run=run, clip=0.05)
    results = workers.run(train_replica, 4, given)
    found, expected = gathered(results), plain(given)
    assert all(sum(one["stats"]["clipped_windows"].values()) == run.windows for one in results)
    require_equal(found[0], found[1])
    for name, param in found[0].items():
        error = float((param - expected[name]).norm() / expected[name].norm())
        assert error < 1e-6, (name, error)


ASYNC = {
    "paci": Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48),
    "paci, no overlap": Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48),
    "look-ahead": Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48, lookahead=True),
    "split": Run(schedule="paci-split", stages=2, accumulation=3, windows=6, batch=48),
    "one": Run(schedule="async-1f1b", stages=2, accumulation=1, windows=8, batch=24, optimizer="sgd"),
    "2bw": Run(schedule="pipedream-2bw", stages=2, accumulation=4, windows=6, batch=48),
    "stash": Run(schedule="pipedream", stages=2, accumulation=1, windows=6, batch=24),
    "recompute": Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48, policy="recompute"),
    "slack": Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48, slack=1, lookahead=True),
}


@pytest.mark.parametrize("name", ASYNC)
def test_asynchronous_replicas_have_the_same_bits(workers: Any, name: str) -> None:
    given = Replicated(run=ASYNC[name], overlap=0 if name == "paci, no overlap" else None)
    results = workers.run(train_replica, 4, given)
    found = gathered(results)
    require_equal(found[0], found[1])
    again = gathered(workers.run(train_replica, 4, given))
    require_equal(found[0], again[0])  # nothing depends on when sums arrive
    losses = [one["losses"] for one in results if one["losses"]]
    assert losses[0] != losses[1]  # they read other rows
    assert all(one["stats"]["windows"] == given.run.windows for one in results)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_group_of_one_changes_nothing(workers: Any, lookahead: bool) -> None:
    run = Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=24, lookahead=lookahead)
    found = gathered(workers.run(train_replica, 4, Replicated(run=run, replicas=1)))
    require_equal(found[0], train_local(run)["params"])


def test_overlapping_updates_come_later_on_all_stages(workers: Any) -> None:
    run = Run(schedule="paci", stages=2, accumulation=4, windows=6, batch=48)
    results = workers.run(train_replica, 4, Replicated(run=run, overlap=2))
    delays = {}
    for one in results:
        delays.update(one["stats"]["delay"])
    # Stage 1 reads weights before two backwards of the window before have entered; stage 0 is one forward ahead.
    assert delays == {0: {0: 4 + 5 * 1, 1: 5 * 3}, 1: {0: 4 + 5 * 2, 1: 5 * 2}}


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
@pytest.mark.parametrize("policy", ["raise", "skip-window", "skip-local"])
def test_what_is_not_finite_on_one_replica_is_handled_on_all(workers: Any, schedule: str, policy: str) -> None:
    run = Run(schedule=schedule, stages=2, accumulation=3, windows=5, optimizer="torch-adamw", batch=24)
    given = Replicated(run=run, on_nonfinite=policy, spoil=(1, 2, 5), overlap=0 if schedule == "1f1b" else 1)
    results = workers.run(train_replica, 4, given)
    if policy == "raise":
        assert all(one["finite"] for one in results)
        errors = {one["error"] for one in results}
        assert "NonFiniteError" in errors
        assert errors <= {"NonFiniteError", "PeerLostError"}
        texts = [one["text"] for one in results if one["error"] == "NonFiniteError"]
        assert {one["replica"] for one in results if one["error"] == "NonFiniteError"} == {0, 1}
        assert all("window 2" in text for text in texts)
        return
    found = gathered(results)
    require_equal(found[0], found[1])
    assert all(bool(param.isfinite().all()) for param in found[0].values())
    assert all(max(one["stats"]["skipped_windows"].values()) == 1 for one in results)
    if schedule == "1f1b":
        require_equal(found[0], plain(given, skip=2))
