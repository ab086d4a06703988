"""Replicas: several pipelines over the same stages make one update together."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

import paci_rt
from support.replicated import Replicated, drive, gathered, groups_of, make, plain, require_equal, train_replica
from support.toy import Run, loss_fn, make_optimizer, module, train_local


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


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("schedule", ["paci", "zb-h1", "paci-split"])
def test_replicas_of_the_same_rows_are_one_pipeline_bit_for_bit(workers: Any, schedule: str, lookahead: bool) -> None:
    """Twice a sum, divided by twice as many micro-batches, is exact: nothing else may differ from one pipeline."""
    if lookahead and schedule != "paci":
        lookahead = False
    run = Run(schedule=schedule, stages=2, accumulation=4, windows=6, batch=24, lookahead=lookahead)
    found = gathered(workers.run(train_replica, 4, Replicated(run=run, overlap=0, same_rows=True)))
    for one in found:
        require_equal(one, train_local(run)["params"])


def _made(rank: int, group: Any, given: Replicated, wrong: str) -> str:
    """What making, or the first steps, of a schedule say where one replica differs."""
    torch.manual_seed(0)
    groups = groups_of(given)
    replica = rank // given.run.stages
    more: dict[str, Any] = {}
    if rank == 3 and wrong == "one stage":
        more["max_grad_norm"] = 2.0
    if replica == 1 and wrong == "optimizer":
        given = replace(given, run=replace(given.run, optimizer="sgd"))
    if replica == 1 and wrong == "max_grad_norm":
        more["max_grad_norm"] = 2.0
    if replica == 1 and wrong == "accumulation":
        given = replace(given, run=replace(given.run, accumulation=2))
    try:
        schedule, _ = make(groups, given, shift=float(replica) if wrong == "weights" else 0.0, **more)
    except paci_rt.PaciError as error:
        return f"{type(error).__name__}: {error}"
    try:
        if wrong == "frozen" and replica == 1:
            next(schedule.stages[0].parameters()).requires_grad_(False)
        if wrong == "drain" and replica == 1:
            schedule.drain()
            drive(schedule, replace(given, run=replace(given.run, windows=1)), replica)
            return "" if wrong != "drain" else "drained"
        drive(schedule, given, replica)
    except paci_rt.PaciError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        schedule.close()
    return ""


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("one stage", "max_grad_norm is "),
        ("optimizer", "optimizer"),
        ("max_grad_norm", "max_grad_norm is "),
        ("accumulation", "n_microbatches is 4 on rank"),
        ("weights", "the weights of stage "),
        ("frozen", "disagree about parameters that are trained"),
    ],
)
def test_replicas_that_disagree_are_told(workers: Any, wrong: str, text: str) -> None:
    run = Run(schedule="1f1b", stages=2, accumulation=4, windows=2, batch=48)
    said = workers.run(_made, 4, Replicated(run=run), wrong)
    assert all("Error: " in one for one in said), said
    kinds = ("DisagreementError", "PeerLostError", "could not make its pipeline: DisagreementError")
    assert all(any(kind in one for kind in kinds) for one in said), said
    assert sum("DisagreementError" in one and text in one for one in said) >= 2, said


def _late(rank: int, group: Any, given: Replicated) -> str:
    """The last replica goes away after its first step, and stays away."""
    groups = groups_of(given)
    if rank >= given.replicas:
        return ""
    schedule, replica = make(groups, given, transfer_timeout_s=3.0)
    try:
        steps = 1 if replica == given.replicas - 1 else given.run.windows
        drive(schedule, replace(given, run=replace(given.run, windows=steps)), replica)
        if steps == 1:
            time.sleep(8.0)
        return "done"
    except paci_rt.PaciError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        schedule.close()


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_a_wait_for_another_replica_has_a_deadline(workers: Any, schedule: str) -> None:
    run = Run(schedule=schedule, stages=1, accumulation=4, windows=3, batch=24)
    said = workers.run(_late, 4, Replicated(run=run))
    assert said[0].startswith("TransferTimeoutError: 0U1 timed out after 3 s"), said
    assert "transfer_timeout_s" in said[0]
    assert said[1] == "done"


def _by_mesh(rank: int, group: Any, given: Replicated) -> Any:
    """The same by a mesh; pipelines along its second dimension."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "pp"))
    torch.manual_seed(0)
    stage = paci_rt.PipelineStage(module(mesh.get_local_rank("pp"), given.run), mesh.get_local_rank("pp"), 2)
    optimizer = make_optimizer(given.run.optimizer, stage.parameters())
    schedule = paci_rt.Schedule1F1B(
        stage, given.run.accumulation, loss_fn, optimizer=optimizer, mesh=mesh, transfer_timeout_s=30.0
    )
    try:
        return drive(schedule, given, mesh.get_local_rank("dp"))
    finally:
        schedule.close()


def test_a_mesh_says_the_same(workers: Any) -> None:
    given = Replicated(run=Run(schedule="1f1b", stages=2, accumulation=3, optimizer="torch-adamw", batch=24))
    for one in gathered(workers.run(_by_mesh, 4, given)):
        require_equal(one, plain(given))


def _refusals(rank: int, group: Any) -> list[str]:
    from torch.distributed.device_mesh import DeviceMesh

    run = Run(schedule="1f1b", stages=2, accumulation=2)
    square = torch.arange(4).view(2, 2)
    good = DeviceMesh("cpu", square, mesh_dim_names=("dp", "pp"))
    found = []
    for options in (
        {"mesh": DeviceMesh("cpu", square, mesh_dim_names=("dp", "tp"))},
        {"mesh": DeviceMesh("cpu", square.view(1, 2, 2), mesh_dim_names=("dp", "pp", "tp"))},
        {"mesh": DeviceMesh("cpu", square.view(4, 1), mesh_dim_names=("dp", "pp"))},
        {"mesh": good, "replica_group": group},
        {"mesh": "dp x pp"},
        {"replica_group": "all"},
        {"shard_optimizer": True},
        {"overlap": 1},
        {"mesh": good, "overlap": 1},
    ):
        at = good.get_local_rank("pp")
        stage = paci_rt.PipelineStage(module(at, run), at, 2)
        optimizer = make_optimizer("sgd", stage.parameters())
        try:
            paci_rt.Schedule1F1B(stage, 2, loss_fn, optimizer=optimizer, transfer_timeout_s=20.0, **options)
            found.append("")
        except (ValueError, paci_rt.PaciError) as error:
            found.append(str(error))
    return found


def test_meshes_and_groups_that_do_not_match_are_refused(workers: Any) -> None:
    for said in workers.run(_refusals, 4):
        assert all("\n" not in one for one in said)
        for text, one in zip(
            (
                "the mesh has dimensions dp of 2, tp of 2: give one with a dimension 'pp'",
                "the mesh has dimensions dp of 1, pp of 2, tp of 2",
                "give it 2 processes in dimension 'pp'",
                "mesh and replica_group were given",
                "mesh is 'dp x pp'",
                "replica_group is 'all'",
                "shard_optimizer is True and there are no replicas",
                "overlap is 1 and there are no replicas",
                "overlap is 1 under 1f1b",
            ),
            said,
            strict=True,
        ):
            assert text in one, said
