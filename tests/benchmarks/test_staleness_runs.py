"""From cases to tables: what a run computes, how runs are kept, and what is made of their curves."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from paci_rt.simulate import Costs
from staleness import run as running
from staleness.case import METHODS, Case, Method
from staleness.overhead import best_rate, overheads, updates_to
from staleness.run import Run, make_optimizer, run, stage_rate
from staleness.seconds import Clock
from staleness.store import Store, complete
from staleness.studies import Study, baseline_of
from staleness.tasks import TASKS, TextTask, make_task

CASE = Case(task="toy", layers=2, stages=2, accumulation=4, method="flush", lr=3e-3, seed=0, updates=4, warmup=1)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks as small as they can be."""
    for name, full in (("toy", "gpt-nano"), ("masked toy", "encoder-nano")):
        task = TASKS[full]
        assert isinstance(task, TextTask)
        monkeypatch.setitem(TASKS, name, replace(task, name=name, batch_size=8, units_per_update=128, seq_len=16))


def made_up(curve: list[tuple[int, float]], *, diverged: bool = False, **changes: Any) -> Run:
    case = replace(CASE, **{"updates": 100, **changes})
    return Run(case=case, curve=tuple(curve), diverged=diverged, max_drift=0, lookahead_share=0.0, seconds=1.0)


# ---------------------------------------------------------------------------------------------------------- cases


def test_keys_differ_whenever_anything_does() -> None:
    others = {
        "task": "gpt-nano",
        "layers": None,
        "stages": 1,
        "accumulation": 8,
        "method": "paci",
        "lr": 3.1e-3,
        "seed": 1,
        "updates": 5,
        "warmup": 2,
        "shape": "constant",
        "dtype": "bf16",
        "device": "cuda",
        "width": 32,
        "batch_size": 8,
        "beta2": 0.999,
        "clip": 1.0,
        "corpus": "book.txt 0123",
    }
    assert others.keys() == {field.name for field in fields(Case)}
    cases = [CASE, *(replace(CASE, **{name: value}) for name, value in others.items())]
    assert len({case.key for case in cases}) == len(cases)
    assert replace(CASE).key == CASE.key
    # Learning rates that differ by rounding alone are the same run.
    assert replace(CASE, lr=0.1 * 3).key == replace(CASE, lr=0.3).key
    same_group = {name for name, value in others.items() if replace(CASE, **{name: value}).group == CASE.group}
    assert same_group == {"lr", "seed"}


def test_wrong_cases_are_told() -> None:
    with pytest.raises(ValueError, match="unknown method 'sideways'"):
        replace(CASE, method="sideways")
    with pytest.raises(ValueError, match="unknown learning-rate shape"):
        replace(CASE, shape="square")


def test_learning_rates_over_time() -> None:
    cosine = replace(CASE, updates=110, warmup=10)
    assert [cosine.rate(update) for update in (0, 9)] == pytest.approx([1 / 11, 10 / 11])
    assert cosine.rate(10) == 1.0 and cosine.rate(60) == pytest.approx(0.55) and cosine.rate(110) == pytest.approx(0.1)
    assert {replace(cosine, shape="constant").rate(update) for update in (10, 60, 200)} == {1.0}
    drops = replace(cosine, shape="drops")
    assert [drops.rate(update) for update in (59, 60, 84, 85, 110)] == [1.0, 0.1, 0.1, 0.01, 0.01]


def test_rates_of_stages() -> None:
    case = replace(CASE, stages=4, accumulation=2, updates=40, warmup=4)
    flat = replace(case, shape="constant")
    assert stage_rate(case, METHODS["paci"], 0)(7) == case.rate(7)
    # Stage 0 is three behind: 7 micro-batches between a forward and the end of its backward, 3.5 updates.
    pipemare = [stage_rate(flat, METHODS["pipemare"], 0)(update) for update in (4, 5, 10, 39)]
    assert pipemare == pytest.approx([3.5 ** -(1 - update / 10) for update in (4, 5)] + [1.0, 1.0])
    assert stage_rate(flat, METHODS["pipemare"], 3)(4) == 1.0  # the last stage: half an update counts as one
    assert stage_rate(flat, METHODS["delay-scaled rate"], 1)(20) == pytest.approx(1 / (1 + 2 / 2))
    assert stage_rate(replace(case, updates=3), METHODS["pipemare"], 0)(0) > 0  # too short for a quarter
    with pytest.raises(ValueError, match="unknown rates"):
        stage_rate(case, Method(rates="sideways"), 0)


# ------------------------------------------------------------------------------------------------------ overheads


def test_updates_to_lies_on_straight_lines() -> None:
    curve = [(0, 5.0), (10, 3.0), (20, 3.5), (30, 1.5)]
    assert updates_to(curve, 4.0) == 5.0
    assert updates_to(curve, 3.0) == 10.0  # on a point
    assert updates_to(curve, 2.5) == 25.0  # what rises in between does not count
    assert updates_to(curve, 3.2) == 9.0  # the first time, not the last
    assert updates_to(curve, 5.0) == updates_to(curve, 9.0) == 0.0  # it starts there
    assert updates_to(curve, 1.4) is None and updates_to([], 3.0) is None
    assert updates_to([(0, 5.0), (10, math.nan)], 3.0) is None


def test_best_rate_goes_by_the_mean_over_common_seeds() -> None:
    def at(lr: float, seed: int, final: float, *, diverged: bool = False) -> Run:
        return made_up([(0, 5.0), (100, final)], diverged=diverged, lr=lr, seed=seed)

    runs = [at(1e-3, 0, 2.0), at(1e-3, 1, 2.2), at(3e-3, 0, 1.8), at(3e-3, 1, 2.6)]
    assert best_rate(runs) == 1e-3  # 2.1 against 2.2
    assert best_rate([runs[0], runs[2]]) == 3e-3
    assert best_rate([*runs, at(1e-3, 2, 9.0)]) == 1e-3  # no other rate has that seed
    assert best_rate([runs[0], at(3e-3, 0, 1.0, diverged=True)]) == 1e-3
    assert best_rate([runs[0], at(3e-3, 0, math.nan)]) == 1e-3
    assert best_rate([at(3e-3, 0, 2.0), at(1e-3, 0, 2.0)]) == 1e-3  # of equals the lowest
    with pytest.raises(ValueError, match="no runs"):
        best_rate([])
    with pytest.raises(ValueError, match="no seed was run at all"):
        best_rate([runs[0], runs[3]])


def test_overheads_are_ratios_seed_by_seed() -> None:
    baseline = [made_up([(0, 5.0), (100, 1.0)], seed=seed) for seed in (0, 1, 2)]
    method = [
        made_up([(0, 5.0), (50, 3.0), (100, 2.0)], seed=0),
        made_up([(0, 5.0), (100, 1.0)], seed=1),
        made_up([(0, 5.0), (100, 1.0)], seed=7),  # of no use: the baseline lacks it
    ]
    early, late = overheads(method, baseline, [3.0, 1.5])
    assert early.ratios == {0: 1.0, 1: 1.0} and early.short == () and early.mean == 1.0
    assert early.text == "1.00 (1.00-1.00)"
    # Seed 0 never comes down to 1.5: its 100 updates over the baseline's 87.5 are a lower bound.
    assert late.ratios == pytest.approx({0: 100 / 87.5, 1: 1.0}) and late.short == (0,)
    assert late.text == "> 1.07 (1.00-1.14)"
    (single,) = overheads(method[:1], baseline, [2.5])
    assert single.ratios == pytest.approx({0: 75 / 62.5}) and single.text == "1.20"


def test_a_diverged_run_falls_short() -> None:
    baseline = [made_up([(0, 5.0), (100, 1.0)])]
    (found,) = overheads([made_up([(0, 5.0), (10, math.nan)], diverged=True)], baseline, [3.0])
    assert found.short == (0,) and found.ratios == {0: 2.0}  # all the updates that it was given, not those it made


def test_overheads_without_a_basis_are_told() -> None:
    runs = [made_up([(0, 5.0), (100, 1.0)])]
    with pytest.raises(ValueError, match="no seed in common"):
        overheads(runs, [made_up([(0, 5.0), (100, 1.0)], seed=1)], [3.0])
    for threshold in (0.5, 5.0):
        (found,) = overheads(runs, runs, [threshold])
        assert (dict(found.ratios), found.text) == ({}, "-")
        assert math.isnan(found.mean)


# ---------------------------------------------------------------------------------------------------------- store


def test_runs_survive_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "runs.jsonl"
    store, runs = Store(path), [made_up([(0, 5.0), (100, 1.5)], seed=seed) for seed in (0, 1)]
    for result in runs:
        store.add(result)
    again = Store(path)
    assert list(again.runs.values()) == runs == again.of([runs[0].case, replace(CASE, seed=9), runs[1].case])
    new = replace(CASE, seed=9)
    assert again.missing([new, runs[0].case, new]) == [new]
    again.add(made_up([(0, 5.0), (10, math.nan)], diverged=True, seed=2))
    (lost,) = (result for result in Store(path).runs.values() if result.diverged)
    assert math.isnan(lost.curve[-1][1])
    assert complete(again, [runs[0].case], jobs=1)  # nothing to run, nothing started


def test_a_line_that_was_cut_off_is_told_and_its_run_is_missing_without_it(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    store, runs = Store(path), [made_up([(0, 5.0), (100, 1.5)], seed=seed) for seed in (0, 1)]
    for result in runs:
        store.add(result)
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(ValueError, match=r"runs.jsonl, line 2 is not a run .*delete the line"):
        Store(path)
    path.write_text(whole.splitlines()[0])  # deleted, and the newline before it, as some editors do
    resumed = Store(path)
    assert resumed.missing([result.case for result in runs]) == [runs[1].case]
    resumed.add(runs[1])
    assert path.read_text() == whole


@pytest.mark.parametrize("line", ["[]", "{}", "3", "", json.dumps({"key": "a", "case": {}, "curve": []})])
def test_bad_lines_are_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match="line 1 is not a run"):
        Store(path)


def test_a_study_repeats_its_best_rates_with_the_other_seeds() -> None:
    study = Study(
        name="toy",
        question="?",
        task="gpt-nano",
        cells=(("flush", (8,)), ("flush lion", (4, 8))),
        rates=(1e-3, 3e-3),
        updates=100,
        warmup=5,
    )
    cases = study.search()
    assert [case.lr for case in cases] == pytest.approx([1e-3, 3e-3, 2e-4, 6e-4, 2e-4, 6e-4])
    store = Store(Path("nowhere.jsonl"))
    for case in cases[:-1]:  # the last row's search is not done
        store.runs[case.key] = replace(made_up([(0, 5.0), (100, 1.0 + case.lr)]), case=case)
    repeats = study.repeats(store)
    assert [(case.method, case.seed) for case in repeats] == [(m, s) for s in (1, 2) for m in ("flush", "flush lion")]
    assert {case.lr for case in repeats} == {cases[0].lr, cases[2].lr}
    assert [baseline_of(m) for m in ("paci", "paci lion", "error feedback muon", "async nadam")] == [
        "flush",
        "flush lion",
        "flush muon",
        "flush",
    ]


# ----------------------------------------------------------------------------------------------------------- runs


def plain_training(case: Case) -> list[float]:
    """Held-back loss after every update of a loop without a pipeline: one module, torch's AdamW."""
    task = make_task(case.task, layers=case.layers)
    (module,) = task.build(1, case.seed)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": running.WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=case.lr,
        betas=(0.9, running.BETA2),
    )
    held_x, held_y = task.held_back()
    losses = []
    for update in range(case.updates):
        for group in optimizer.param_groups:
            group["lr"] = case.lr * case.rate(update)
        optimizer.zero_grad()
        x, y = task.batch(update, case.seed)
        for part, target in zip(x.chunk(case.accumulation), y.chunk(case.accumulation), strict=True):
            (task.loss(module(part), target) / case.accumulation).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(float(task.loss(module(held_x), held_y)))
    return losses


@pytest.mark.parametrize("task", ["toy", "masked toy"])
def test_a_flush_run_is_plain_training(task: str) -> None:
    case = replace(CASE, task=task)
    result = run(case)
    assert [update for update, _ in result.curve] == [0, 1, 2, 3, 4]
    assert not result.diverged and result.max_drift == 0
    # The same sums, scaled at another place: gradients differ by some 1e-7 of their size. Adam's steps magnify that
    # only where a gradient is as small as its rounding, and there the loss does not care. What is left is the rounding
    # of losses of about 5, some 1e-6; a wrong rate, decay or batch shows in the second digit.
    assert [loss for _, loss in result.curve[1:]] == pytest.approx(plain_training(case), abs=2e-5)


def test_the_curve_is_that_of_drained_models() -> None:
    """What is measured on the way is the very model that a drain would leave, and measuring disturbs nothing."""
    long = replace(CASE, method="look-ahead", stages=2, accumulation=1, shape="constant", updates=5)
    points = []
    result = run(long, on_point=lambda update, loss: points.append((update, loss)))
    assert tuple(points) == result.curve and result.max_drift == 1 and result.lookahead_share > 0
    for updates in (2, 4):
        assert run(replace(long, updates=updates)).curve[-1] == result.curve[updates]


def test_flushed_first_updates_are_those_of_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "flush 2, then paci", Method(flush_updates=2))
    case = replace(CASE, accumulation=1)
    curves = {method: run(replace(case, method=method)).curve for method in ("flush", "paci", "flush 2, then paci")}
    assert curves["flush 2, then paci"][:3] == curves["flush"][:3] != curves["paci"][:3]
    assert curves["flush 2, then paci"][4] not in (curves["flush"][4], curves["paci"][4])


def test_a_run_that_diverges_ends_early() -> None:
    result = run(replace(CASE, method="flush sgd", lr=1e6, updates=30, warmup=0))
    assert result.diverged and result.curve[-1][0] < 30
    assert Run.from_json(json.loads(json.dumps(result.to_json()))).case == result.case


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "POINTS", 1)
    method = METHODS[name]
    result = run(replace(CASE, method=name, updates=2, lr=1e-3))
    assert not result.diverged and result.curve[-1][0] == 2
    consistent = method.flushes or method.flush_updates > 2 or method.policy == "stash"
    assert result.max_drift == (0 if consistent or method.schedule == "pipedream-2bw" else 1)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "lion", "nadam", "rotated-adamw"])
def test_weight_decay_is_on_matrices_alone(name: str) -> None:
    task = make_task("gpt-nano", layers=1)
    named = list(task.build(1, 0)[0].named_parameters())
    optimizer = make_optimizer(task, Method(optimizer=name), 1e-3, named)
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    assert len(groups) == len(named)
    for key, param in named:
        decay = running.SGD_WEIGHT_DECAY if name == "sgd" else running.WEIGHT_DECAY
        decay = decay if param.dim() >= 2 else 0.0
        assert groups[id(param)]["weight_decay"] == decay, key
        if name == "muon":
            assert groups[id(param)]["use_muon"] == (key.startswith("transformer.h.") and param.dim() == 2)


# ---------------------------------------------------------------------------------------------------------- clock


def test_a_flush_takes_its_bubble_longer() -> None:
    stages, a = 4, 6
    costs = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    clock = Clock(costs=costs, stages=stages, accumulation=a, updates=12)
    flush = [clock.seconds("1f1b", update) for update in range(13)]
    paci = [clock.seconds("paci", update) for update in range(13)]
    assert flush[0] == paci[0] == 0.0
    # A flush of a micro-batches passes through P stages, one after another: a + P - 1 times F and B, each update.
    assert flush[1:] == pytest.approx([3 * (a + stages - 1) * update for update in range(1, 13)])
    # PACI fills its pipeline once; from then on a stage works all the time.
    steady = [late - early for early, late in pairwise(paci[4:9])]
    assert steady == pytest.approx([3 * a] * 4)
    assert (flush[6] - flush[5]) / steady[0] == pytest.approx((a + stages - 1) / a)
    assert clock.seconds("paci", 6.25) == pytest.approx(0.75 * paci[6] + 0.25 * paci[7])
    assert clock.seconds("paci", 12) == paci[12]


def test_the_clock_knows_what_a_method_costs() -> None:
    costs = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,), predict_s=(0.5,))
    clock = Clock(costs=costs, stages=3, accumulation=4, updates=40)
    steady = [
        (clock.seconds("paci", 36, lookahead=ahead) - clock.seconds("paci", 32, lookahead=ahead)) / 4
        for ahead in (False, True)
    ]
    # Two of the first stage's four forwards run early and pay for it; nobody overtakes the first stage.
    assert steady == pytest.approx([12.0, 13.0])
