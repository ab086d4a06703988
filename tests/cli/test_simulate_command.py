"""``paci-rt simulate``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from paci_rt import cli, schedules
from paci_rt.cli import simulate as simulate_command
from paci_rt.planner.profile import BlockProfile, Profile
from paci_rt.schedules import Shape
from paci_rt.simulate import Costs, simulate

PUBLISHED = "--stages 8 --micro-batches 24 --forward 18.522 --input-grad 18.086 --weight-grad 9.337 --comm 0.601"
KEYS = {"bubble_rate", "makespan", "steady_utilization", "peak_activations", "max_drift", "weight_versions"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def simulated(options: str) -> dict:
    """What the command writes."""
    assert cli.main(["simulate", *options.split(), "--json", "result.json"]) == 0
    return json.loads(Path("result.json").read_text())


@pytest.mark.parametrize(
    ("schedule", "rate"), [("1f1b", 0.2431), ("zb-h1", 0.1585), ("zb-1p", 0.1585), ("zb-h2", 0.1083), ("zb-2p", 0.0433)]
)
def test_the_published_check_as_it_is_typed(capsys, schedule, rate):
    found = simulated(f"--schedule {schedule} {PUBLISHED}")
    assert found.keys() >= KEYS
    assert found["bubble_rate"] == pytest.approx(rate, abs=1e-4)
    assert f"bubble rate {found['bubble_rate']:.4f}\n" in capsys.readouterr().out


def test_times_are_milliseconds():
    found = simulated("--schedule 1f1b --stages 4 --micro-batches 8")
    assert found["makespan"] == 33.0  # exactly, however they are kept
    assert found["makespan_s"] == pytest.approx(0.033)
    assert found["micro_batches_per_s"] == pytest.approx(8 / 0.033)
    assert found["peak_activations"] == [4, 3, 2, 1]
    assert found["weight_versions"] == [1, 1, 1, 1]
    assert simulated("--schedule 1f1b --stages 4 --micro-batches 8 --update 2")["makespan"] == 35.0


def test_the_table(capsys):
    simulated("--schedule zb-h1 --stages 3 --micro-batches 4 --activation-bytes 2048 --stash-bytes 1024")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "zb-h1: 3 stages, 1 window of 4 micro-batches, policy bounded"
    assert re.split(r"  +", lines[6]) == [
        "stage", "busy", "peak activations", "stashes", "peak size", "drift", "delay", "weight versions",
    ]  # fmt: skip
    assert re.split(r"  +", lines[8]) == ["0", "85.7 %", "3", "1", "6 KiB", "0", "0", "1"]
    assert len(lines) == 11
    simulated("--stages 60")
    assert capsys.readouterr().out.splitlines()[-1] == "... 20 more stages"


def test_asynchronous_schedules_run_into_their_steady_state(capsys):
    found = simulated("--schedule paci --stages 8 --micro-batches 4 --policy stash --weight-bytes 100")
    assert found["steady_windows"] == 8
    assert found["steady_utilization"] == pytest.approx(1.0)
    assert (found["max_drift"], found["max_delay"]) == (0, 2)
    assert found["weight_versions"] == [3, 3, 3, 2, 2, 2, 2, 1]
    assert "extra weights" in capsys.readouterr().out
    for schedule in ("async-1f1b", "pipedream"):
        found = simulated(f"--schedule {schedule} --stages 4 --micro-batches 8 --windows 5")
        assert (found["windows"], found["accumulation"], found["max_delay"]) == (40, 1, 3)
        assert simulated(f"--schedule {schedule} --stages 4")["steady_windows"] >= 4
    simulated("--stages 8 --micro-batches 1 --windows 2")
    assert "of the whole run: more --windows have a steady part" in capsys.readouterr().out


def test_one_value_a_stage_and_factors():
    found = simulated("--schedule 1f1b --stages 2 --micro-batches 4 --forward 1,2 --input-grad 0 --weight-grad 0,3")
    assert found["busy_s"] == pytest.approx([0.004, 0.020])
    assert found["makespan"] == 21.0
    slower = simulated("--schedule 1f1b --stages 1 --micro-batches 4 --micro-batch-factors 1,3")
    assert slower["makespan"] == 24.0
    noisy = "--schedule 1f1b --stages 2 --noise 0.1 --seed"
    assert simulated(f"{noisy} 1") == simulated(f"{noisy} 1") != simulated(f"{noisy} 2")


def test_messages():
    found = simulated("--schedule gpipe --stages 2 --micro-batches 1 --message-bytes 5e6,1 --bandwidth 1e9 --comm 0.5")
    assert found["makespan"] == 6 + 2 * (5 + 0.5)


def test_chunks_share_the_times_of_their_stage():
    whole = simulated("--schedule interleaved-1f1b --stages 2 --micro-batches 4 --chunks 1 --activation-bytes 12")
    halves = simulated("--schedule interleaved-1f1b --stages 2 --micro-batches 4 --activation-bytes 12")
    assert (halves["ranks"], halves["stages"]) == (2, 4)
    assert halves["busy_s"] == pytest.approx(whole["busy_s"])
    assert (whole["bubble_rate"], halves["bubble_rate"]) == pytest.approx((1 / 5, 1 / 9))
    assert halves["peak_activation_bytes"] == [6 * units for units in halves["peak_activations"]]
    pieces = simulated("--schedule interleaved-1f1b --stages 2 --micro-batches 4 --forward 1,2,3,4")
    assert pieces["busy_s"] == pytest.approx([(1 + 3) * 4e-3 + 8e-3, (2 + 4) * 4e-3 + 8e-3])


def test_slack_that_is_planned_comes_with_its_price(capsys):
    found = simulated("--stages 8 --comm 0.5 --slack auto --activation-bytes 1024")
    strict = found["without_slack"]
    assert found["slack"] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert found["steady_utilization"] >= 0.97 > 0.9 > strict["steady_utilization"]
    assert found["peak_activations"] == [15, 13, 11, 9, 7, 5, 3, 1] and strict["peak_activations"][0] == 8
    assert (found["max_drift"], strict["max_drift"]) == (2, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("look-ahead, slack 7,6,5,4,3,2,1,0")
    rows = [re.split(r"  +", line) for line in lines[6:10]]
    assert rows[0] == [
        "slack", "steady utilization", "micro-batches/s", "peak activations", "peak size", "max drift", "max delay"
    ]  # fmt: skip
    assert rows[2] == ["0", "0.7742", "258.06", "8", "8 KiB", "1", "1"]
    assert rows[3] == ["7,6,5,4,3,2,1,0", "1.0000", "333.33", "15", "15 KiB", "2", "2"]
    split = simulated("--schedule paci-split --stages 8 --comm 0.5 --slack auto")
    assert (split["slack"], split["peak_activations"][0], "without_slack" in split) == (0, 8, False)
    assert split["steady_utilization"] >= 0.97
    assert "slack 0" in capsys.readouterr().out
    by_size = simulated("--stages 2 --slack auto --message-bytes 1e6 --bandwidth 1e9")
    assert by_size["slack"] == 1  # one number says it all
    assert simulated("--stages 4 --comm 0.5 --slack 3,2,1,0") == simulated("--stages 4 --comm 0.5 --slack auto")
    assert simulated("--stages 4 --comm 0.5 --slack 1,1,1,0") == simulated("--stages 4 --comm 0.5 --slack 1")
    assert simulated("--stages 4 --comm 1 --slack auto --policy recompute")["slack"] == [3, 2, 1, 0]
    assert simulated("--schedule 1f1b --comm 1")["slack"] == 0


def test_slack_is_planned_from_a_profile():
    write_profile("profile.json")
    found = simulated("--stages 3 --micro-batches 4 --profile profile.json --partition 2,2,2 --slack auto")
    assert found["slack"] == 0  # the head makes the last stage so slow that the others have time for messages
    slow = simulated("--stages 3 --micro-batches 4 --profile profile.json --partition 2,2,2 --slack auto --comm 12")
    assert slow["slack"] != 0
    assert slow["micro_batches_per_s"] == pytest.approx(found["micro_batches_per_s"], rel=0.02)


def write_profile(path: str) -> None:
    def block(name: str, role: str, forward_s: float) -> BlockProfile:
        return BlockProfile(
            name=name,
            role=role,
            forward_s=forward_s,
            input_grad_s=forward_s,
            weight_grad_s=forward_s,
            parameter_bytes=1000,
            activation_bytes=100,
            stash_bytes=40,
            boundary_bytes=8,
        )

    middle = [block(f"blocks.{at}", "middle", 0.002) for at in range(6)]
    blocks = (block("embedding", "first", 0.001), *middle, block("head", "last", 0.004))
    profile = Profile(blocks=blocks, input_bytes=16, update_s_per_byte=1e-6, hop_s=0.001)
    Path(path).write_text(json.dumps(profile.to_json()))


def test_a_profile():
    write_profile("profile.json")
    found = simulated("--schedule 1f1b --stages 2 --micro-batches 4 --profile profile.json")
    assert found["partition"] == [4, 2]  # 0.009 s of forward before, 0.008 s after
    assert found["busy_s"] == pytest.approx([4 * 3 * 0.009 + 0.005, 4 * 3 * 0.008 + 0.003])
    assert found["peak_activation_bytes"] == [1000.0, 300.0]
    given = simulated("--schedule zb-2p --micro-batches 4 --profile profile.json --partition 2,2,2 --update 0")
    assert given["partition"] == [2, 2, 2]
    assert given["busy_s"] == pytest.approx([4 * 3 * 0.005, 4 * 3 * 0.004, 4 * 3 * 0.008])
    chunks = simulated("--schedule interleaved-1f1b --stages 2 --micro-batches 4 --profile profile.json")
    assert len(chunks["partition"]) == 4


def test_searched_schedules_are_fitted_to_the_costs():
    fitted = simulated(f"--schedule zb-2p {PUBLISHED}")["bubble_rate"]
    costs = Costs(forward_s=(18.522,), input_grad_s=(18.086,), weight_grad_s=(9.337,), hop_s=0.601)
    to_equal_times = simulate(schedules.get("zb-2p"), Shape(num_stages=8, accumulation=24), costs).bubble_rate
    assert fitted < 0.9 * to_equal_times
    # Stashes as large as the activations leave no room for putting weight gradients off.
    small, large = (
        simulated(f"--schedule zb-2p {PUBLISHED} --activation-bytes 100 --stash-bytes {size}") for size in (1, 100)
    )
    assert small["bubble_rate"] < large["bubble_rate"]


def test_pictures(capsys):
    pytest.importorskip("matplotlib")
    options = "--schedule interleaved-1f1b --stages 2 --micro-batches 4 --plot new/zb.png --trace new/trace.json --grid"
    simulated(options)
    assert Path("new/zb.png").read_bytes().startswith(b"\x89PNG")
    names = {event["name"] for event in json.loads(Path("new/trace.json").read_text())["traceEvents"]}
    assert names >= {"0F0", "3B3", "2U0"}
    out = capsys.readouterr().out
    assert "rank 0  F0a F1a F0b F1b" in out
    assert "1 column = 0.5 ms" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--schedule zb-h", "unknown schedule 'zb-h': did you mean 'zb-h"),
        ("--policy stach", "unknown policy 'stach': did you mean 'stash'"),
        ("--policy stash --schedule 1f1b", "policy 'stash' under 1f1b"),
        ("--forwards 3", "unknown option --forwards: did you mean --forward?"),
        ("--forward -1", "--forward is -1: give a finite number of at least 0"),
        ("--forward 1,nan,1,1", "--forward is nan"),
        ("--forward inf", "--forward is inf"),
        ("--forward fast", "'fast' is not a list of numbers"),
        ("--forward 1,2,3", "--forward has 3 numbers: give 1, or 4, one for each stage"),
        ("--schedule interleaved-1f1b --weight-bytes 1,2,3", "or 4, one for each stage, or 8, one for each piece"),
        ("--comm -0.5", "--comm is -0.5"),
        ("--comm nan", "--comm is nan"),
        ("--bandwidth 0", "--bandwidth is 0: give a number above 0"),
        ("--noise -1", "--noise is -1"),
        ("--seed -1", "--seed is -1"),
        ("--micro-batch-factors nan", "--micro-batch-factors is nan"),
        ("--stages 0", "--stages is 0: give an integer of at least 1"),
        ("--micro-batches 0", "--micro-batches is 0"),
        ("--windows 0", "--windows is 0"),
        ("--slack -1", "--slack is -1"),
        ("--slack fast", "--slack: 'fast' is no slack: write 2, or one number a stage such as 3,2,1,0, or auto"),
        ("--slack 1,0", "--slack is 1,0, which is for 2 stages, and there are 4"),
        ("--slack 0,2,1,0", "--slack is 0,2,1,0: stage 1 would run 4 forwards ahead"),
        ("--slack 1,1,1,1", "--slack is 1,1,1,1: the last stage waits for nobody's gradient, so end with 0"),
        ("--slack 1,1,0,0 --schedule 1f1b", "--slack is 1,1,0,0: 1f1b flushes and takes none"),
        ("--slack auto --schedule 1f1b", "--slack is auto: 1f1b flushes and takes none"),
        ("--slack auto", "--slack auto: nothing says how long messages take; give --comm MS"),
        ("--slack auto --message-bytes 1000", "--slack auto: nothing says how long messages take"),
        ("--slack auto --comm 1 --policy 2bw --micro-batches 3", "needs at least 6 micro-batches a window"),
        ("--slack 1 --schedule 1f1b", "--slack is 1: 1f1b flushes and takes none"),
        ("--chunks 2", "--chunks is 2: paci runs one piece of the model a stage"),
        ("--schedule interleaved-1f1b --micro-batches 6", "accumulation is 6: interleaved-1f1b"),
        ("--schedule pipedream-2bw --stages 12", "needs at least 11 micro-batches a window"),
        ("--partition 2,2", "--partition cuts the blocks of a profile"),
        ("--profile nowhere.json", "profile nowhere.json cannot be read"),
        ("--stages 100000 --micro-batches 1000 --windows 10", "plays at most 100,000,000 actions"),
        ("--stages 200 --micro-batches 1 --windows 20 --plot x.png", "--plot draws at most 128 stages"),
        ("--stages 8 --windows 10000 --plot x.png", "--plot draws at most 50,000 actions"),
        ("--json /proc/nowhere.json", "--json /proc/nowhere.json cannot be written"),
        ("--plot .", "--plot . is a folder"),
        ("--trace /proc/nowhere.json", "--trace /proc/nowhere.json cannot be written"),
    ],
)
def test_bad_values_end_in_one_line(capsys, options, words):
    argv = options.split()
    if "--json" not in argv:
        argv += ["--json", "result.json"]
    assert cli.main(["simulate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"paci-rt: error: [^\n]+\n", err)
    assert words in err
    assert os.listdir() == []


def test_bad_partitions(capsys):
    write_profile("profile.json")
    for options, words in (
        ("--partition 2,2", "add up to 6"),
        ("--partition 3,3 --stages 3", "--partition has 2 numbers for 3 stages: give 3"),
        ("--stages 7", "--stages is 7: the profile has only 6 blocks to cut; use fewer"),
        ("--stages 4 --schedule interleaved-1f1b", "only 6 blocks to cut into 8 pieces"),
    ):
        assert cli.main(["simulate", "--profile", "profile.json", *options.split()]) == 2
        assert words in capsys.readouterr().err


def test_every_option_is_a_field():
    fields = {field for _, field, *_ in simulate_command._COSTS} | {"micro_batch_factors", "noise", "seed"}
    assert fields == set(simulate_command.Costs.__dataclass_fields__)
