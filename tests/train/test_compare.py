"""Time to accuracy: the arithmetic, the sentences, the files."""

from __future__ import annotations

import json
import math
import random

import pytest

from paci_rt.report import spread
from paci_rt.schedules import StepCosts
from paci_rt.trace import Event
from paci_rt.train import compare
from paci_rt.train.config import TrainConfig
from paci_rt.train.results import EvalPoint, RunResult, StepPoint

STEPS, INTERVAL = 8, 4


def made_up_events(stages: int, windows: int, accumulation: int) -> tuple[Event, ...]:
    """Every stage busy for one second a micro-batch, with an update after each window."""
    events = []
    for stage in range(stages):
        for m in range(windows * accumulation):
            events.append(Event(stage, f"{stage}F{m}", m, m + 0.3, m // accumulation))
            events.append(Event(stage, f"{stage}B{m}", m + 0.3, m + 0.9, m // accumulation))
            if (m + 1) % accumulation == 0:
                events.append(Event(stage, f"{stage}U{m // accumulation}", m + 0.9, m + 0.95, m // accumulation))
    return tuple(events)


def made_up_result(config: TrainConfig, losses: list[float], window_s: float) -> RunResult:
    """As if ``losses`` had been seen at steps 0, 4 and 8 and a window had taken ``window_s``."""
    evals = tuple(
        EvalPoint(step=step, tokens=step * 100, elapsed_s=step * window_s, val_loss=loss)
        for step, loss in zip(range(0, STEPS + 1, INTERVAL), losses, strict=True)
    )
    return RunResult(
        schedule=config.schedule,
        stages=2,
        accumulation=config.accumulation or 0,
        steps=STEPS,
        tokens=STEPS * 100,
        train_loss=losses[-1],
        val_loss=losses[-1],
        wall_s=STEPS * window_s,
        tokens_per_s=100 / window_s,
        utilization=0.5,
        max_drift=1 if config.schedule == "paci" else 0,
        drift_bound=1 if config.schedule == "paci" else 0,
        peak_memory_bytes=3 << 20,
        params_sha256="0" * 64,
        policy="bounded",
        transport="shm",
        chunks=1,
        max_delay=1 if config.schedule == "paci" else 0,
        windows=STEPS,
        exposed_comm_s=0.0,
        lookahead_s=0.0,
        nonfinite_gradients=0,
        drift={0: {0: 8}, 1: {0: 8}},
        delay={0: {0: 8}, 1: {0: 8}},
        memory={},
        peak_in_flight={},
        curve=(StepPoint(step=1, tokens=100, elapsed_s=window_s, loss=losses[0]),),
        evals=evals,
        config=config.to_json(),
        events=made_up_events(2, STEPS, config.accumulation or 1),
    )


def run(losses: dict[str, list[list[float]]], target: float | None, window_s: dict[str, float]) -> compare.Comparison:
    """A comparison with one list of losses a seed for every schedule; ``window_s`` is how long its windows take."""
    seeds = len(next(iter(losses.values())))
    options = {"steps": STEPS, "eval_interval": INTERVAL, "accumulation": 2, "batch_size": 4}
    configs = compare.plan(list(losses), seeds, options)
    seen: list[str] = []

    def execute(config: TrainConfig, label: str) -> RunResult:
        seen.append(label.strip())
        return made_up_result(config, losses[config.schedule][config.seed], window_s[config.schedule])

    comparison = compare.compare(configs, target_loss=target, execute=execute)
    assert len(set(seen)) == len(configs)
    return comparison


def test_time_to_target_lies_on_a_line_between_validations():
    points = [
        EvalPoint(step=step, tokens=step * 10, elapsed_s=step * 2.0, val_loss=loss)
        for step, loss in ((0, 5.0), (4, 4.0), (8, 4.5), (12, 3.0))
    ]
    assert compare.first_reached(points, 4.25) == pytest.approx((30.0, 6.0))
    assert compare.first_reached(points, 4.0) == (40.0, 8.0)
    assert compare.first_reached(points, 3.75) == pytest.approx((100.0, 20.0))
    assert compare.first_reached(points, 5.0) == (0.0, 0.0)
    assert compare.first_reached(points, 2.9) == (None, None)
    assert compare.first_reached(points, None) == (None, None)
    after_nan = [EvalPoint(step=0, tokens=0, elapsed_s=0.0, val_loss=math.nan), points[1]]
    assert compare.first_reached(after_nan, 4.5) == (40.0, 8.0)


def test_automatic_target_speedup_and_sentences():
    losses = {"1f1b": [[5.0, 4.0, 3.0]], "paci": [[5.0, 4.0, 3.5]]}
    comparison = run(losses, None, {"1f1b": 3.0, "paci": 2.0})
    assert comparison.target_loss == 3.5
    assert comparison.time_to_target_s("paci") == pytest.approx(16.0)
    assert comparison.time_to_target_s("1f1b") == pytest.approx(18.0)
    speedups = comparison.to_json()["speedup_vs"]
    assert speedups["1f1b"]["paci"] == pytest.approx(18 / 16)
    assert speedups["paci"]["1f1b"] == pytest.approx(16 / 18)
    words = compare.verdict(comparison)
    assert words.startswith("paci reached the target loss of 3.5000")
    assert "paci was 1.12 times as fast, in one run each, which shows no spread" in words
    table = compare.summary_table(comparison).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["1f1b", "paci"]
    assert "1 / 1" in table[3]
    assert "3 MiB" in table[3]


def test_a_target_that_some_miss():
    losses = {"paci": [[5.0, 4.0, 3.0], [5.0, 4.0, 3.4]], "gpipe": [[5.0, 4.0, 2.0], [5.0, 4.0, 3.1]]}
    comparison = run(losses, 3.2, {"paci": 1.0, "gpipe": 1.0})
    assert comparison.time_to_target_s("paci") is None
    assert comparison.to_json()["speedup_vs"]["gpipe"]["paci"] is None
    words = compare.verdict(comparison)
    assert words.startswith("gpipe reached the target loss of 3.2000 first")
    assert words.endswith("paci did not reach it in 1 of 2 runs.")
    assert compare.verdict(run(losses, 1.0, {"paci": 1.0, "gpipe": 1.0})).startswith("No schedule reached")


def test_median_over_seeds():
    losses = {"paci": [[5.0, 3.0, 2.0], [5.0, 5.0, 3.0], [5.0, 4.0, 3.0]]}
    comparison = run(losses, 4.0, {"paci": 1.0})
    assert [r.time_to_target_s for r in comparison.runs] == pytest.approx([2.0, 6.0, 4.0])
    assert comparison.time_to_target_s("paci") == pytest.approx(4.0)


def test_a_diverged_run_leaves_no_automatic_target():
    comparison = run({"1f1b": [[5.0, 4.0, 3.0]], "paci": [[5.0, 9.0, math.nan]]}, None, {"1f1b": 1.0, "paci": 1.0})
    assert comparison.target_loss is None
    assert "the loss of paci ended as NaN or infinite" in compare.verdict(comparison)
    assert "NaN" not in json.dumps(comparison.to_json())


def test_options_go_to_the_schedules_that_can_have_them() -> None:
    names = ["paci", "1f1b", "interleaved-1f1b", "zb-1p"]
    options = {"accumulation": 4, "policy": "recompute", "lookahead": True, "chunks": 3}
    options |= {"step_costs": StepCosts(hop=0.5), "slack": 1, "stages": 2}
    configs = {config.schedule: config for config in compare.plan(names, 1, options)}
    assert {name for name, config in configs.items() if config.lookahead} == {"paci"}
    assert {name: config.chunks for name, config in configs.items() if config.chunks > 1} == {"interleaved-1f1b": 3}
    assert [name for name, config in configs.items() if config.step_costs] == ["zb-1p"]
    assert {config.policy for config in configs.values()} == {"recompute"}
    (pipedream,) = compare.plan(["pipedream"], 1, {"policy": "recompute"})
    assert pipedream.policy == "stash"


def test_plan_gives_each_schedule_what_it_takes():
    configs = compare.plan(["PACI", "1f1b", "async-1f1b"], 2, {"accumulation": 4, "slack": 1, "seed": 5})
    facts = [(c.schedule, c.seed, c.accumulation, c.slack, c.batch_size) for c in configs]
    assert facts == [
        ("paci", 5, 4, 1, 8),
        ("1f1b", 5, 4, 0, 8),
        ("async-1f1b", 5, 1, 1, 8),
        ("async-1f1b", 6, 1, 1, 8),
        ("1f1b", 6, 4, 0, 8),
        ("paci", 6, 4, 1, 8),
    ]
    for names, seeds, options, words in (
        (["paci", "PACI"], 1, {}, "names paci twice"),
        ([], 1, {}, "is empty"),
        (["paci"], 0, {}, "--seeds is 0"),
        (["paci"], 1, {"eval_interval": 0}, "--eval-interval 0"),
        (["packi"], 1, {}, "did you mean 'paci'"),
    ):
        with pytest.raises(ValueError, match=words):
            compare.plan(names, seeds, options)


def test_report_has_everything(tmp_path):
    pytest.importorskip("matplotlib")
    losses = {"1f1b": [[5.0, 4.0, 3.0], [5.0, 4.1, 3.1]], "paci": [[5.0, 4.0, 3.5], [5.0, 4.1, 3.2]]}
    comparison = run(losses, None, {"1f1b": 3.0, "paci": 2.0})
    written = compare.write_report(tmp_path / "new" / "folder", comparison)
    names = [
        "report.md",
        "loss_vs_tokens.png",
        "loss_vs_time.png",
        "timeline.png",
        "trace-1f1b.json",
        "trace-paci.json",
        "comparison.json",
    ]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    report = written[0].read_text()
    assert report.startswith("# 1f1b against paci\n\npaci reached the target loss")
    assert compare.summary_table(comparison, markdown=True) in report
    assert compare.iso_loss_table(comparison, markdown=True) in report
    for name in names[1:-1]:
        assert name in report
    for picture in written[1:4]:
        assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(written[5].read_text())["traceEvents"]
    assert {event["name"] for event in events} >= {"0F0", "1B3", "0U7"}


def test_the_timeline_shows_windows_between_two_validations():
    config = compare.plan(["1f1b"], 1, {"steps": STEPS, "eval_interval": INTERVAL, "batch_size": 4})[0]
    start_s, end_s = compare._middle(made_up_result(config, [5.0, 4.0, 3.0], 1.0))
    # windows of four seconds; validations after windows 4 and 8 of them, so 4 to 6 are shown
    assert (start_s, end_s) == pytest.approx((4 * 4 - 0.05, 7 * 4 - 0.05))


def timed(seconds: dict[str, list[float]], target: float | None = 4.0) -> compare.Comparison:
    """A comparison whose runs come down to a loss of 4 in these seconds, seed by seed."""
    seeds = len(next(iter(seconds.values())))
    options = {"steps": STEPS, "eval_interval": INTERVAL, "accumulation": 2, "batch_size": 4}
    configs = compare.plan(list(seconds), seeds, options)

    def execute(config: TrainConfig, label: str) -> RunResult:
        return made_up_result(config, [5.0, 4.0, 3.5], seconds[config.schedule][config.seed] / INTERVAL)

    return compare.compare(configs, target_loss=target, execute=execute)


def test_two_seeds_far_apart_show_no_difference():
    comparison = timed({"paci": [19.3, 1.9], "1f1b": [20.1, 20.3]})
    words = compare.verdict(comparison)
    assert "no difference that 2 seeds show" in words
    assert "first" not in words
    spread = comparison.to_json()["speedup_spread_vs"]["1f1b"]["paci"]
    assert spread["low"] < 1 < spread["high"] and spread["differs"] is False


def test_seeds_that_agree_show_a_difference_with_its_spread():
    comparison = timed({"paci": [10.0, 11.0, 12.0], "1f1b": [15.0, 16.4, 18.1]})
    words = compare.verdict(comparison)
    assert words.startswith("paci reached the target loss of 4.0000 first, after 11.0 s (median).")
    assert "1f1b took 16.4 s: paci was 1.50 (1.48 to 1.52) times as fast, over 3 seeds" in words
    assert "=" not in compare.iso_loss_table(comparison)


def test_seeds_are_paired_whatever_the_order_of_the_runs():
    one = timed({"paci": [10.0, 100.0], "1f1b": [20.0, 200.0]}).speedup("1f1b", "paci")
    assert one is not None
    assert (one.value, one.low, one.high) == pytest.approx((2.0, 2.0, 2.0))
    assert one.differs


def test_thresholds_fixed_beforehand_make_the_rows_of_the_table():
    comparison = timed({"zb-1p": [9.0, 9.1], "1f1b": [15.0, 15.1]}, target=(3.6, 4.5, 4.0))
    assert comparison.thresholds == (4.5, 4.0, 3.6)
    assert comparison.target_loss == 3.6
    rows = comparison.to_json()["iso_loss"]
    assert [(row["loss"], row["schedule"]) for row in rows][:3] == [(4.5, "zb-1p"), (4.5, "1f1b"), (4.0, "zb-1p")]
    assert rows[0]["seconds"] == pytest.approx(9.05 / 2)
    assert rows[0]["speedup"]["value"] == pytest.approx(15.05 / 9.05, rel=1e-3)
    assert rows[1]["speedup"] is None
    table = compare.iso_loss_table(comparison).splitlines()
    assert table[0].split("  ")[0] == "loss" and "times as fast as 1f1b" in table[0]
    assert [line.split()[0] for line in table[2:]] == ["4.500", "4.000", "3.600"]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ([5.5, 5.6], [4.87, 4.91], (5.4, 5.3, 5.2, 5.1, 5.0)),
        ([5.5, 5.5], [3.0, 3.5], (4.0, 3.9, 3.8, 3.7, 3.6, 3.5)),
        ([5.55, 5.55], [5.52, 5.51], (5.54, 5.53, 5.52)),
        ([5.0], [5.0], (5.0,)),
        ([4.0], [4.5], (4.5,)),
    ],
)
def test_automatic_thresholds_are_round(first: list[float], last: list[float], expected: tuple[float, ...]):
    assert spread.thresholds(first, last) == expected


def test_an_interval_holds_what_it_says():
    """Of intervals of ratios of random times, 95 % hold the true one."""
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        seeds = rng.choice((2, 3, 5, 20))
        mine = [math.exp(rng.gauss(0.3, 0.2)) for _ in range(seeds)]
        found = spread.ratio(mine, [math.exp(rng.gauss(0.0, 0.1)) for _ in range(seeds)])
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= math.exp(0.3) <= found.high
    assert 0.935 < held / 2000 < 0.965
    assert spread.ratio([1.0, None], [1.0, 2.0]) is None
    assert spread.ratio([0.0], [1.0]) is None
