"""``paci-rt train --config FILE --recipe NAME``: four layers of options, saved as they were resolved."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from paci_rt import cli, schedules
from paci_rt.cli import layers
from paci_rt.cli.app import parse
from paci_rt.train import config_file
from paci_rt.train.config import TrainConfig
from paci_rt.train.recipes import RECIPES

SMALL = {"steps": 3, "batch_size": 2, "accumulation": 2, "seq_len": 16, "eval_batches": 1, "transport": "local"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question. " * 200)


def written(text: str, **options: Any) -> str:
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    Path("run.toml").write_text("\n".join([*lines, text]) + "\n")
    return "run.toml"


def resolved(*argv: str) -> TrainConfig:
    return layers.resolved(parse(["train", *argv]), beneath={}, more={})


def test_the_command_line_goes_over_the_file_over_the_recipe_over_the_defaults() -> None:
    file = written('recipe = "gpt2"\nlr = 0.5\nseed = 3\nsteps = 10\ndevice = "cpu"')
    config = resolved("--config", file, "--seed", "4")
    assert (config.seed, config.lr, config.steps) == (4, 0.5, 10)
    assert (config.model, config.weight_decay) == ("gpt2", RECIPES["gpt2"]["weight_decay"])
    assert (config.momentum, config.warmup_steps) == (TrainConfig().momentum, 0)
    other = resolved("--config", file, "--recipe", "gpt2-medium-owt")
    assert (other.model, other.lr, other.stages) == ("gpt2-medium", 0.5, 8)


def test_default_takes_an_option_back() -> None:
    file = written('clip_grad_norm = "default"\ndevice = "cpu"')
    assert resolved("--recipe", "gpt2", "--device", "cpu").clip_grad_norm == 1.0
    assert resolved("--recipe", "gpt2", "--config", file).clip_grad_norm is None
    assert resolved("--recipe", "gpt2", "--device", "cpu", "--clip-grad-norm", "default").clip_grad_norm is None
    assert resolved("--config", written("lr = 1.0"), "--lr", "default").lr == TrainConfig().lr
    assert resolved("--config", written('recipe = "gpt2"'), "--recipe", "default").model == "gpt-tiny"


EVERY_KIND = (
    {"slack": (1, 0), "partition": (3, 5), "clip_grad_norm": 0.1 + 0.2, "lookahead": False, "beta1": 0.0},
    {"schedule": "zb-2p", "step_costs": schedules.StepCosts((1 / 3,), (2.0, 1e-7), (1.0,), 0.1), "seed": 2**63 - 1},
    {"data": 'a "b"\\c\n\t\x7f\x01 é 漢 😀.txt', "lr": 1e-5, "weight_decay": 1e22, "gather_checkpoints": True},
    {"schedule": "interleaved-1f1b", "stages": 4, "out": "run", "save_interval": 5, "warmup_steps": 3},
)


@pytest.mark.parametrize("options", EVERY_KIND)
def test_a_saved_file_gives_the_same_configuration(options: dict[str, Any]) -> None:
    config = TrainConfig(**options)
    path = config_file.save(config, ".")
    assert resolved("--config", str(path)) == config
    assert set(config_file.read(path)["derived"]) == set(config.derived)


def test_what_followed_from_the_others_is_found_anew_once_something_changes() -> None:
    path = str(config_file.save(TrainConfig(steps=100, lr_steps=80), "."))
    assert resolved("--config", path).warmup_steps == 16
    longer = resolved("--config", path, "--steps", "1000")
    assert (longer.lr_steps, longer.warmup_steps, longer.eval_interval) == (80, 16, 100)
    assert resolved("--config", path, "--stages", "4").partition == (2, 2, 2, 2)
    assert resolved("--config", path, "--schedule", "1f1b", "--lr", "1").min_lr == 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step = 3", "run.toml: step = 3 is no option: did you mean 'steps'?"),
        ("batch-size = 3", "batch-size = 3 is no option: did you mean 'batch_size'?"),
        ("zzzz = 3", "run.toml: zzzz = 3 is no option: see paci-rt train --help"),
        ('steps = "3"', "run.toml: steps is '3', a string: write an integer, such as steps = 8"),
        ("steps = 3.0", "steps is 3.0, a number: write an integer"),
        ("lr = true", "lr is true, a boolean: write a finite number"),
        ("lr = nan", "lr is nan, a number: write a finite number"),
        ("gather_checkpoints = 1", "gather_checkpoints is 1, an integer: write true or false"),
        ("data = 1979-05-27", "data is datetime.date(1979, 5, 27), a date: write a string"),
        ("partition = 4", "partition is 4, an integer: write a list of integers, such as partition = [4, 4]"),
        ("partition = [4, 4.5]", "partition is [4, 4.5], a list"),
        ("slack = [1, true]", "slack is [1, True], a list: write an integer, a list of them or auto"),
        ('step_costs = "fast"', "step_costs is 'fast', a string: write a string of times"),
        ("steps = 3\nsteps = 4", "run.toml: steps stands there twice, the second time as 'steps = 4': leave one"),
        ("steps =", "run.toml is not TOML: Invalid value (at line 1, column 8), in 'steps ='"),
        ("[train]\nsteps = 3", "train is a table with steps: tables mean nothing here"),
        ("optimizer.lr = 3", "optimizer is a table with lr: tables mean nothing here"),
        ("lr = {x = 1}", "lr is a table with x"),
        ("[[steps]]\na = 1", "steps is [{'a': 1}], a list: write an integer"),
        ("steps = 0", "--config run.toml (steps): --steps is 0: give an integer of at least 1"),
        ("stages = 9", "--config run.toml (stages): 9 stages, but gpt-tiny has only 8 blocks"),
        ('schedule = "pacy"', "--config run.toml (schedule): unknown schedule 'pacy': did you mean 'paci'?"),
        ('json = "x"', "json is for the command line alone: leave it out of the file, and give --json"),
        ("trace = true", "trace is for the command line alone: leave it out of the file, and give --save-trace"),
        ('recipe = "gpt3"', "--config run.toml: unknown --recipe 'gpt3': did you mean 'gpt2'?"),
        ("recipe = 2", "recipe is 2, an integer"),
        ('derived = ["x"]', "derived is ['x']: leave it as the run saved it"),
        (f"seed = {'9' * 5000}", "run.toml"),
        (f"slack = {'[' * 5000}", "run.toml is not TOML"),
        (f"{'x' * 3000} = 1\n" * 2, "xxx stands there twice, the second time as 'xxx"),
    ],
)
def test_bad_files_end_in_one_line(capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    before = sorted([*os.listdir(), "run.toml"])
    assert cli.main(["train", "--config", written(text)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"paci-rt: error: --config run.toml[^\n]*\n", err), err
    assert words in err
    assert sorted(os.listdir()) == before


def test_an_option_twice_where_the_file_ends(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_bytes(b"steps = 3\nsteps = 4")  # no newline
    assert cli.main(["train", "--config", "run.toml"]) == 2
    assert "steps stands there twice, the second time as 'steps = 4': leave one" in capsys.readouterr().err


def test_files_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("latin.toml").write_bytes(b'data = "\xe9"')
    Path("large.toml").write_bytes(b"#" * (2 << 20))
    os.mkfifo("pipe")
    for name, words in (
        (".", "is a folder: name a file"),
        ("nowhere.toml", "does not exist"),
        ("pipe", "is no plain file"),
        ("/dev/zero", "is no plain file"),
        ("latin.toml", "is not UTF-8 text (byte 8)"),
        ("large.toml", "too many for options"),
    ):
        assert cli.main(["train", "--config", name]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["train", "--recipe", "gpt2-medum"]) == 2
    assert "unknown --recipe 'gpt2-medum': did you mean 'gpt2-medium-owt'?" in capsys.readouterr().err


def test_who_is_blamed(capsys: pytest.CaptureFixture[str]) -> None:
    """The file where the value is, and nobody where the command line has it."""
    file = written("batch_size = 6")
    assert cli.main(["train", "--config", file, "--accumulation", "4"]) == 2
    assert "error: --config run.toml (batch_size): --batch-size 6 cannot be cut" in capsys.readouterr().err
    assert cli.main(["train", "--config", file, "--steps", "0"]) == 2
    assert "error: --steps is 0: give" in capsys.readouterr().err
    assert cli.main(["train", "--recipe", "gpt2", "--batch-size", "3", "--device", "cpu"]) == 2
    assert "error: --recipe gpt2 (accumulation): --batch-size 3 cannot be cut" in capsys.readouterr().err


def test_a_run_saves_its_options_and_they_give_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    file = written("", **SMALL, data="text.txt", out="one")
    assert cli.main(["train", "--config", file, "--lr", "0.002", "--json", "one.json"]) == 0
    saved = config_file.read("one/config.toml")
    assert (saved["lr"], saved["warmup_steps"], saved["partition"]) == (0.002, 0, (4, 4))
    assert cli.main(["train", "--config", "one/config.toml", "--out", "two", "--json", "two.json"]) == 0
    capsys.readouterr()
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert one["params_sha256"] == two["params_sha256"]
    assert {**two["config"], "out": "one"} == one["config"]


def test_what_no_file_can_hold_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "text.txt", "--out", os.fsdecode(b"\xff")]) == 2
    assert "is no Unicode text, which config.toml in --out needs: rename it" in capsys.readouterr().err
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    """Each one is a run that can be made, of as many tokens as it says, with the published warm-up and end."""
    config = resolved("--recipe", name, "--device", "cpu")
    assert config.warmup_steps == int(0.01 * config.steps)
    assert config.min_lr == config.lr / 10
    assert (config.optimizer, config.beta1, config.beta2, config.weight_decay) == ("adamw", 0.9, 0.95, 0.1)
    assert (config.dtype, config.schedule) == ("bf16", "paci")


def test_the_recipe_of_the_paper() -> None:
    config = resolved("--recipe", "gpt2-medium-owt", "--device", "cpu")
    assert (config.model, config.stages, config.seq_len, config.batch_size) == ("gpt2-medium", 8, 1024, 128)
    assert config.steps * config.tokens_per_window == pytest.approx(50e9, rel=1e-4)
    assert config.clip_grad_norm is None


def test_warm_up_is_a_twentieth_or_what_the_second_moment_needs() -> None:
    for steps in (1, 4, 5, 60, 199):
        assert TrainConfig(steps=steps).warmup_steps == steps // 5
    for steps in (200, 400, 800):
        assert TrainConfig(steps=steps).warmup_steps == 40  # 2 / (1 - 0.95)
    for steps in (801, 10**6, 381_470):
        assert TrainConfig(steps=steps).warmup_steps == steps // 20
    assert TrainConfig(steps=4000, beta2=0.999).warmup_steps == 800
    assert TrainConfig(steps=50_000, beta2=0.999).warmup_steps == 2500
    assert TrainConfig(steps=200, beta2=0.0).warmup_steps == 10
    for optimizer in ("sgd", "torch-sgd", "lion"):
        assert TrainConfig(steps=200, optimizer=optimizer).warmup_steps == 10
    assert TrainConfig(steps=200, warmup_share=0.05).warmup_steps == 10
    assert TrainConfig(steps=200, warmup_share=0.5, warmup_steps=3).warmup_steps == 3


@pytest.mark.parametrize("name", ["gpt2-medium-owt", "llama-1b", "encoder"])
def test_a_recipe_runs_made_small(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--layers",
        "2",
        "--width",
        "32",
        "--heads",
        "2",
        "--vocab-size",
        "300",
        "--stages",
        "2",
        "--device",
        "cpu",
    ]
    small += ["--seq-len", "16", "--batch-size", "4", "--accumulation", "2", "--steps", "3", "--transport", "local"]
    small += ["--device", "cpu", "--eval-batches", "1", "--json", "result.json"]
    assert cli.main(["train", "--recipe", name, "--data", "text.txt", *small]) == 0
    capsys.readouterr()
    found = json.loads(Path("result.json").read_text())
    assert (found["config"]["dtype"], found["config"]["warmup_steps"], found["steps"]) == ("bf16", 0, 3)
    assert found["config"]["beta2"] == 0.95


def test_a_recipe_without_data_says_what_it_trains_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paci_rt.train import run

    monkeypatch.setattr(run, "execute", lambda config, on_report: None)
    assert cli.main(["train", "--recipe", "gpt2", "--device", "cpu"]) == 0
    assert "--recipe gpt2 has no data: without --data the bytes of Python's own library" in capsys.readouterr().err
    assert cli.main(["train", "--recipe", "gpt2", "--device", "cpu", "--data", "text.txt"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("min_lr = 0.0001", "min_lr = 0.0005", "min_lr is 0.0005, but 0.0001 follows from the other options"),
        ("steps = 100\nb", "steps = 1000\nb", "lr_steps is 100, but 1000 follows from the other options"),
        ("partition = [4, 4]", "partition = [5, 3]", "partition is (5, 3), but (4, 4) follows"),
        ("lookahead = true", "lookahead = false", "lookahead is False, but True follows"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--out", "b")])
def test_a_saved_file_that_was_edited_is_never_taken_by_halves(
    capsys: pytest.CaptureFixture[str], old: str, new: str, words: str, more: tuple[str, ...]
) -> None:
    """What followed from other options is found anew once the command line changes any: an edit would be lost."""
    path = config_file.save(TrainConfig(steps=100), ".")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert cli.main(["train", "--config", str(path), *more]) == 2
    err = capsys.readouterr().err
    assert words in err and "take its name out of derived to keep it" in err and err.count("\n") == 1
    name = words.split()[0]
    path.write_text(re.sub(rf'"{name}"(, )?', "", text.replace(old, new), count=1))
    if "steps" not in name:
        assert f"{name} = {new.split(' = ')[1]}" in config_file.text_of(resolved("--config", str(path), *more))


def test_an_option_of_the_command_line_goes_over_an_edited_one() -> None:
    path = config_file.save(TrainConfig(steps=100), ".")
    path.write_text(path.read_text().replace("min_lr = 0.0001", "min_lr = 0.0005"))
    assert resolved("--config", str(path), "--min-lr", "0.0002").min_lr == 0.0002
