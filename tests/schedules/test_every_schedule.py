"""What holds for every schedule and policy: distributed equals local, flush equals plain training, and no message
buffer is so small that a run gets stuck."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.errors import ScheduleError
from paci_rt.optim.bind import bind_optimizer
from paci_rt.schedules import FAMILIES
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.validate import validate
from paci_rt.transport import LocalTransport
from support.marks import slow
from support.plain import plain_training, same
from support.pool import WorkerPool
from support.toy import CLASSES, Run, batch, loss_fn, make_optimizer, module, sha, train_local, train_rank

FLUSH = sorted(name for name, family in FAMILIES.items() if family.flush)

DISTRIBUTED = [
    *(Run(schedule=name, stages=3, accumulation=6) for name in FAMILIES),
    *(Run(schedule=name, stages=4, accumulation=4, optimizer="torch-adamw") for name in FAMILIES),
    Run(schedule="interleaved-1f1b", stages=4, accumulation=4, chunks=2),
    Run(schedule="interleaved-1f1b", stages=6, accumulation=4, chunks=3, wide=True, windows=4, eval_every=2),
    Run(schedule="interleaved-1f1b", stages=8, accumulation=8, chunks=2, optimizer="torch-sgd"),
    Run(schedule="interleaved-zb", stages=4, accumulation=4, chunks=2),
    Run(schedule="interleaved-zb", stages=6, accumulation=5, chunks=2, batch=10, optimizer="torch-adamw"),
    Run(schedule="interleaved-zb", stages=6, accumulation=4, chunks=3, wide=True, windows=4, eval_every=2),
    Run(schedule="interleaved-zb", stages=8, accumulation=2, chunks=2, policy="recompute"),
    Run(schedule="looped-bfs", stages=4, accumulation=5, chunks=2, batch=10, eval_every=2),
    Run(schedule="looped-bfs", stages=6, accumulation=4, chunks=3, wide=True, windows=4, eval_every=2),
    Run(schedule="looped-bfs", stages=4, accumulation=4, chunks=2, policy="recompute", optimizer="torch-sgd"),
    Run(schedule="zb-2p", stages=3, accumulation=5, wide=True, windows=4, eval_every=2),
    Run(schedule="zb-h1", stages=2, accumulation=1),
    Run(schedule="paci-v", stages=3, accumulation=3, lookahead=True, eval_every=2),
    Run(schedule="paci-v", stages=2, accumulation=2, policy="stash", optimizer="torch-sgd"),
    Run(schedule="paci-v", stages=3, accumulation=4, policy="2bw", wide=True, windows=4),
    Run(schedule="paci-v", stages=2, accumulation=3, policy="recompute", lookahead=True, optimizer="sgd"),
    Run(schedule="pipedream", stages=3, accumulation=4, wide=True, windows=4, eval_every=2),
    Run(schedule="pipedream-2bw", stages=3, accumulation=2, slack=0, optimizer="sgd", eval_every=2),
    *(
        Run(schedule="paci", stages=3, accumulation=3, slack=1, policy=policy, optimizer=optimizer)
        for policy in ("stash", "2bw", "predict", "recompute")
        for optimizer in ("adamw", "torch-sgd")
    ),
    Run(schedule="async-1f1b", stages=4, accumulation=3, policy="predict", optimizer="torch-adamw"),
    Run(schedule="zb-h2", stages=3, accumulation=6, policy="recompute"),
    Run(schedule="paci", stages=3, accumulation=3, lookahead=True, eval_every=2),
    Run(schedule="paci", stages=4, accumulation=2, lookahead=True, optimizer="sgd", slack=1),
    Run(schedule="paci", stages=3, accumulation=4, lookahead=True, policy="recompute"),
    *(Run(schedule="paci", stages=3, accumulation=2, lookahead=True, optimizer=kind) for kind in ("lion", "muon")),
    Run(schedule="interleaved-1f1b", stages=4, accumulation=2, chunks=2, policy="recompute"),
    *(
        Run(schedule="paci", stages=stages, accumulation=accumulation, slack=slack, windows=6, **more)
        for stages, accumulation, slack, more in (
            (3, 2, (2, 1, 0), {"optimizer": "torch-adamw", "eval_every": 3}),
            (4, 3, (3, 2, 1, 0), {"lookahead": True, "optimizer": "sgd"}),
            (4, 8, (4, 2, 1, 0), {"lookahead": True, "batch": 16, "eval_every": 2}),
            (4, 2, (0, 1, 2, 0), {"policy": "stash"}),
            (4, 1, (3, 1, 0, 0), {"policy": "stash", "optimizer": "torch-sgd"}),
            (3, 5, (3, 1, 0), {"policy": "2bw", "batch": 15}),
            (3, 2, (2, 2, 0), {"policy": "predict"}),
            (4, 4, (2, 1, 1, 0), {"policy": "recompute", "wide": True}),
        )
    ),
    Run(schedule="paci-split", stages=4, accumulation=4, slack=(3, 2, 1, 0), lookahead=True, buffers=2),
    Run(schedule="paci-split", stages=3, accumulation=2, policy="stash", wide=True, windows=4, eval_every=2),
    Run(schedule="async-1f1b", stages=3, accumulation=3, slack=(2, 1, 0)),
    Run(schedule="pipedream", stages=4, accumulation=3, slack=(3, 2, 1, 0)),
]
ONE_EACH = len(FAMILIES)

GRID = [
    Run(schedule=schedule, stages=stages, accumulation=accumulation, optimizer=optimizer)
    for (stages, accumulation), optimizer in zip(
        [(p, a) for p in (2, 3, 4) for a in (1, 2, p, p + 3)], itertools.cycle(["adamw", "torch-adamw"]), strict=False
    )
    for schedule in ("paci", "1f1b")
] + [
    Run(schedule="paci", stages=3, accumulation=2, slack=1, optimizer="sgd"),
    Run(schedule="paci", stages=4, accumulation=5, slack=3, buffers=2),
    Run(schedule="async-1f1b", stages=3, accumulation=4),
    Run(schedule="gpipe", stages=2, accumulation=3, optimizer="torch-sgd"),
    Run(schedule="paci", stages=3, accumulation=4, wide=True, windows=7, eval_every=3),
    Run(schedule="1f1b", stages=2, accumulation=4, wide=True, windows=7, eval_every=2, optimizer="torch-adamw"),
]


def without_messages(parts: dict[str, int]) -> dict[str, int]:
    """Bytes of a stage, without those of the transport, which one process has none of."""
    return {**parts, "messages": 0, "total": parts["total"] - parts["messages"]}


def name_of(run: Run) -> str:
    return f"{run.schedule}-{run.stages}-{run.accumulation}-{run.chunks}-{run.policy or ''}-{run.optimizer}-{run.slack}"


@pytest.mark.parametrize("run", [*DISTRIBUTED[:ONE_EACH], *map(slow, DISTRIBUTED[ONE_EACH:] + GRID)], ids=name_of)
def test_distributed_equals_local_bit_for_bit(workers: WorkerPool, run: Run) -> None:
    ranks, local = workers.run(train_rank, run.stages // run.chunks, run), train_local(run)
    params: dict[str, Tensor] = {}
    for rank in ranks:
        params |= rank["params"]
    same(params, local["params"])
    assert sha(params) == sha(local["params"])
    assert ranks[run.places.last_rank]["losses"] == local["losses"]
    for number, rank in enumerate(ranks):
        keys = ["drift", "delay", "peak_in_flight", "peak_pending"]
        for key in keys:
            for stage, value in rank["stats"][key].items():
                assert value == local["stats"][key][stage], key
        if not run.wide:  # where shapes change, a receive may be posted with room to spare
            for stage, parts in rank["stats"]["memory"].items():
                assert without_messages(parts) == without_messages(local["stats"]["memory"][stage])
        assert rank["stats"]["peak_rank_in_flight"][number] == local["stats"]["peak_rank_in_flight"][number]


@pytest.mark.parametrize("schedule", FLUSH)
@pytest.mark.parametrize(
    ("stages", "accumulation", "chunks"), [slow(1, 3, 1), slow(2, 4, 1), (3, 6, 1), slow(4, 8, 2), (4, 2, 2)]
)
def test_flush_schedules_equal_plain_training(schedule: str, stages: int, accumulation: int, chunks: int) -> None:
    chunks = chunks if FAMILIES[schedule].takes_chunks else 1
    if FAMILIES[schedule].takes_chunks and accumulation % (stages // chunks):
        accumulation *= stages // chunks
    for optimizer in ("torch-adamw", "torch-sgd"):
        run = Run(schedule=schedule, stages=stages, accumulation=accumulation, chunks=chunks, optimizer=optimizer)
        plain, piped = plain_training(run), train_local(run)
        same(piped["params"], plain["params"])
        assert piped["losses"] == plain["losses"]


@pytest.mark.parametrize("optimizer", ["adamw", "nadam", "lion", "muon"])
def test_a_flush_schedule_equals_a_plain_loop_of_our_own_optimizers(optimizer: str) -> None:
    run = Run(schedule="1f1b", stages=3, accumulation=4, optimizer=optimizer)
    modules = [module(stage, run) for stage in range(run.stages)]
    bounds = [
        bind_optimizer(make_optimizer(optimizer, one.parameters()), dict(one.named_parameters())) for one in modules
    ]
    for step in range(run.windows):
        x, y = batch(run, step)
        for inputs, targets in zip(x.chunk(run.accumulation), y.chunk(run.accumulation), strict=True):
            loss_fn(nn.Sequential(*modules)(inputs), targets).backward()
            for one, bound in zip(modules, bounds, strict=True):
                for param in one.parameters():
                    assert param.grad is not None
                    bound.accumulate(param, param.grad)
                    param.grad = None
        for bound in bounds:
            bound.update(run.accumulation)
    plain = {f"{at}.{name}": param for at, one in enumerate(modules) for name, param in one.named_parameters()}
    same(train_local(run)["params"], plain)


@pytest.mark.parametrize("policy", ["bounded", "stash", "2bw", "predict", "recompute"])
@pytest.mark.parametrize("slack", [slow(0), (3, 1, 1, 0)])
def test_paci_split_is_paci_to_the_bit(policy: str, slack: Any) -> None:
    options: dict[str, Any] = {"stages": 4, "accumulation": 6, "slack": slack, "policy": policy, "eval_every": 3}
    whole, split = (train_local(Run(schedule=name, **options)) for name in ("paci", "paci-split"))
    same(split["params"], whole["params"])
    assert split["losses"] == whole["losses"]
    for key in ("drift", "delay", "peak_in_flight"):
        assert split["stats"][key] == whole["stats"][key]
    assert set(split["stats"]["peak_pending"].values()) == {1} and set(whole["stats"]["peak_pending"].values()) == {0}


@pytest.mark.parametrize("schedule", FAMILIES)
def test_bounded_mailboxes_run_what_the_validator_has_proved(schedule: str) -> None:
    """With the fewest messages a channel for which the validator finds an end, the executor finds it too."""
    chunks = FAMILIES[schedule].chunks
    run = Run(schedule=schedule, stages=4, accumulation=4, chunks=chunks, windows=3)
    lowering = Lowering(family=FAMILIES[schedule], shape=run.shape)
    enough = next(room for room in range(1, 9) if _runs(lowering, room))
    unbounded = train_local(run)
    bounded = train_local(run, transport=LocalTransport(capacity=enough))
    same(bounded["params"], unbounded["params"])
    if enough > 1:
        with pytest.raises(ScheduleError, match=f"deadlocks with channels of {enough - 1} message"):
            train_local(run, transport=LocalTransport(capacity=enough - 1))


def _runs(lowering: Lowering, capacity: int) -> bool:
    try:
        validate(lowering, capacity=capacity)
    except ScheduleError:
        return False
    return True


def build(schedule: str, modules: int = 4, **options: Any) -> paci_rt.LocalPipeline:
    def linear(at: int) -> nn.Module:
        return nn.Linear(16, CLASSES if at == modules - 1 else 16)

    defaults: dict[str, Any] = {"n_microbatches": 4, "loss_fn": loss_fn}
    defaults["optimizer"] = lambda params: torch.optim.SGD([param for _, param in params], lr=0.1)
    stages = [linear(at) for at in range(modules)]
    return paci_rt.LocalPipeline(stages, schedule=schedule, **(defaults | options))


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("interleaved-1f1b", {"chunks": 2, "n_microbatches": 3}, r"accumulation is 3: .*multiple of 2"),
        ("interleaved-1f1b", {"chunks": 3}, r"num_stages is 4 and chunks 3"),
        (
            "interleaved-zb",
            {"chunks": 2, "n_microbatches": 5},
            r"accumulation is 5: .*multiple of 2, for example 4 or 6",
        ),
        ("looped-bfs", {"policy": "stash"}, r"'stash' under looped-bfs"),
        ("1f1b", {"chunks": 2}, r"chunks is 2: 1f1b takes no chunks"),
        ("pipedream-2bw", {"n_microbatches": 2}, r"accumulation is 2: .*at least 3"),
        ("zb-h1", {"slack": 1}, r"slack is 1: zb-h1"),
        ("zb-h1", {"slack": (1, 0, 0, 0)}, r"slack is 1,0,0,0: zb-h1 takes no slack"),
        ("paci", {"slack": (2, 1, 0)}, r"slack is 2,1,0, which is for 3 stages, and there are 4"),
        ("paci", {"slack": (0, 2, 1, 0)}, r"slack is 0,2,1,0: stage 1 would .* wait for ever; give stage 0 at least 1"),
        ("paci", {"slack": (2, 1, 1, 1)}, r"slack is 2,1,1,1: .*so end with 0"),
        ("paci", {"slack": (2, -3, 0, 0)}, r"slack is 2,-3,0,0: stage 1 runs 2 forwards ahead .* at least -2"),
        ("paci", {"slack": "auto"}, r"slack is 'auto': give an integer of at least 0, or one for each stage"),
        ("pipedream-2bw", {"slack": (2, 1, 0, 0)}, r"accumulation is 4: .*at least 5"),
        ("zb-h1", {"policy": "stash"}, r"'stash' under zb-h1"),
        ("zb-h3", {}, r"unknown schedule 'zb-h3': did you mean 'zb-h"),
        ("paci", {"policy": "bound"}, r"unknown policy 'bound': did you mean 'bounded'"),
    ],
)
def test_bad_combinations_end_in_one_clear_line(schedule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(schedule, **options)
    assert "\n" not in str(caught.value)


def test_a_process_with_the_wrong_stages_is_told_which_are_its() -> None:
    stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, 4) for at in (0, 1)]
    with pytest.raises(ValueError, match=r"stages \[0, 1\] of 4: .*in a circle, rank 0 of 2 runs \[0, 2\]"):
        paci_rt.ScheduleInterleaved1F1B(stages, 4, loss_fn, transport=LocalTransport())
    stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, 4) for at in (0, 2)]
    with pytest.raises(ValueError, match=r"stages \[0, 2\] of 4: with 2 a rank in a v, rank 0 of 2 runs \[0, 3\]"):
        paci_rt.ScheduleZBVZeroBubble(stages, 4, loss_fn, transport=LocalTransport())
    with pytest.raises(ValueError, match=r"chunks is 1: zb-v has two stages a rank"):
        paci_rt.ScheduleZBVZeroBubble(stages[:1], 4, loss_fn, transport=LocalTransport())
