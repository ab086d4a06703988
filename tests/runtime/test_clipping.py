"""Clipping by the norm of all stages: exact under a flush, by norms that are known or foretold without one."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.optim.verdict import Sealed
from paci_rt.runtime.flush_norms import EPS, coefficient, in_fp32
from paci_rt.schedules import FAMILIES, Shape
from paci_rt.schedules.lowering import Lowering, TiedWeight
from paci_rt.schedules.validate import validate
from support.bad_numbers import CHUNKED, FLUSHES, Bad, drive, local, on_rank, plain
from support.plain import same
from support.pool import WorkerPool
from support.tied import Embedding, Head

CLIPS = (0.05, 1.0, 3.0, 1e4)


@pytest.mark.parametrize(
    ("schedule", "a"),  # means of 3 and 6 are no division by a power of two; interleaved takes multiples of the ranks
    [(name, a) for name in sorted(FLUSHES) for a in (1, 2, 3, 4, 6) if name != "interleaved-1f1b" or a % 2 == 0],
)
@pytest.mark.parametrize("optimizer", ["torch-adamw", "torch-sgd"])
def test_a_flush_clips_to_the_bits_of_torch_on_the_uncut_model(schedule: str, a: int, optimizer: str) -> None:
    for clip in CLIPS:
        run = Bad(schedule=schedule, stages=4, accumulation=a, clip=clip, on_nonfinite=None, optimizer=optimizer)
        found = drive(local(run), run)
        same(found["params"], plain(run, skip=None))
        clipped = set(found["stats"]["clipped_windows"].values())
        assert clipped == {run.windows} if clip == CLIPS[0] else clipped != {run.windows}


@pytest.mark.parametrize(
    ("schedule", "a"), [*((name, a) for name in ("1f1b", "gpipe", "paci") for a in (1, 3, 4)), ("async-1f1b", 1)]
)
def test_one_stage_knows_the_whole_norm_under_every_schedule(schedule: str, a: int) -> None:
    run = Bad(schedule=schedule, stages=1, accumulation=a, clip=0.5, on_nonfinite=None, optimizer="torch-adamw")
    same(drive(local(run), run)["params"], plain(run, skip=None))


def test_the_fused_step_clips_as_torch_does_before_it() -> None:
    """The same gradients into the same optimizer, clipped by torch in ``.grad`` or by the schedule in its sums."""
    run = Bad(schedule="1f1b", clip=0.2, on_nonfinite=None, optimizer="adamw")
    found = drive(local(run), run)["params"]
    expected = plain(Bad(**{**vars(run), "optimizer": "torch-adamw"}), skip=None)
    for name, tensor in found.items():
        # paci_rt.AdamW differs from torch's by a few units in the last place a step
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 6 * 2.0**-22, name


@pytest.mark.parametrize("schedule", [*sorted(FLUSHES)[:3], "zb-2p"])
def test_frozen_parameters_and_those_without_a_gradient_are_not_counted(schedule: str) -> None:
    def pieces() -> list[nn.Module]:
        torch.manual_seed(4)
        first, second = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        first[0].weight.requires_grad_(False)
        second.register_parameter("unused", nn.Parameter(torch.full((5,), 9.0)))
        return [first, second]

    x, y = torch.randn(8, 6), torch.randn(8, 3) * 9
    reference = pieces()
    model = nn.Sequential(*reference)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for part, target in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
        (nn.functional.mse_loss(model(part), target) / 4).backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.3)
    optimizer.step()
    ours = pieces()
    pipe = paci_rt.LocalPipeline(
        ours,
        schedule=schedule,
        n_microbatches=4,
        loss_fn=nn.MSELoss(),
        optimizer=lambda named: torch.optim.AdamW([p for _, p in named if p.requires_grad], lr=1e-2),
        max_grad_norm=0.3,
        chunks=2 if schedule in CHUNKED else 1,
    )
    pipe.step(x, target=y)
    for module, other in zip(ours, reference, strict=True):
        for param, expected in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(param, expected)


TIE = TiedWeight(owner_stage=0, owner="wte.weight", reader_stage=2, reader="head.weight")


def tied() -> list[nn.Module]:
    torch.manual_seed(8)
    first, middle, last = Embedding(), nn.Sequential(nn.Linear(6, 6), nn.GELU()), Head()
    last.head.weight.data.copy_(first.wte.weight.data)
    return [first, middle, last]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-1p"])
@pytest.mark.parametrize("clip", [0.01, 0.2])
def test_a_tied_weight_is_counted_once(schedule: str, clip: float) -> None:
    x, y = torch.randint(7, (8,)), torch.randint(7, (8,))
    pieces = tied()
    pieces[2].head.weight = pieces[0].wte.weight
    model = nn.Sequential(*pieces)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        for part, target in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            (nn.functional.cross_entropy(model(part), target) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    ours = tied()
    pipe = paci_rt.LocalPipeline(
        ours,
        schedule=schedule,
        n_microbatches=4,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.5),
        max_grad_norm=clip,
        tied_weights=[TIE],
    )
    for _ in range(2):
        pipe.step(x, target=y)
    pipe.drain()
    assert pipe.stats()["clipped_windows"] == {0: 2, 1: 2, 2: 2}
    theirs = dict(model.named_parameters())
    assert torch.equal(ours[0].wte.weight, ours[2].head.weight)
    # The tied gradient is a sum in another order: a few units in the last place.
    for at, module in enumerate(ours):
        for name, param in module.named_parameters():
            expected = theirs["0.wte.weight" if name == "head.weight" else f"{at}.{name}"]
            assert float(((param - expected).norm() / expected.norm()).detach()) < 2.0**-20, name


@pytest.mark.parametrize("how", ["skip-window", "skip-local", "raise"])
def test_tied_weights_and_a_reader_whose_gradient_is_not_finite(how: str) -> None:
    modules = tied()
    handle: list[Any] = []

    def spoil(grad: Tensor) -> Tensor:
        handle.append(grad)
        return grad * (float("inf") if len(handle) == 6 else 1.0)

    modules[2].head.weight.register_hook(spoil)
    pipe = paci_rt.LocalPipeline(
        modules,
        n_microbatches=4,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=lambda named: paci_rt.AdamW(named, lr=0.01),
        tied_weights=[TIE],
        on_nonfinite=how,
        lookahead=False,
    )
    x, y = torch.randint(7, (8,)), torch.randint(7, (8,))

    def go() -> None:
        for _ in range(4):
            pipe.step(x, target=y)
        pipe.drain()

    if how == "raise":
        with pytest.raises(paci_rt.NonFiniteError, match="stage 2, window 1"):
            go()
        return
    go()
    assert torch.equal(modules[0].wte.weight, modules[2].head.weight)
    assert all(bool(param.isfinite().all()) for module in modules for param in module.parameters())
    skipped = pipe.stats()["skipped_windows"]
    assert skipped == ({0: 1, 1: 1, 2: 1} if how == "skip-window" else {0: 1, 1: 0, 2: 1})


# --- without a flush ---


@pytest.mark.parametrize(("schedule", "lags"), [("paci", (0, 1)), ("paci-split", (1, 1)), ("async-1f1b", (0, 2))])
@pytest.mark.parametrize("stages", [2])
def test_a_stage_goes_by_its_own_norm_and_what_it_foretells_of_the_others(
    monkeypatch: pytest.MonkeyPatch, schedule: str, lags: tuple[int, int], stages: int
) -> None:
    """Two stages: what was clipped is computed again from the norms of all windows and the lag of each edge."""
    run = Bad(schedule=schedule, stages=stages, windows=8, clip=0.7, on_nonfinite=None)
    norms: dict[int, list[float]] = {}
    factors: dict[int, list[float]] = {}
    real = StageOptimizer.update
    order: list[int] = []

    def update(self: StageOptimizer, divisor: int, prepare: Any, *, decide: Any) -> Any:
        if id(self) not in order:
            order.append(id(self))
        at = order.index(id(self))

        def watching(sealed: Sealed) -> Any:
            verdict = decide(sealed)
            norms.setdefault(at, []).append(float(sealed.squares) / divisor**2)
            factors.setdefault(at, []).append(divisor / verdict.divisor)
            return verdict

        return real(self, divisor, prepare, decide=watching)

    monkeypatch.setattr(StageOptimizer, "update", update)
    pipe = local(run)
    stats = drive(pipe, run)["stats"]
    divisor = pipe.asked_for.divisor
    last, first = 0, 1  # the last stage updates first
    count = len(norms[last])
    assert len(norms[first]) == count
    for at, other, lag in ((first, last, lags[0]), (last, first, lags[1])):
        for window in range(count):
            likely = norms[other][window] if lag == 0 else 0.0
            if lag and window >= lag:
                ratios = [math.log(theirs / own) for theirs, own in zip(norms[other], norms[at], strict=True)]
                mean = functools.reduce(lambda mean, ratio: 0.7 * mean + (1 - 0.7) * ratio, ratios[: window + 1 - lag])
                likely = norms[at][window] * math.exp(mean)
            total = (norms[at][window] + likely) ** 0.5
            expected = divisor / (divisor / min(1.0, 0.7 / (total + 1e-6)))
            assert factors[at][window] == expected, (at, window)
        stage = stages - 1 if at == last else 0
        lagging = {lag: count - lag} if lag == 0 else {-1: lag, lag: count - lag}
        assert stats["norm_lags"][stage] == lagging


@pytest.mark.parametrize(
    "run",
    [
        Bad(clip=0.5, on_nonfinite=None, stages=4),
        Bad(clip=0.5, on_nonfinite=None, lookahead=True, transport="gloo"),
        Bad(schedule="paci-split", clip=0.5, on_nonfinite=None, optimizer="sgd"),
        Bad(schedule="async-1f1b", clip=0.3, on_nonfinite=None, stages=4),
        Bad(schedule="pipedream", clip=0.3, on_nonfinite=None, transport="gloo"),
        Bad(schedule="pipedream-2bw", clip=0.3, on_nonfinite=None, optimizer="torch-adamw"),
        Bad(schedule="1f1b", clip=0.3, on_nonfinite=None, stages=4, transport="gloo"),
        Bad(schedule="1f1b", clip=0.3, on_nonfinite=None, accumulation=3, stages=3, dtype="bfloat16"),
        Bad(schedule="interleaved-1f1b", clip=0.3, on_nonfinite=None, stages=4, transport="gloo"),
        Bad(schedule="interleaved-zb", clip=0.3, on_nonfinite=None, stages=6),
        Bad(schedule="looped-bfs", clip=0.3, on_nonfinite=None, stages=4),
        Bad(schedule="zb-h2", clip=0.3, on_nonfinite=None),
    ],
    ids=lambda run: f"{run.schedule}-{run.stages}-{run.transport}-{run.optimizer}",
)
def test_between_processes_clipping_gives_the_bits_of_one_process(workers: WorkerPool, run: Bad) -> None:
    ranks = workers.run(on_rank, run.stages // (2 if run.schedule in CHUNKED else 1), run)
    here = drive(local(run), run)
    params: dict[str, Tensor] = {}
    for rank in ranks:
        params |= rank["params"]
        for key in ("clipped_windows", "norm_lags"):
            for stage, value in rank["stats"][key].items():
                assert value == here["stats"][key][stage], key
    same(params, here["params"])
    assert max(here["stats"]["clipped_windows"].values()) >= 3


@pytest.mark.parametrize(
    ("policy", "lookahead"),  # only current weights look ahead
    [
        *((policy, False) for policy in ("bounded", "stash", "2bw", "predict", "recompute")),
        ("bounded", True),
        ("recompute", True),
    ],
)
def test_clipping_works_under_every_policy(policy: str, lookahead: bool) -> None:
    run = Bad(stages=4, clip=0.3, on_nonfinite=None, lookahead=lookahead)
    found = drive(local(run, policy=policy), run)
    free = drive(local(Bad(**{**vars(run), "clip": None}), policy=policy), run)
    assert min(found["stats"]["clipped_windows"].values()) >= 3
    assert any(not torch.equal(found["params"][name], free["params"][name]) for name in free["params"])


def test_processes_that_clip_differently_are_refused(workers: WorkerPool) -> None:
    with pytest.raises(Exception, match=r"max_grad_norm is 1\.0 on rank 0 and 2\.0 on rank 1"):
        workers.run(partial(_clips, 1.0), 2, 2.0)


def _clips(first: float, rank: int, group: Any, second: float) -> None:
    on_rank(rank, group, Bad(stages=2, clip=first if rank == 0 else second, on_nonfinite=None))


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("is_tied", [False, True])
def test_streams_with_norms_run_to_their_end_in_channels_of_few_messages(name: str, is_tied: bool) -> None:
    family = FAMILIES[name]
    for ranks, a, chunks in [(1, 1, 1), (2, 2, 1), (3, 6, 1), (4, 8, 1), (5, 3, 1), (2, 4, 2), (3, 6, 3), (1, 2, 2)]:
        chunks = chunks if family.takes_chunks else family.chunks
        if ranks * chunks == 1 and is_tied:
            continue
        if family.takes_chunks:
            a *= ranks
        ties = (TiedWeight(owner_stage=0, owner="a", reader_stage=ranks * chunks - 1, reader="b"),) if is_tied else ()
        shape = Shape(num_stages=ranks * chunks, accumulation=a, chunks=chunks, placement=family.placement)
        room = {"interleaved-zb": ranks, "looped-bfs": a}.get(name, 1)
        validate(Lowering(family=family, shape=shape, ties=ties, settles=ranks * chunks > 1), capacity=room)


@pytest.mark.parametrize("max_norm", [0.0, 1e-9, 0.3, 1.0, 7e5, 1e39, math.inf])
def test_the_factor_has_the_bits_of_torchs_operations(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(3)
    totals = [
        10.0 ** (24 * torch.rand(2000, generator=generator) - 12),
        torch.tensor([0.0, 1e-45, 3e38, math.inf, math.nan]),
    ]
    for total in torch.cat(totals):
        expected = float((max_norm / (total + EPS)).clamp(max=1.0))
        assert str(coefficient(in_fp32(max_norm), total)) == str(expected)  # NaN too
