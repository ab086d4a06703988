"""The convergence benchmark around the runs: what is asked for, what tables say, what falls short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import convergence
from paci_rt.simulate import Costs
from staleness import report
from staleness.case import Case
from staleness.catalogue import STUDIES
from staleness.report import Asked, tabulate
from staleness.run import Run
from staleness.seconds import time_rows
from staleness.store import Store
from staleness.studies import PILOT_SEED, Study

STUDY = Study(
    name="toy",
    question="Does it?",
    task="gpt-nano",
    cells=(("flush", (8,)), ("paci", (8,)), ("look-ahead", (8,))),
    rates=(1e-3, 2e-3),
    seeds=(0, 1),
    updates=100,
    warmup=5,
)
SLOWNESS = {"flush": 1.0, "paci": 2.0, "look-ahead": 1.1}  # updates that a method needs over flush's


def finished(case: Case) -> Run:
    """A run whose loss falls from 5, by 0.03 an update of flush's; a tenth slower at 1e-3, but for the pilot."""
    pace = 0.03 / SLOWNESS[case.method] * (1.0 if case.lr == 2e-3 or case.seed == PILOT_SEED else 0.9)
    curve = tuple((update, 5.0 - pace * update) for update in range(0, 101, 5))
    return Run(case=case, curve=curve, diverged=False, max_drift=1, lookahead_share=0.02, seconds=1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    kept = Store(tmp_path / "runs.jsonl")
    for case in [*map(STUDY.pilot, STUDY.baselines), *STUDY.search()]:
        kept.add(finished(case))
    for case in STUDY.repeats(kept):
        kept.add(finished(case))
    return kept


def test_rows_are_at_their_best_rates_and_count_tokens(store: Store) -> None:
    table = tabulate(STUDY, store)
    assert table.complete
    assert [row.rate for row in table.rows] == [2e-3] * 3
    assert table.thresholds == {"flush": (4.25, 3.5, 2.6)}  # after 25, 50 and 80 updates of the pilot
    paci, ahead = table.row("paci"), table.row("look-ahead", 8)
    assert paci is not None and ahead is not None and table.row("look-ahead", 4) is None
    assert [overhead.mean for overhead in ahead.overheads] == pytest.approx([1.1] * 3)
    assert [overhead.mean for overhead in paci.overheads[:2]] == pytest.approx([2.0] * 2)
    assert paci.overheads[2].short == (0, 1)  # its 100 updates are 1.25 times the 80 that flush needs: at least that
    assert paci.overheads[2].mean == pytest.approx(1.25)
    assert "> 1.25" in report.markdown([table])


def test_a_study_that_is_not_done_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    assert not tabulate(STUDY, store).rows
    for case in [*map(STUDY.pilot, STUDY.baselines), *STUDY.search()[:4]]:
        store.add(finished(case))
    table = tabulate(STUDY, store)
    assert not table.complete
    assert "NOT COMPLETE" in report.describe(table)[0]


def test_what_falls_short_is_named(store: Store) -> None:
    table = tabulate(STUDY, store)
    assert Asked(study="toy", accumulation=8, most=1.11).missed(table) == []
    (early, *_) = Asked(study="toy", accumulation=8, most=1.05).missed(table)
    assert early == "toy, a=8, early loss 4.25: token overhead 1.100, asked 1.05"
    assert Asked(study="toy", accumulation=8, most_of_paci=0.2).missed(table) == [
        "toy, a=8, late loss 2.6: 0.40 of plain PACI's extra tokens (1.100 against 1.250), asked 0.20"
    ]
    assert Asked(study="toy", accumulation=16, most=2).missed(table) == ["toy, a=16: not run"]
    assert {asked.study for asked in report.ASKED} <= STUDIES.keys()


def test_time_is_tokens_over_throughput(store: Store) -> None:
    table = tabulate(STUDY, store)
    rows = time_rows(table, Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,)), 8)
    (row,) = (row for row in rows if (row.method, row.over) == ("look-ahead", "1f1b"))
    assert not row.short
    # 15 / 8 is the bubble of 8 stages and 8 micro-batches; filling the pipeline once costs PACI a little of it.
    assert row.throughput == pytest.approx(15 / 8, rel=0.02)
    assert row.speedups[-1] == pytest.approx(15 / 8 / 1.1, rel=0.02)
    assert all(row.short for row in rows if row.method == "paci")


def test_pictures_are_drawn(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from staleness.pictures import draw

    written = draw(tmp_path / "out", [tabulate(STUDY, store)])
    assert [path.name for path in written] == ["loss-toy.png", "overhead-delay.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    table = tabulate(STUDY, store)
    many = replace(table, rows=table.rows * 9)  # more rows than there are kinds of lines
    assert draw(tmp_path / "many", [many])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--studies nope", "'nope' is unknown: choose from main"),
        ("--task gpt-nano --methods guess", "'guess' is unknown: choose from flush, paci"),
        ("--quick --studies main", "--quick is a study of its own"),
        ("--studies main --task gpt-nano", "leave --studies out"),
        ("--device cuda", "trains on the CPU only"),
        ("--task gpt-nano --warmup -1", "--warmup is -1"),
    ],
)
def test_bad_options_end_in_one_line(argv: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        convergence.parse(argv.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_study_of_ones_own_brings_its_baseline() -> None:
    (study,) = convergence.chosen(
        convergence.parse(["--task", "gpt-nano", "--methods", "look-ahead,paci nadam", "--accumulation", "4,8"])
    )
    assert study.cells == (
        ("flush", (4,)),
        ("flush nadam", (4,)),
        ("look-ahead", (4, 8)),
        ("paci nadam", (4, 8)),
    )
    assert "quick" not in [study.name for study in convergence.chosen(convergence.parse(["--studies", "all"]))]
