"""The tables of what PACI costs in tokens: rows of one length, rows of a protocol, theory, and their page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import iso_loss
import token_overhead
from paci_rt.planner import OverheadRow, OverheadTable
from paci_rt.planner.token_overhead import packaged
from staleness.case import Case
from staleness.iso_rows import partial_row
from staleness.one_length import one_lengths
from staleness.run import Run
from staleness.store import Store

SLOPE = 0.5


def run_of(method: str, seed: int, updates: int, behind: float = 0.0, **case: Any) -> str:
    values = {"task": "gpt-nano", "stages": 8, "accumulation": 8, "lr": 0.001, "warmup": 20, **case}
    loss = 5 + 0.1 * seed - SLOPE * math.log(updates) + behind
    made = Run(
        case=Case(method=method, seed=seed, updates=updates, **values),
        curve=((0, 5.5), (updates, loss)),
        diverged=False,
        max_drift=0,
        lookahead_share=0.0,
        seconds=1.0,
    )
    return json.dumps(made.to_json()) + "\n"


@pytest.mark.parametrize("f", [0.95, 1.0, 1.1])
def test_runs_of_one_length_give_the_factor_behind_them(tmp_path: Path, f: float) -> None:
    lines = [run_of("flush", seed, updates) for seed in (0, 1, 2) for updates in (120, 200)]
    for seed, noise in ((0, 0.01), (1, -0.01), (2, 0.0)):
        lines.append(run_of("look-ahead", seed, 200, SLOPE * math.log(f) + noise))
    lines += [run_of("paci", seed, 200, 0.3) for seed in (0, 1)]  # two seeds are no row
    lines += [run_of("look-ahead", seed, 200, 9.0, width=32) for seed in (0, 1, 2)]  # of another model
    (tmp_path / "iso_loss_runs.jsonl").write_text("".join(lines))
    (found,) = one_lengths(tmp_path)
    assert (found.method, found.seeds, found.accumulation) == ("look-ahead", 3, 8)
    assert found.f() == pytest.approx(f, rel=1e-6)
    assert found.f(found.behind_low) < f < found.f(found.behind_high)


def test_rows_of_the_protocol_stand_in_place_of_others_at_their_share() -> None:
    old = OverheadRow(optimizer="adamw", lookahead=True, delay=1, share=0.4375, f=1.2, model="m", source="earlier")
    other = replace(old, share=0.5)
    new = replace(old, f=1.01, source="benchmarks/results/iso_loss.json")
    short = replace(old, f=1.1, source=token_overhead.ONE_LENGTH, model="n")
    table = OverheadTable(rows=(old, other))
    once = token_overhead.updated(table, [new], [short])
    assert once.rows == (new, short, other)
    assert token_overhead.updated(once, [new], [short]) == once


def test_the_packaged_table_is_what_the_committed_runs_give() -> None:
    rows = token_overhead.one_length_rows(token_overhead.RESULTS)
    kept = [row for row in packaged().rows if row.source == token_overhead.ONE_LENGTH]
    known = {(row.kind, row.share, row.at, row.model) for row in packaged().rows if row not in kept}
    assert kept == [row for row in rows if (row.kind, row.share, row.at, row.model) not in known]


def test_theory_is_one_without_delay_and_grows_with_it() -> None:
    step = token_overhead.fitted_step(1.7)
    assert token_overhead.predicted(8, 8, "none", step) == pytest.approx(1.7, rel=1e-3)
    assert token_overhead.predicted(1, 8, "none", step) == 1
    plain = [token_overhead.predicted(8, a, "none", step) for a in (32, 16, 8)]
    assert 1 < plain[0] < plain[1] < plain[2]
    assert token_overhead.predicted(8, 8, "look-ahead", step) < 1.02


def test_a_table_goes_between_its_marks_and_again() -> None:
    page = "a\n<!-- table: x -->\n<!-- end -->\nb\n"
    once = token_overhead.filled(page, "x", ("h", "i"), [(1, 2)])
    assert once == "a\n<!-- table: x -->\n\n| h | i |\n|---|---|\n| 1 | 2 |\n\n<!-- end -->\nb\n"
    assert token_overhead.filled(once, "x", ("h", "i"), [(1, 2)]) == once
    with pytest.raises(ValueError, match="no marks for the table 'y'"):
        token_overhead.filled(page, "y", ("h",), [])


@pytest.mark.parametrize(("accumulation", "flush"), [(4, 4 / 11), (8, 8 / 15), (16, 16 / 23)])
def test_throughput_of_equal_stages_is_as_known(accumulation: int, flush: float) -> None:
    assert token_overhead.throughput("1f1b", 8, accumulation) == pytest.approx(flush, rel=1e-6)
    assert token_overhead.throughput("paci", 8, accumulation) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("f", [0.9, 1.05, 1.2])
def test_a_plan_that_is_not_complete_gives_rows_of_the_seeds_that_are_there(tmp_path: Path, f: float) -> None:
    plan = iso_loss.Plan(
        stages=8,
        accumulation=(8,),
        methods=("look-ahead",),
        optimizer="adamw",
        updates=200,
        warmup=20,
        rates=(1e-3,),
        seeds=(1, 2, 3, 4, 5),
        pilot_seeds=(9,),
    )
    behind, lines = SLOPE * math.log(f), []
    for seed in (1, 2, 3, 4):
        lines += [run_of("flush", seed, 200), run_of("flush", seed, 250, warmup=25)]
        lines += [run_of("look-ahead", seed, 200, behind)]
        lines += [run_of("look-ahead", seed, 250, behind, warmup=25)] if seed < 4 else []
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(lines))
    row = partial_row(plan, Store(path), "look-ahead", 8, 1e-3, 1e-3)
    assert row is not None and row["seeds"] == 3 and row["partial"]
    assert row["f"] == pytest.approx(f)
    path.write_text("".join(lines[:8]))
    assert partial_row(plan, Store(path), "look-ahead", 8, 1e-3, 1e-3) is None
