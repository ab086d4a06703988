"""The table of what late gradients cost in tokens: what it says, what it does not, and how it decides a plan."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paci_rt import schedules
from paci_rt.planner import OverheadRow, OverheadTable, load_overheads, parse_overheads, plan
from paci_rt.planner.evaluate import early_share
from paci_rt.planner.token_overhead import MOST_BYTES, packaged
from paci_rt.schedules import Shape, policies
from support.profiles import model

ROW = OverheadRow(optimizer="adamw", lookahead=True, delay=1, share=0.4, f=1.21, f_low=1.1, f_high=1.331)


def table(*rows: OverheadRow) -> OverheadTable:
    return OverheadTable(rows=rows)


def of(found: OverheadTable, share: float, **other: Any) -> Any:
    return found.of(**{"optimizer": "adamw", "policy": "bounded", "lookahead": True, "delay": 1, **other}, share=share)


@pytest.mark.parametrize(
    ("share", "f", "low", "high"),
    [
        (0.4, 1.21, 1.1, 1.331),
        (0.2, 1.1, 1.1**0.5, 1.331**0.5),
        (0.1, 1.21**0.25, 1.1**0.25, 1.331**0.25),
        (0.48, 1.21**1.2, 1.1**1.2, 1.331**1.2),
    ],
)
def test_a_share_is_read_on_a_straight_line_from_none_early(share: float, f: float, low: float, high: float) -> None:
    found = of(table(ROW), share)
    assert found.known
    assert (found.f, found.low, found.high) == pytest.approx((f, low, high))


@pytest.mark.parametrize(
    "other",
    [{"optimizer": "muon"}, {"policy": "recompute"}, {"lookahead": False}, {"delay": 2}, {"share": 0.51}],
)
def test_what_is_not_near_is_said_to_be_unknown(other: dict[str, Any]) -> None:
    found = of(table(ROW), **{"share": 0.4, **other})
    assert not found.known and found.f is None and found.factor == 1
    assert found.basis.startswith("nothing was measured")


def test_without_delay_nothing_is_paid_under_any_optimizer() -> None:
    for optimizer in ("adamw", "torch-sgd", "something else"):
        found = of(table(), 0.0, optimizer=optimizer, delay=0)
        assert found.known and (found.f, found.low, found.high) == (1, 1, 1)


def test_rows_of_one_share_count_alike_and_the_interval_holds_all() -> None:
    half = replace(ROW, at="half", f=1.0, f_low=0.98, f_high=1.02)
    found = of(table(ROW, half), 0.4)
    assert (found.f, found.low, found.high) == pytest.approx((1.1, 0.98, 1.331))
    assert of(table(ROW, replace(half, f_high=None)), 0.4).high is None
    late = replace(half, f=None, f_low=None, f_high=None, why="not there within 600 updates")
    lost = of(table(ROW, late), 0.4)
    assert lost.known and lost.f is None and "not there within 600 updates" in lost.basis
    gain = of(table(replace(ROW, f=0.9, f_low=0.8)), 0.4)
    assert gain.f == 0.9 and gain.factor == 1  # no delay is taken for a gain


def test_two_updates_late_are_read_between_rows_only() -> None:
    late = [replace(ROW, delay=2, share=share, f=f, f_low=f, f_high=f) for share, f in ((0.6, 1.2), (1.0, 1.6))]
    assert of(table(*late), 0.8, delay=2).f == pytest.approx(math.sqrt(1.2 * 1.6))
    assert of(table(*late), 1.05, delay=2).f == pytest.approx(1.6**1.05)
    assert not of(table(*late), 0.4, delay=2).known


def test_own_rows_stand_in_place_of_those_of_their_kind() -> None:
    own = replace(ROW, f=2.0, f_low=None, f_high=None, share=0.3)
    both = table(ROW, replace(ROW, delay=2, share=0.9)).overridden_by(table(own))
    assert of(both, 0.3).f == 2.0 and not of(both, 0.45).known
    assert of(both, 0.9, delay=2).f == 1.21


@pytest.mark.parametrize(
    ("slack", "accumulation", "share", "delay"),
    [(0, 8, 28 / 64, 1), (0, 4, 28 / 32, 2), ((1, 0, 0, 0, 0, 0, 0, 0), 8, 29 / 64, 1)],
)
def test_share_and_delay_of_a_line(slack: Any, accumulation: int, share: float, delay: int) -> None:
    family, shape = schedules.get("paci"), Shape(num_stages=8, accumulation=accumulation, slack=slack)
    assert early_share("bounded", family, shape) == pytest.approx(share)
    assert max(policies.bounds("bounded", family, shape, rank)[1] for rank in range(8)) == delay


def test_the_packaged_table_is_read_and_names_its_sources() -> None:
    found = packaged()
    assert found.source and found.rows and all(row.source for row in found.rows)
    assert parse_overheads(json.loads(json.dumps(found.to_json()))) == found
    ahead, bare = of(found, 28 / 64), of(found, 28 / 64, lookahead=False)
    assert ahead.f < 1.1 < bare.f


# --- decisions ---

ACCUMULATIONS = (4, 8, 16)


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_the_plan_is_the_one_that_is_soonest_at_a_loss(accumulation: int) -> None:
    found = plan(model(8), stages=8, accumulations=[accumulation], slack=0)
    rates = {}
    for one in found.candidates:
        if one.rejected is None:
            assert one.predicted.progress_per_s == one.predicted.micro_batches_per_s / one.predicted.overhead.factor
            rates[one] = one.predicted.progress_per_s
    assert rates[found.chosen] >= 0.99 * max(rates.values())


@pytest.mark.parametrize(("f", "chosen"), [(1.0, "paci"), (1.2, "paci"), (4.0, "zb-2p")])
def test_with_few_micro_batches_paci_and_zero_bubble_are_compared_by_time(f: float, chosen: str) -> None:
    own = table(replace(ROW, delay=2, share=28 / 32, f=f, f_low=f, f_high=f))
    options = {"stages": 8, "accumulations": [4], "schedules": ["paci", "zb-2p", "1f1b"], "policies": ["bounded"]}
    found = plan(model(8), **options, slack=0, overheads=own)
    assert found.chosen.schedule == chosen
    paci, flush = (
        next(one for one in found.candidates if one.schedule == name and one.rejected is None)
        for name in ("paci", "1f1b")
    )
    assert paci.predicted.overhead.f == f and flush.predicted.overhead.f == 1
    assert found.to_json()["predicted"]["overhead"]["f"] == (f if chosen == "paci" else 1)


@pytest.mark.parametrize("optimizer", ["lion", "muon", "sgd"])
def test_of_an_optimizer_without_rows_nothing_is_guessed(optimizer: str) -> None:
    options: dict[str, Any] = {"stages": 4, "accumulations": [4], "schedules": ["paci", "1f1b"], "slack": 0}
    own = table(ROW)
    known = {row.optimizer for row in packaged().rows}
    if optimizer in known:
        pytest.skip("it has rows")
    found = plan(model(8), **options, optimizer=optimizer, overheads=own)
    assert found.chosen.schedule == "1f1b"
    assert any(f"nothing was measured for {optimizer}" in (one.rejected or "") for one in found.candidates)
    asked = plan(model(8), **options, optimizer=optimizer, delay_limit=1).chosen
    assert asked.schedule == "paci" and not asked.predicted.overhead.known


def test_what_never_got_there_is_no_plan() -> None:
    own = table(replace(ROW, f=None, f_low=None, f_high=None, why="not there within 600 updates"))
    options: dict[str, Any] = {"stages": 4, "accumulations": [8], "schedules": ["paci", "1f1b"], "lookahead": True}
    for limit in ("measured", 1, None):
        found = plan(model(8), **options, slack=0, policies=["bounded"], overheads=own, delay_limit=limit)
        assert found.chosen.schedule == "1f1b"
        assert any("not there within 600 updates" in (one.rejected or "") for one in found.candidates)


# --- files ---

GOOD = table(ROW).to_json()


def changed(**row: Any) -> dict[str, Any]:
    return {**GOOD, "rows": [{**GOOD["rows"][0], **row}]}


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(GOOD))
    assert load_overheads(path).rows == (ROW,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\x00\x01", "is not JSON"),
        ("[]", "the file is []: give a JSON object"),
        ("{}", "format is missing"),
        (json.dumps({**GOOD, "format": "paci-rt profile"}), "format is 'paci-rt profile'"),
        (json.dumps({**GOOD, "version": 2}), "version is 2"),
        (json.dumps({**GOOD, "rows": []}), "rows is []"),
        (json.dumps({**GOOD, "rows": [3]}), "rows[0] is 3"),
        (json.dumps({**GOOD, "source": 3}), "source is 3"),
        (json.dumps(changed(f=-1)), "rows[0].f is -1"),
        (json.dumps(changed(f=float("nan"))), "rows[0].f is nan"),
        (json.dumps(changed(f="1")), "rows[0].f is '1'"),
        (json.dumps(changed(f_low=1.3)), "rows[0].f_low is 1.3, and f is 1.21"),
        (json.dumps(changed(f_high=1.0)), "rows[0].f_high is 1, and f is 1.21"),
        (json.dumps(changed(f=None)), "rows[0].f_low is 1.1, and f is null"),
        (json.dumps(changed(delay=0)), "rows[0].delay is 0"),
        (json.dumps(changed(delay=1.5)), "rows[0].delay is 1.5"),
        (json.dumps(changed(share=0)), "rows[0].share is 0"),
        (json.dumps(changed(share=1.5)), "rows[0].share is 1.5: a mean delay is at most delay, 1"),
        (json.dumps(changed(policy="magic")), "rows[0].policy is 'magic'"),
        (json.dumps(changed(lookahead="yes")), "rows[0].lookahead is 'yes'"),
        (json.dumps(changed(optimizer="")), "rows[0].optimizer is ''"),
        (json.dumps(changed(seeds=0)), "rows[0].seeds is 0"),
        (json.dumps(changed(rate="1e-3")), "rows[0].rate is '1e-3'"),
        (json.dumps(changed(weight=1)), "rows[0] has 'weight', which is unknown"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_overheads(path)
    assert said in str(error.value) and "bad.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\x00")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for path, said in (
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path, "no file"),
        (Path("/dev/zero"), "no file"),
        (tmp_path / "latin.json", "is not JSON"),
        (big, "more than 16 MiB"),
    ):
        with pytest.raises(ValueError, match=said):
            load_overheads(path)


# --- less memory ---


@pytest.mark.parametrize("room", [0.55, 0.5, 0.45])
def test_under_a_memory_limit_fewer_in_flight_and_a_v_compete(room: float) -> None:
    heavy = model(8, state_bytes_per_parameter_byte=3.0)
    heavy = replace(heavy, blocks=tuple(replace(block, activation_bytes=20_000) for block in heavy.blocks))
    options: dict[str, Any] = {"stages": 4, "accumulations": [4], "policies": ["bounded"]}
    free = plan(heavy, **options, schedules=["paci"]).chosen
    limit = room * max(free.predicted.peak_memory_bytes)
    line = plan(heavy, **options, memory_limit_bytes=limit, schedules=["paci"]).chosen
    assert min(line.slack) < 0 and max(line.predicted.peak_memory_bytes) <= limit
    assert line.predicted.micro_batches_per_s < free.predicted.micro_batches_per_s
    found = plan(heavy, **options, memory_limit_bytes=limit, schedules=["paci", "paci-v", "1f1b"])
    assert found.chosen.predicted.progress_per_s >= 0.99 * line.predicted.progress_per_s
    assert max(found.chosen.predicted.peak_memory_bytes) <= limit


@pytest.mark.parametrize(
    "slack", [(-4, -3, -2, -1, 0, 0, 0, 0), (-3, -3, -2, -2, -1, -1, 0, 0), (-7, -6, -5, -4, -3, -2, -1, 0)]
)
def test_fewer_in_flight_take_less_memory_at_a_longer_period(slack: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"stages": 8, "accumulations": [8], "schedules": ["paci"], "policies": ["bounded"]}
    options["delay_limit"] = 1
    strict, fewer = (plan(model(8), **options, slack=one).chosen for one in (0, slack))
    assert fewer.predicted.peak_memory_bytes[0] < strict.predicted.peak_memory_bytes[0]
    assert fewer.predicted.micro_batches_per_s < strict.predicted.micro_batches_per_s
