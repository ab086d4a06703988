"""The frontier of activations and utilization, by the planner and by ``paci-rt simulate --frontier``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paci_rt.cli.app import main
from paci_rt.planner import BlockProfile, Profile, frontier, plan
from paci_rt.planner.frontier import merged
from paci_rt.schedules import get
from paci_rt.simulate import Costs, simulate

HALF = Costs(forward_s=(0.5,), input_grad_s=(0.5,), weight_grad_s=(0.5,), hop_s=0.05)


def test_more_activations_are_never_slower_on_the_frontier() -> None:
    found = frontier(3, 4, HALF)
    best = [one for one in found if not one.dominated]
    assert [one.activations for one in best] == sorted({one.activations for one in best})
    assert [one.utilization for one in best] == sorted(one.utilization for one in best)
    assert best[-1].utilization == pytest.approx(1, abs=1e-6)
    assert {one.schedule for one in found} == {"paci", "paci-v"}
    full_rate = min(one.activations for one in found if one.schedule == "paci-v" and one.utilization > 0.999)
    assert full_rate < min(one.activations for one in found if one.schedule == "paci")
    for one in found:
        assert one.activation_limit is None or one.activations <= one.activation_limit


def test_a_line_of_merged_pieces_does_the_same_work() -> None:
    costs = Costs(
        forward_s=(1.0, 2.0, 3.0, 4.0),
        input_grad_s=(1.0,),
        weight_grad_s=(0.5, 0.25, 0.5, 0.25),
        message_bytes=(8.0, 16.0, 24.0, 32.0),
        input_bytes=(1.0, 2.0, 3.0, 4.0),
        micro_batch_factors=(1.0, 2.0),
    )
    line = merged(costs, 2)
    assert (line.forward_s, line.input_grad_s, line.weight_grad_s) == ((3.0, 7.0), (2.0, 2.0), (0.75, 0.75))
    assert (line.message_bytes, line.input_bytes, line.micro_batch_factors) == ((16.0, 32.0), (1.0, 3.0), (1.0, 2.0))


def test_the_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = ["simulate", "--schedule", "paci-v", "--stages", "2", "--comm", "0.1", "--frontier"]
    assert main([*arguments, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["ranks"] == 2
    keys = {"schedule", "activation_limit", "slack", "activations", "stashes", "utilization", "micro_batches_per_s"}
    assert all(row.keys() >= keys | {"drift", "delay", "dominated"} for row in written["rows"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("activations", "utilization", "max drift", "max delay", "paci, slack 0"))
    assert all(row["steady"] for row in written["rows"]) and "of the whole run" not in printed
    assert main([*arguments, "--windows", "1", "--json", str(path)]) == 0
    assert "of the whole run" in capsys.readouterr().out
    assert not any(row["steady"] for row in json.loads(path.read_text())["rows"])


@pytest.mark.parametrize(
    ("costs", "cut_as_the_v"),
    [
        ("--forward 1,2,3,4 --comm 0.1", False),
        ("--forward 1,1,1,4 --update 1,2,1,3 --predict 0.5 --message-bytes 8 --bandwidth 1e5", False),
        ("--forward 1,2,3,4,5,6,7,8 --comm 0.1", True),  # of every piece: the line has two neighbours as a stage
    ],
)
def test_its_line_is_that_of_the_same_options(tmp_path: Path, costs: str, cut_as_the_v: bool) -> None:
    path = tmp_path / "found.json"
    options = [*costs.split(), "--stages", "4", "--json", str(path)]
    assert main(["simulate", "--schedule", "paci-v", "--frontier", *options]) == 0
    rows = [row for row in json.loads(path.read_text())["rows"] if row["schedule"] == "paci"]
    of_line = ["--forward", "3,7,11,15", "--comm", "0.1", *options[4:]] if cut_as_the_v else options
    for row in rows:
        slack = ",".join(map(str, row["slack"])) if isinstance(row["slack"], list) else str(row["slack"])
        assert main(["simulate", "--schedule", "paci", "--windows", "24", "--slack", slack, *of_line]) == 0
        alone = json.loads(path.read_text())
        assert row["micro_batches_per_s"] == pytest.approx(alone["micro_batches_per_s"], rel=1e-3)  # of fewer windows
        assert row["activations"] == max(alone["peak_activations"])


def test_what_a_stage_takes_to_predict_is_cut_with_it(tmp_path: Path) -> None:
    path, makespans = tmp_path / "found.json", []
    for each in ("3,1", "1.5,0.5,0.5,1.5", "0"):
        arguments = ["simulate", "--schedule", "paci-v", "--stages", "2", "--micro-batches", "2", "--predict", each]
        assert main([*arguments, "--json", str(path)]) == 0
        makespans.append(json.loads(path.read_text())["makespan"])
    assert makespans[0] == makespans[1] > makespans[2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--frontier"], "--frontier"),
        (["--schedule", "paci-v", "--frontier", "--grid"], "--grid"),
        (["--schedule", "paci-v", "--frontier", "--activation-limit", "2"], "--activation-limit"),
        (["--schedule", "paci-v", "--activation-limit", "0.5"], "--activation-limit is 0.5"),
        (["--schedule", "paci-v", "--activation-limit", "nan"], "--activation-limit"),
        (["--schedule", "1f1b", "--activation-limit", "2"], "--activation-limit is 2: 1f1b takes none"),
        (["--schedule", "paci-v", "--slack", "1"], "--slack"),
        (["--schedule", "paci-v", "--chunks", "3"], "--chunks is 3"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "nothing.json"
    try:
        code = main(["simulate", *arguments, "--json", str(path)])
    except SystemExit as exit_:  # argparse
        code = int(exit_.code or 0)
    assert code == 2
    assert named in capsys.readouterr().err
    assert not path.exists()


def test_the_command_keeps_the_limit_and_counts_pieces(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ["simulate", "--schedule", "paci-v", "--stages", "3", "--activation-limit", "2", "--json", str(path)]
    assert main([*arguments, "--comm", "0.02"]) == 0
    found = json.loads(path.read_text())
    assert found["ranks"] == 3
    assert found["stages"] == 6
    assert found["steady_utilization"] == pytest.approx(1, abs=1e-9)
    assert max(found["peak_activations"]) == 4


def profile(hop_s: float) -> Profile:
    block = BlockProfile(
        name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.010,
        parameter_bytes=4096, activation_bytes=1 << 20, stash_bytes=1 << 18, boundary_bytes=512,
    )  # fmt: skip
    return Profile(blocks=(block,) * 8, hop_s=hop_s)


def test_the_planner_takes_the_v_for_its_memory_and_keeps_its_limits() -> None:
    found = plan(profile(0.0), stages=4, accumulations=[8], schedules=["paci", "paci-v"], policies=["bounded"])
    assert found.chosen.schedule == "paci-v"
    line = next(one for one in found.candidates if one.schedule == "paci")
    assert found.chosen.predicted is not None
    assert line.predicted is not None
    assert max(found.chosen.predicted.peak_memory_bytes) < 0.7 * max(line.predicted.peak_memory_bytes)
    assert found.chosen.predicted.micro_batches_per_s >= 0.99 * line.predicted.micro_batches_per_s
    # What it says is what the simulator says of the order that it names.
    shape = found.chosen.shape(4)
    assert shape.placement == "v"
    costs = Costs(forward_s=(0.01,), input_grad_s=(0.01,), weight_grad_s=(0.01,))
    run = simulate(get("paci-v"), shape, costs, windows=20)
    assert run.steady_utilization == pytest.approx(found.chosen.predicted.utilization, rel=1e-3)

    assert found.chosen.predicted.activations == max(run.peak_activations.values()) / 2 <= 2.5
    assert line.predicted.activations == 4
    assert 0 < found.chosen.predicted.mean_delay < line.predicted.mean_delay <= 1 >= found.chosen.predicted.delay

    tight = max(found.chosen.predicted.peak_memory_bytes) * 0.8
    less = plan(
        profile(0.0),
        stages=4,
        accumulations=[8],
        schedules=["paci", "paci-v"],
        policies=["bounded"],
        memory_limit_bytes=tight,
    )
    assert less.chosen.schedule == "paci-v"
    assert less.chosen.activation_limit is not None
    assert less.chosen.predicted is not None
    assert max(less.chosen.predicted.peak_memory_bytes) <= tight
