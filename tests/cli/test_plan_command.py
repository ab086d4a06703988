"""``paci-rt plan``: what it prints and writes, that its command is one that ``paci-rt train`` takes, and bad values."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from paci_rt import cli, schedules
from paci_rt.cli import app
from paci_rt.cli.options import config_options, size
from paci_rt.profiling.link import Link
from paci_rt.train import compare, gpt_blocks
from paci_rt.train.config import TrainConfig
from paci_rt.train.gpt import MODELS

QUICK = ["plan", "--model", "gpt-tiny", "--seq-len", "8", "--rows", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def measured():
    return gpt_blocks.profile_gpt(MODELS["gpt-tiny"], rows=1, seq_len=8, repeats=1).to_json()


@pytest.fixture
def stored(measured) -> str:
    """A file with a profile, in which nothing costs more or less by chance."""
    for at, block in enumerate(measured["blocks"]):
        middle = block["role"] == "middle"
        block |= dict.fromkeys(("forward_s", "input_grad_s", "weight_grad_s"), 0.01 if middle else 1e-4)
        assert middle == (0 < at < 9)
    measured["update_s_per_byte"] = 1e-9
    Path("profile.json").write_text(json.dumps(measured))
    return "profile.json"


def train_config(command: str) -> TrainConfig:
    """What ``paci-rt train`` would make of a printed command; raises where it would refuse."""
    program, train, *_ = words = shlex.split(command)
    assert (program, train) == ("paci-rt", "train")
    args = app.parse(words[1:])
    return TrainConfig(**config_options(args))


def test_measure_plan_and_write(capsys):
    assert cli.main([*QUICK, "--stages", "2", "--profile", "new/tiny.json", "--json", "plan.json"]) == 0
    out = capsys.readouterr().out
    assert "measured here over 1 micro-batch, and written to new/tiny.json" in out
    found = json.loads(Path("plan.json").read_text())
    assert found.keys() >= {"partition", "accumulation", "slack", "predicted", "schedule", "runners_up", "profile"}
    pieces, stages = len(found["partition"]), found["stages"]  # some schedules have several pieces in a stage
    assert sum(found["partition"]) == 8 and stages == 2 and pieces in (2, 4)
    assert found["predicted"].keys() == {
        "micro_batches_per_s", "utilization", "peak_memory_bytes", "drift", "delay", "mean_delay",
        "activations", "overhead", "progress_per_s"
    }  # fmt: skip
    assert found["profile"]["profiled"]["seq_len"] == 8
    assert {one["schedule"] for one in [found, *found["runners_up"]]} == set(schedules.FAMILIES)
    assert f"Run it:\n  {found['command']}" in out
    config = train_config(found["command"])
    assert (config.schedule, config.partition) == (found["schedule"], tuple(found["partition"]))
    assert config.batch_size == config.accumulation == found["accumulation"]
    assert cli.main(["plan", "--stages", "2", "--profile", "new/tiny.json"]) == 0
    assert "read from new/tiny.json, nothing was measured" in capsys.readouterr().out


def test_the_plan_explains_itself(capsys, stored):
    argv = ["plan", "--profile", stored, "--stages", "4", "--memory-limit", "6MiB,80MiB,80MiB,80MiB"]
    argv += ["--delay-limit", "none", "--no-lookahead"]
    assert cli.main([*argv, "--drift-limit", "1", "--hop-ms", "0.5", "--bandwidth", "1GB", "--batch-size", "1,8"]) == 0
    out = capsys.readouterr().out
    assert "h.0 (and 7 like it)" in out
    assert "Messages between stages: 0.5 ms latency, 953.7 MiB/s." in out
    assert re.search(r"Plan for 4 stages: \S+, policy \w+", out)
    assert re.search(r"^0 +embedding, h\.0 +1 +30\.\d ms +[0-9.]+ MiB +[0-9.]+ MiB +[0-9.]+ %$", out, re.MULTILINE)
    plan_row = next(line for line in out.splitlines() if "(plan)" in line)
    assert "1.000" in plan_row
    rejected = out.split("Rejected")[1]
    assert re.search(r"looped-bfs \(.*accumulation 1\): needs [0-9.]+ MiB on device 0, .* MiB over its limit", rejected)


@pytest.mark.parametrize("name", ["zb-v", "v-min", "interleaved-1f1b"])
def test_the_plan_says_what_each_rank_holds(capsys, stored, name):
    argv = ["plan", "--profile", stored, "--stages", "2", "--schedules", name, "--delay-limit", "none"]
    assert cli.main([*argv, "--json", "plan.json"]) == 0
    sizes = json.loads(Path("plan.json").read_text())["partition"]
    places = schedules.Placement(num_stages=4, chunks=2, name=schedules.get(name).placement)
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"^[01] +(embedding, )?h\.", line)]
    for rank, row in enumerate(rows):
        pieces = re.split(r" {2,}", row)[1].split("; ")
        blocks = [part.replace("embedding, ", "").replace(", head", "") for part in pieces]
        firsts = [sum(sizes[:stage]) for stage in places.stages_of(rank)]
        assert [int(part[2:].split(",")[0].split(" ")[0]) for part in blocks] == firsts, row
        assert ("embedding" in pieces[0], "head" in pieces[1]) == (rank == 0, rank == places.last_rank), row
        times = [float(one) for one in re.search(r"\(([\d.]+) ms \+ ([\d.]+) ms\)", row).groups()]
        assert times == pytest.approx([30 * sizes[stage] for stage in places.stages_of(rank)], rel=0.03), row
    assert len(rows) == 2


@pytest.mark.parametrize("name", schedules.FAMILIES)
def test_train_takes_the_command_of_every_schedule(capsys, stored, name):
    for policy in schedules.get(name).policies:
        argv = ["plan", "--profile", stored, "--stages", "2", "--schedules", name, "--policies", policy]
        argv += ["--delay-limit", "none"]
        assert cli.main([*argv, "--hop-ms", "20", "--json", "plan.json"]) == 0
        found = json.loads(Path("plan.json").read_text())
        config = train_config(found["command"])
        assert (config.schedule, config.policy, config.slack) == (name, policy, found["slack"])
        assert (config.partition, config.accumulation) == (tuple(found["partition"]), found["accumulation"])
        assert (config.chunks, config.stages, config.seq_len) == (found["chunks"], 2, 8)
        assert (config.step_costs is not None) == schedules.get(name).takes_costs
        assert f"Plan for 2 stages: {name}, policy {policy}" in capsys.readouterr().out


def test_slack_has_its_price_beside_it(capsys, stored):
    argv = ["plan", "--profile", stored, "--stages", "4", "--schedules", "paci", "--json", "plan.json"]
    assert cli.main([*argv, "--hop-ms", "5"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("plan.json").read_text())
    assert train_config(found["command"]).slack == tuple(found["slack"]) == (3, 2, 1, 0)
    assert "policy bounded, look-ahead, slack 3,2,1,0" in out and "--slack 3,2,1,0" in found["command"]
    gain = found["predicted"]["micro_batches_per_s"] / found["without_slack"]["micro_batches_per_s"]
    price = re.search(r"slack +makes it ([0-9.]+) times as fast as the strict order on the same stages", out)
    assert float(price[1]) == pytest.approx(gain, abs=1e-3) and gain > 1.1
    assert f"drift {found['predicted']['drift']} instead of {found['without_slack']['drift']}" in out
    assert cli.main([*argv, "--hop-ms", "5", "--slack", "1,1,0,0"]) == 0
    assert json.loads(Path("plan.json").read_text())["slack"] == [1, 1, 0, 0]
    assert cli.main([*argv, "--slack", "-2,-1,0,0"]) == 0  # below 0
    found = json.loads(Path("plan.json").read_text())
    assert train_config(found["command"]).slack == tuple(found["slack"]) == (-2, -1, 0, 0)
    assert cli.main(argv) == 0  # no hop
    assert "strict order" not in capsys.readouterr().out.split("slack 1,1,0,0")[-1].split("Run it")[1]


def test_an_activation_limit_is_shown_as_it_is_chosen(capsys, stored):
    profile = json.loads(Path(stored).read_text())
    profile["blocks"] = [block | {"activation_bytes": 64 << 20, "stash_bytes": 0} for block in profile["blocks"]]
    Path(stored).write_text(json.dumps(profile))
    argv = ["plan", "--profile", stored, "--stages", "4", "--batch-size", "16", "--schedules", "paci-v"]
    argv += ["--policies", "bounded", "--lookahead", "--json", "plan.json"]
    assert cli.main(argv) == 0
    capsys.readouterr()
    most = max(json.loads(Path("plan.json").read_text())["predicted"]["peak_memory_bytes"])
    assert cli.main([*argv, "--memory-limit", str(int(0.7 * most))]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("plan.json").read_text())
    limit = found["activation_limit"]
    assert limit is not None and max(found["predicted"]["peak_memory_bytes"]) <= 0.7 * most
    assert f"activation limit {limit:g}\n" in out and f"paci-v x2, limit {limit:g} (plan)" in out
    assert train_config(found["command"]).activation_limit == limit


def test_train_plans_slack_from_a_profile(capsys, stored):
    def train(*more: str) -> TrainConfig:
        options = ["--stages", "4", "--accumulation", "8", "--batch-size", "8", "--seq-len", "8"]
        return TrainConfig(**config_options(app.parse(["train", *options, *more])))

    def rewrite(**changes: Any) -> None:
        Path(stored).write_text(json.dumps(json.loads(Path(stored).read_text()) | changes))

    def refused_with(words: str, *more: str) -> None:
        options = ["--stages", "4", "--accumulation", "8", "--batch-size", "8", "--seq-len", "8"]
        assert words in refused(capsys, ["train", *options, *more])

    refused_with("--slack auto needs to know how long stages and messages take: give --profile FILE", "--slack", "auto")
    refused_with("says nothing about how long messages take", "--slack", "auto", "--profile", stored)
    rewrite(hop_s=0.005)
    config = train("--slack", "auto", "--profile", stored)
    assert (config.slack, config.profile) == ((3, 2, 1, 0), None)
    assert config == train("--slack", "3,2,1,0")  # equal configs give equal parameters
    assert train("--slack", "auto", "--profile", stored, "--schedule", "paci-split").slack == 0
    assert train("--slack", "auto", "--profile", stored, "--partition", "1,1,1,5").slack == 0
    rewrite(hop_s=0.0, bandwidth_bytes_per_s=1e6)
    assert train("--slack", "auto", "--profile", stored).slack == (3, 2, 1, 0)
    for name, value in (("--seq-len", "16"), ("--batch-size", "16"), ("--threads", "2"), ("--dtype", "bf16")):
        refused_with("was measured with", "--slack", "auto", "--profile", stored, name, value)
    refused_with("--slack is auto: 1f1b takes no slack", "--slack", "auto", "--profile", stored, "--schedule", "1f1b")
    refused_with("--profile tells --slack auto", "--slack", "1", "--profile", stored)
    refused_with("profile nowhere.json cannot be read", "--slack", "auto", "--profile", "nowhere.json")
    refused_with("needs at least 6 micro-batches per window", "--slack", "auto", "--profile", stored, "--policy", "2bw",
                 "--accumulation", "4", "--batch-size", "4")  # fmt: skip
    configs = compare.plan(["paci", "1f1b"], 1, {"stages": 4, "accumulation": 8, "batch_size": 8, "seq_len": 8,
                           "slack": "auto", "profile": stored})  # fmt: skip
    assert [one.slack for one in configs] == [(3, 2, 1, 0), 0]


def test_links_that_are_measured(capsys, stored, monkeypatch):
    measured = []

    def measure_link(large_bytes: int, *, transport: str) -> Link:
        measured.append(transport)
        return Link(hop_s=3e-3, bandwidth_bytes_per_s=2**30)

    monkeypatch.setattr("paci_rt.profiling.link.measure_link", measure_link)
    assert cli.main(["plan", "--profile", stored, "--measure-link"]) == 0
    assert "Messages between stages: 3 ms latency, 1 GiB/s." in capsys.readouterr().out
    assert cli.main(["plan", "--profile", stored, "--measure-link", "--hop-ms", "1"]) == 0
    out = capsys.readouterr().out
    assert "Messages between stages: 1 ms latency, 1 GiB/s." in out
    assert "--transport" not in out
    assert cli.main(["plan", "--profile", stored, "--measure-link", "--transport", "gloo"]) == 0
    assert "--transport gloo" in capsys.readouterr().out
    assert measured == ["auto", "auto", "gloo"]


def test_a_model_that_train_does_not_know(capsys, stored):
    data = json.loads(Path(stored).read_text())
    data["profiled"]["model"] = "mine"
    Path(stored).write_text(json.dumps(data))
    assert cli.main(["plan", "--profile", stored]) == 0
    assert "paci-rt train has no model 'mine'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GiB", 8 * 2**30), ("500MB", 5e8), ("1.5 kib", 1536), ("12", 12), ("2e9", 2e9), ("10GB/s", 1e10)],
)
def test_sizes(text, value):
    assert size(text) == value


def refused(capsys, argv: list[str]) -> str:
    """Run a command that must refuse its arguments; returns its one line."""
    before = sorted(os.listdir())
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"paci-rt: error: [^\n]+\n", err)
    assert sorted(os.listdir()) == before
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--stages 9", "9 stages, but there are only 8 blocks"),
        ("--stages 0", "stages is 0"),
        ("--model gpt-tinny", "did you mean 'gpt-tiny'?"),
        ("--seq-len 300", "--seq-len 300 exceeds the 256 positions"),
        ("--rows 0", "--rows is 0"),
        ("--repeats 0", "--repeats is 0"),
        ("--threads 0", "--threads is 0"),
        ("--dtype fp8", "unknown --dtype 'fp8'"),
        ("--batch-size 3 --rows 2", "--batch-size 3 cannot be cut into micro-batches of 2"),
        ("--batch-size 8;16", "'8;16' is not a list of integers"),
        ("--schedules packi", "did you mean 'paci'?"),
        ("--policies stach", "did you mean 'stash'?"),
        ("--memory-limit 8G", "'8G' is not a size above 0: write 8GiB"),
        ("--memory-limit 1GB,2GB,3GB", "3 memory limits for 2 stages"),
        ("--hop-ms -1", "--hop-ms: '-1' is not a time of at least 0 milliseconds"),
        ("--bandwidth 0", "'0' is not a size above 0"),
        ("--transport shn", "unknown --transport 'shn': did you mean 'shm'? choose from auto, local, gloo"),
        ("--transport local --measure-link", "--transport local has one: leave one of them out"),
        ("--drift-limit -1", "drift limit is -1"),
        ("--device-speeds 1,0", "device speed 0"),
        ("--slack -1", "slack is -1"),
        ("--json /proc/nowhere.json", "--json /proc/nowhere.json cannot be written"),
        ("--profile /proc/nowhere.json", "--profile /proc/nowhere.json cannot be written"),
        ("--profile .", "profile . cannot be read"),
    ],
)
def test_bad_values_end_in_one_line_before_anything_is_measured(capsys, monkeypatch, argv, words):
    monkeypatch.setattr(gpt_blocks, "profile_gpt", lambda *args, **kwargs: pytest.fail("measured"))
    assert words in refused(capsys, ["plan", "--json", "plan.json", *argv.split()])


def test_limits_that_nothing_keeps(capsys):
    argv = [*QUICK, "--memory-limit", "1MiB", "--profile", "tiny.json", "--json", "plan.json"]
    line = refused(capsys, argv)
    assert re.search(r"no schedule fits into the memory: the least that any needs is [0-9.]+ MiB .*, by \S+ with", line)


def test_profiles_of_something_else(capsys, stored):
    line = refused(capsys, ["plan", "--profile", stored, "--rows", "4"])
    assert "--rows is 4, but profile.json was measured with 1" in line
    data = json.loads(Path(stored).read_text())
    del data["blocks"][3]
    Path(stored).write_text(json.dumps(data))
    assert "blocks has 7 with role middle, but gpt-tiny has 8" in refused(capsys, ["plan", "--profile", stored])
    data["profiled"]["rows"] = "two"
    Path(stored).write_text(json.dumps(data))
    assert "profiled.rows is 'two'" in refused(capsys, ["plan", "--profile", stored])
    data["blocks"][2]["forward_s"] = -1
    Path(stored).write_text(json.dumps(data))
    assert "blocks[2].forward_s is -1" in refused(capsys, ["plan", "--profile", stored])
