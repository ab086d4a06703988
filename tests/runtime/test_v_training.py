"""Training in a V with what else a run can ask for: replicas, clipping, windows that do not count, tied weights, odd
numbers of micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.schedules import FAMILIES
from support.bad_numbers import Bad, drive, local, on_rank
from support.plain import plain_training, same
from support.pool import WorkerPool
from support.replicated import Replicated, gathered, plain, require_equal, train_replica
from support.tied import Embedding, Head
from support.toy import Run, train_local

FLUSHED = ("zb-v", "v-half", "v-min", "dualpipe-v")
IN_A_V = tuple(name for name, family in FAMILIES.items() if family.placement == "v")


def test_these_are_all_there_are() -> None:
    assert sorted(IN_A_V) == sorted((*FLUSHED, "paci-v"))


def test_of_the_backwards_of_a_rank_one_at_a_time_is_in_its_peak() -> None:
    modules = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules, schedule="zb-v", n_microbatches=2, loss_fn=nn.functional.mse_loss, optimizer=paci_rt.AdamW
    )
    pipe.step(torch.ones(4, 8), target=torch.zeros(4, 8))
    stats = pipe.stats()
    first, second = stats["memory"].values()
    assert min(first["temporaries"], second["temporaries"]) > 0
    at_once = first["total"] + second["total"] - min(first["temporaries"], second["temporaries"])
    assert stats["peak_bytes"] <= at_once  # activations of both stages need not be most at one moment


# --- replicas ---


@pytest.mark.parametrize("schedule", FLUSHED)
def test_replicas_of_a_flushed_v_equal_plain_sums(workers: WorkerPool, schedule: str) -> None:
    run = Run(schedule=schedule, stages=2, accumulation=3, optimizer="torch-adamw", batch=24)
    replicas = gathered(workers.run(train_replica, 4, Replicated(run=run, lr_scheduler=True)))
    assert len(replicas) == 2
    for one in replicas:
        require_equal(one, plain(Replicated(run=run, lr_scheduler=True)))


@pytest.mark.parametrize("schedule", ["zb-v", "v-min", "paci-v"])
@pytest.mark.parametrize("shard", [False, True])
def test_replicas_of_the_same_rows_are_one_pipeline(workers: WorkerPool, schedule: str, shard: bool) -> None:
    run = Run(schedule=schedule, stages=2, accumulation=4, windows=6, batch=24)
    found = gathered(workers.run(train_replica, 4, Replicated(run=run, same_rows=True, shard=shard)))
    for one in found:
        require_equal(one, train_local(run)["params"])


@pytest.mark.parametrize("lookahead", [False, True])
def test_replicas_under_paci_v_have_the_same_bits(workers: WorkerPool, lookahead: bool) -> None:
    run = Run(schedule="paci-v", stages=2, accumulation=3, windows=6, batch=48, lookahead=lookahead)
    results = workers.run(train_replica, 4, Replicated(run=run))
    found = gathered(results)
    require_equal(found[0], found[1])
    losses = [one["losses"] for one in results if one["losses"]]
    assert len(losses) == 2 and losses[0] != losses[1]  # rank 0 of each replica, which read other rows


@pytest.mark.parametrize("schedule", ["zb-v", "dualpipe-v", "paci-v"])
@pytest.mark.parametrize("policy", ["raise", "skip-window", "skip-local"])
def test_what_is_not_finite_on_one_replica_is_handled_on_all(workers: WorkerPool, schedule: str, policy: str) -> None:
    run = Run(schedule=schedule, stages=2, accumulation=3, windows=5, optimizer="torch-adamw", batch=24)
    given = Replicated(run=run, on_nonfinite=policy, spoil=(1, 2, 5))
    results = workers.run(train_replica, 4, given)
    if policy == "raise":
        assert all(one["finite"] for one in results)
        errors = {one["error"] for one in results}
        assert "NonFiniteError" in errors and errors <= {"NonFiniteError", "PeerLostError"}
        return
    found = gathered(results)
    require_equal(found[0], found[1])
    assert all(bool(param.isfinite().all()) for param in found[0].values())
    if schedule != "paci-v":
        require_equal(found[0], plain(given, skip=2))


def test_overlap_of_sums_is_refused(workers: WorkerPool) -> None:
    run = Run(schedule="paci-v", stages=2, accumulation=4, batch=24)
    said = workers.run(refused_overlap, 4, Replicated(run=run, overlap=2))
    assert all("overlap is 2 under paci-v" in one and "use overlap 0" in one for one in said)


def refused_overlap(rank: int, group: Any, given: Replicated) -> str:
    try:
        train_replica(rank, group, given)
    except ValueError as error:
        return str(error)
    return ""


def by_mesh(rank: int, group: Any, schedule: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import DeviceMesh

    from support.replicated import drive as drive_replica
    from support.toy import loss_fn, make_optimizer, module

    given = Replicated(run=Run(schedule=schedule, stages=2, accumulation=3, optimizer="torch-sgd", batch=24))
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "pp"))
    place = mesh.get_local_rank("pp")
    stages = [paci_rt.PipelineStage(module(at, given.run), at, 4) for at in (3 - place, place)]
    made = paci_rt.get_schedule_class(schedule)(
        stages, 3, loss_fn, optimizer=[make_optimizer("torch-sgd", stage.parameters()) for stage in stages], mesh=mesh
    )
    try:
        return drive_replica(made, given, mesh.get_local_rank("dp"))
    finally:
        made.close()


@pytest.mark.parametrize("schedule", ["zb-v", "v-half"])
def test_a_mesh_says_the_same(workers: WorkerPool, schedule: str) -> None:
    given = Replicated(run=Run(schedule=schedule, stages=2, accumulation=3, optimizer="torch-sgd", batch=24))
    for one in gathered(workers.run(by_mesh, 4, schedule)):
        require_equal(one, plain(given))


# --- windows that do not count, and clipping, between processes ---

SKIPPING = [
    Bad(schedule="paci-v", stages=4, stage=0, at=9),
    Bad(schedule="paci-v", stages=4, stage=2, at=10, optimizer="torch-adamw", transport="gloo", clip=0.5),
    Bad(schedule="paci-v", stages=4, stage=1, at=23, optimizer="sgd"),  # the last window: nothing travels after it
    Bad(schedule="paci-v", stages=6, stage=3, at=5, lookahead=True, clip=1.0),
    Bad(schedule="paci-v", stages=6, accumulation=1, windows=12, stage=5, at=7, clip=0.1),
    Bad(schedule="paci-v", stages=4, at=6, on_nonfinite="skip-local", clip=1.0),
    Bad(schedule="zb-v", stages=4, stage=1, at=9, clip=0.5),
    Bad(schedule="v-min", stages=6, stage=5, at=3, clip=0.2, transport="gloo"),
    Bad(schedule="dualpipe-v", stages=4, at=8, on_nonfinite="skip-local"),
]


@pytest.mark.parametrize(
    "run", SKIPPING, ids=lambda run: f"{run.schedule}-{run.stages}-{run.stage}-{run.at}-{run.on_nonfinite}"
)
def test_a_window_that_does_not_count_gives_the_bits_of_one_process(workers: WorkerPool, run: Bad) -> None:
    ranks = workers.run(on_rank, run.stages // 2, run)
    here = drive(local(run), run)
    params: dict[str, Tensor] = {}
    for rank in ranks:
        params |= rank["params"]
        for key in ("skipped_windows", "taken_back_windows", "nonfinite_windows", "clipped_windows", "norm_lags"):
            for stage, value in rank["stats"][key].items():
                assert value == here["stats"][key][stage], key
    same(params, here["params"])
    assert all(bool(param.isfinite().all()) for param in params.values())
    if run.on_nonfinite == "skip-window":
        assert here["stats"]["skipped_windows"] == dict.fromkeys(range(run.stages), 1)


@pytest.mark.parametrize(("at", "optimizer"), [(2, "adamw"), (9, "torch-sgd"), (23, "lion")])
def test_what_comes_with_the_gradients_leaves_no_trace_under_paci_v(
    monkeypatch: pytest.MonkeyPatch, at: int, optimizer: str
) -> None:
    from runtime.test_nonfinite import never_took_place

    run = Bad(schedule="paci-v", stages=6, at=at, optimizer=optimizer)
    found = drive(local(run), run)
    same(found["params"], never_took_place(monkeypatch, run, {at // 4})["params"])
    assert found["stats"]["skipped_windows"] == dict.fromkeys(range(6), 1)


@pytest.mark.parametrize(("stages", "accumulation"), [(16, 1), (16, 3), (4, 2)])
def test_a_stage_hears_of_a_window_that_does_not_count_in_time(stages: int, accumulation: int) -> None:
    """However the costs are, which say how far stages run ahead of each other."""
    for hop in (0.0, 1.0, 3.0):
        run = Bad(schedule="paci-v", stages=stages, accumulation=accumulation, windows=12, stage=0, at=7)
        found = drive(local(run, costs=paci_rt.StepCosts(hop=hop)), run)
        assert found["stats"]["skipped_windows"] == dict.fromkeys(range(stages), 1)
        assert all(bool(param.isfinite().all()) for param in found["params"].values())
    if (stages, accumulation) == (16, 1):  # more windows on their way than a stage can tell of
        with pytest.raises(ValueError, match="48 windows could be undecided; use a larger accumulation, or"):
            local(run, costs=paci_rt.StepCosts(hop=10.0))


# --- odd numbers, and nothing but the plain loop ---


@pytest.mark.parametrize("schedule", FLUSHED)
@pytest.mark.parametrize("accumulation", [1, 2, 5, 7, 11])
def test_any_number_of_micro_batches_is_a_plain_loops(schedule: str, accumulation: int) -> None:
    for stages in (1, 2, 3):
        run = Run(schedule=schedule, stages=stages, accumulation=accumulation, optimizer="torch-adamw", batch=13)
        plain_one, piped = plain_training(run), train_local(run)
        same(piped["params"], plain_one["params"])
        assert piped["losses"] == plain_one["losses"]


@pytest.mark.parametrize("accumulation", [1, 3, 7])
def test_paci_v_on_one_rank_is_a_plain_loop(accumulation: int) -> None:
    """Two stages a rank and one micro-batch after the other: no forward comes before an update of its own."""
    run = Run(schedule="paci-v", stages=1, accumulation=accumulation, optimizer="torch-sgd", batch=13)
    found = train_local(run)
    assert found["stats"]["max_delay"] == 0
    same(found["params"], plain_training(run)["params"])


# --- limits ---


@pytest.mark.parametrize("limit", [1, 1.5, 2, 3.7])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_limit_is_kept_and_bits_do_not_depend_on_who_runs_it(workers: WorkerPool, stages: int, limit: float) -> None:
    run = Run(schedule="paci-v", stages=stages, accumulation=3, windows=4)
    stats = train_local(run, activation_limit=limit)["stats"]
    assert max(stats["peak_rank_in_flight"].values()) <= 2 * limit
    assert stats["max_drift"] <= stats["drift_bound"]


@pytest.mark.parametrize("limit", [0.99, 0, -1, float("nan"), float("inf"), "2", True])
def test_a_limit_that_cannot_be_met_is_one_clear_error(limit: Any) -> None:
    stages = [nn.Linear(4, 4) for _ in range(4)]
    with pytest.raises(ValueError, match=r"activation_limit is .*: give what a rank may hold") as caught:
        paci_rt.LocalPipeline(
            stages, schedule="paci-v", n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
            activation_limit=limit,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", [name for name in FAMILIES if name != "paci-v"])
def test_a_limit_is_refused_by_all_others(schedule: str) -> None:
    with pytest.raises(ValueError, match=f"activation_limit is 3: {schedule} takes none; leave it out, or use paci-v"):
        paci_rt.LocalPipeline(
            [nn.Linear(4, 4) for _ in range(4)], schedule=schedule, n_microbatches=4, loss_fn=nn.MSELoss(),
            optimizer=paci_rt.AdamW, activation_limit=3,
        )  # fmt: skip


# --- tied weights ---


def tied(stages: int) -> list[nn.Module]:
    torch.manual_seed(8)
    middle = [nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(stages - 2)]
    first, last = Embedding(), Head()
    last.head.weight.data.copy_(first.wte.weight.data)
    return [first, *middle, last]


def tie(stages: int) -> paci_rt.TiedWeight:
    return paci_rt.TiedWeight(owner_stage=0, owner="wte.weight", reader_stage=stages - 1, reader="head.weight")


def rows(step: int, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randint(7, (count,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def train_tied(pipe: Any, windows: int) -> dict[str, Any]:
    history = []
    for step in range(windows):
        x, y = rows(step)
        losses: list[Tensor] = []
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None, losses=losses)
        history += [float(loss) for loss in losses]
    pipe.drain()
    params = {
        f"{stage.stage_index}.{name}": param.detach().clone()
        for stage in pipe.stages
        for name, param in stage.named_parameters()
    }
    return {"params": params, "losses": history, "stats": pipe.stats()}


TIED = [
    {"schedule": "paci-v", "n_microbatches": 3},
    {"schedule": "paci-v", "n_microbatches": 1, "lookahead": False},
    {"schedule": "paci-v", "n_microbatches": 3, "policy": "predict"},
    {"schedule": "paci-v", "n_microbatches": 4, "policy": "recompute", "max_grad_norm": 0.3},
    {"schedule": "paci-v", "n_microbatches": 4, "on_nonfinite": "skip-window", "max_grad_norm": 0.3},
    {"schedule": "paci-v", "n_microbatches": 4, "activation_limit": 1.5},
    {"schedule": "zb-v", "n_microbatches": 3, "max_grad_norm": 0.1},
    {"schedule": "v-half", "n_microbatches": 5, "on_nonfinite": "skip-window"},
]


def tied_on_rank(rank: int, group: Any, options: dict[str, Any], ranks: int) -> dict[str, Any]:
    given = dict(options)
    name, a, pieces = given.pop("schedule"), given.pop("n_microbatches"), tied(2 * ranks)
    stages = [paci_rt.PipelineStage(pieces[at], at, 2 * ranks, group=group) for at in (rank, 2 * ranks - 1 - rank)]
    pipe = paci_rt.get_schedule_class(name)(
        stages, a, nn.CrossEntropyLoss(), optimizer=[paci_rt.AdamW(one.parameters(), lr=1e-2) for one in stages],
        tied_weights=[tie(2 * ranks)], **given,
    )  # fmt: skip
    try:
        return train_tied(pipe, 5)
    finally:
        pipe.close()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("options", TIED, ids=lambda one: "-".join(map(str, one.values())))
def test_a_tied_weight_is_local_and_has_the_bits_of_one_process(
    workers: WorkerPool, ranks: int, options: dict[str, Any]
) -> None:
    results = workers.run(tied_on_rank, ranks, options, ranks)
    pipe = paci_rt.LocalPipeline(
        tied(2 * ranks), loss_fn=nn.CrossEntropyLoss(), optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        tied_weights=[tie(2 * ranks)], **options,
    )  # fmt: skip
    here = train_tied(pipe, 5)
    params: dict[str, Tensor] = {}
    for one in results:
        params |= one["params"]
    same(params, here["params"])
    assert results[0]["losses"] == here["losses"]
    assert torch.equal(params["0.wte.weight"], params[f"{2 * ranks - 1}.head.weight"])
    assert not torch.equal(params["0.wte.weight"], tied(2)[0].wte.weight)
    assert results[0]["stats"]["drift"] == {at: here["stats"]["drift"][at] for at in results[0]["stats"]["drift"]}


@pytest.mark.parametrize("policy", ["stash", "2bw"])
def test_versions_of_a_tied_weight_are_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=f"tied_weights under policy '{policy}'.* untie the weights, or use policy"):
        paci_rt.LocalPipeline(
            tied(6), schedule="paci-v", n_microbatches=6, loss_fn=nn.CrossEntropyLoss(), optimizer=paci_rt.AdamW,
            tied_weights=[tie(6)], policy=policy,
        )  # fmt: skip


def copies_on_rank(rank: int, group: Any) -> int:
    found = []
    for own in (False, True):
        pieces = tied(4)
        stages = [paci_rt.PipelineStage(pieces[at], at, 4, group=group) for at in (rank, 3 - rank)]
        pipe = paci_rt.SchedulePACIV(
            stages, 2, nn.CrossEntropyLoss(), optimizer=[paci_rt.AdamW(one.parameters()) for one in stages],
            tied_weights=[tie(4)] if own else [],
        )  # fmt: skip
        memory = train_tied(pipe, 4)["stats"]["memory"]
        found.append(sum(parts["messages"] for parts in memory.values()))
        pipe.close()
    return found[1] - found[0]


def test_copies_on_their_way_are_counted(workers: WorkerPool) -> None:
    more = workers.run(copies_on_rank, 2)
    weight_bytes = 7 * 6 * 4
    assert weight_bytes <= more[0] <= 4 * weight_bytes and more[1] == 0


@pytest.mark.parametrize("schedule", FLUSHED)
@pytest.mark.parametrize("clip", [0.01, 0.2])
def test_a_tied_weight_is_clipped_as_torch_clips_the_uncut_model(schedule: str, clip: float) -> None:
    x, y = rows(0, 8)
    pieces = tied(4)
    pieces[3].head.weight = pieces[0].wte.weight
    model = nn.Sequential(*pieces)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        for part, target in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            (nn.functional.cross_entropy(model(part), target) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    ours = tied(4)
    pipe = paci_rt.LocalPipeline(
        ours, schedule=schedule, n_microbatches=4, loss_fn=nn.CrossEntropyLoss(),
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.5), max_grad_norm=clip,
        tied_weights=[tie(4)],
    )  # fmt: skip
    for _ in range(2):
        pipe.step(x, target=y)
    pipe.drain()
    assert pipe.stats()["clipped_windows"] == dict.fromkeys(range(4), 2)
    line = paci_rt.LocalPipeline(
        tied(4), schedule="1f1b", n_microbatches=4, loss_fn=nn.CrossEntropyLoss(),
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.5), max_grad_norm=clip,
        tied_weights=[tie(4)],
    )  # fmt: skip
    for _ in range(2):
        line.step(x, target=y)
    line.drain()
    same(dict(pipe.named_parameters()), dict(line.named_parameters()))
    theirs = [param for piece in pieces for param in piece.parameters()]
    mine = [param for piece in ours for param in piece.parameters()]
    for param, expected in zip(mine, [*theirs], strict=False):
        # Two sums in another order: a few roundings of a weight.
        assert float((param - expected).norm() / expected.norm()) < 1e-6


# --- policies, recompute, look-ahead: every process equals the oracle, and bounds hold ---


@pytest.mark.parametrize(
    "run",
    [
        replace(Run(schedule="paci-v", stages=ranks, accumulation=a, lookahead=ahead, windows=6), **more)
        for ranks, a, ahead, more in (
            (2, 1, True, {}),
            (3, 2, True, {"optimizer": "sgd"}),
            (4, 5, True, {"batch": 20, "eval_every": 2}),
            (3, 4, True, {"policy": "recompute", "optimizer": "lion"}),
            (2, 3, False, {"policy": "predict", "optimizer": "torch-adamw"}),
            (4, 1, False, {"policy": "stash"}),
            (3, 3, True, {"buffers": 2, "optimizer": "muon"}),
        )
    ],
    ids=lambda run: f"{run.stages}-{run.accumulation}-{run.policy}-{run.optimizer}",
)
def test_paci_v_on_processes_has_the_bits_of_one(workers: WorkerPool, run: Run) -> None:
    from support.toy import train_rank

    ranks, here = workers.run(train_rank, run.stages // 2, run), train_local(run)
    params: dict[str, Tensor] = {}
    for rank in ranks:
        params |= rank["params"]
    same(params, here["params"])
    assert ranks[0]["losses"] == here["losses"]
    assert here["stats"]["max_drift"] <= here["stats"]["drift_bound"]
    for rank in ranks:
        for stage, value in rank["stats"]["delay"].items():
            assert value == here["stats"]["delay"][stage]


def test_look_ahead_changes_what_is_trained_and_costs_no_version() -> None:
    run = Run(schedule="paci-v", stages=3, accumulation=2, windows=6)
    without, with_it = train_local(run), train_local(replace(run, lookahead=True))
    assert any(not torch.equal(without["params"][name], with_it["params"][name]) for name in without["params"])
    assert (
        sum(with_it["stats"]["lookahead_forwards"].values()) > 0
        if isinstance(with_it["stats"]["lookahead_forwards"], dict)
        else with_it["stats"]["lookahead_forwards"] > 0
    )
