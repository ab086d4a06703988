"""What the fuzz has found, one plain case for each kind, with what is said instead."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import cli, plan_slack, schedules
from paci_rt.action import Action
from paci_rt.planner import BlockProfile, Profile, parse_profile, plan
from paci_rt.simulate import Costs, simulate
from paci_rt.train.config import TrainConfig
from support.deadlines import deadline

HUGE = [2**31, 2**54, 2**63, 10**400]
BLOCK = BlockProfile(
    name="block", role="middle", forward_s=0.01, input_grad_s=0.01, weight_grad_s=0.005,
    parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
)  # fmt: skip
UNIT = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))


def local(modules: Any = None, **options: Any) -> Any:
    modules = [nn.Linear(3, 3)] if modules is None else modules
    given = {"n_microbatches": 2, "loss_fn": nn.MSELoss(), "optimizer": paci_rt.SGD, **options}
    return paci_rt.LocalPipeline(modules, **given)


# ------------------------------------------------------------------------------------------- sizes have limits


@pytest.mark.parametrize("value", HUGE)
def test_numbers_that_would_grow_without_end_are_refused(value: int) -> None:
    for call, said in (
        (lambda: schedules.Shape(num_stages=2, accumulation=value), "accumulation is .*: give at most 1,048,576"),
        (lambda: schedules.Shape(num_stages=value, accumulation=2), "num_stages is .*: give at most"),
        (lambda: schedules.Shape(num_stages=2, accumulation=2, slack=value), "slack is .*: give at most 1,048,576"),
        (lambda: schedules.Shape(num_stages=2, accumulation=2, slack=(value, 0)), "slack is .*: give at most"),
        (lambda: local(n_microbatches=value), "n_microbatches is .*: give at most 1,048,576"),
        (lambda: local(slack=value), "slack is .*: give at most 1,048,576"),
        (lambda: TrainConfig(accumulation=value), "--accumulation is .*: give at most"),
        (lambda: TrainConfig(steps=value * 2**30), "--steps is .*: give at most"),
        (lambda: TrainConfig(slack=value), "--slack is .*: give at most"),
        (lambda: simulate(schedules.get("1f1b"), schedules.Shape(num_stages=2, accumulation=2), UNIT, windows=value),
         "windows is .*: give at most"),
        (lambda: plan(Profile(blocks=(BLOCK,) * 4), stages=2, accumulations=[value]), "accumulation is .*: give"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()


def test_a_schedule_that_would_take_for_ever_to_check_is_refused() -> None:
    with pytest.raises(ValueError, match="checked over at most 2,000,000 actions"):
        local(n_microbatches=1 << 20)
    with pytest.raises(ValueError, match="searched schedule is computed for at most 50,000 actions"):
        local(schedule="zb-1p", n_microbatches=100_000)
    with pytest.raises(ValueError, match="simulate plays at most 100,000,000 actions"):
        simulate(schedules.get("paci"), schedules.Shape(num_stages=1000, accumulation=1 << 20), UNIT)
    with pytest.raises(ValueError, match="slack is planned for at most 4,096"):
        plan_slack([1.0] * 5000, [0.0] * 4999)


@pytest.mark.parametrize("value", [1e308, math.inf, math.nan, -1.0, 1e10])
def test_times_that_no_sum_can_hold_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"forward_s.* is .*: give a finite number"):
        Costs(forward_s=(value,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    with pytest.raises(ValueError, match=r"costs.hop is .*: give a finite number"):
        schedules.StepCosts(hop=value).per_stage(2)
    with pytest.raises(ValueError, match=r"stage_times has .*: give times"):
        plan_slack([value, 1.0], [0.0])


def test_slack_for_links_that_no_slack_hides_is_refused() -> None:
    with pytest.raises(ValueError, match="no slack hides that"):
        plan_slack([5e-324, 5e-324], [1.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("simulate --input-grad 1e308", "--input-grad is 1e+308: give a finite number of at least 0 and at most 1e+12"),
        ("simulate --slack 2147483648", "--slack is 2,147,483,648: give at most 1,048,576"),
        ("simulate --stages 1000000", "--stages is 1,000,000: give at most 131,072"),
        ("simulate --micro-batches 2147483648", "--micro-batches is 2,147,483,648: give at most 1,048,576"),
        ("simulate --windows 100000000", "--windows is 100,000,000: give at most 10,000,000"),
        ("simulate --bandwidth 5e-324", "--bandwidth is 4.94066e-324: give a number above 0, at least 0.001"),
        ("simulate --noise 1e300", "--noise is 1e+300: give a finite number of at least 0 and at most 10"),
        ("simulate --plot no/such/folder/out.json", "--plot no/such/folder/out.json is no picture"),
        ("simulate --plot picture", "--plot picture is no picture: let the name end in .png, .pdf, .svg"),
        ("train --stages 1000000", "give at most 131,072"),
        ("train --batch-size 2147483648", "--batch-size is 2,147,483,648: give at most 1,048,576"),
        ("train --device cuda:٣", "--device cuda:٣: give cpu, cuda, cuda:N or auto"),
        ("plan --stages 1000000", "give at most 131,072"),
    ],
)
def test_commands_name_the_limit_in_one_line(
    options: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ one line of any value


@pytest.mark.parametrize("text", ["a\nb", "\0", "x" * 5000, "\ud800", "\x1b[31m"])
def test_names_with_anything_in_them_are_shown_on_one_short_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["train", "--schedule", text],
        ["train", "--data", text],
        [f"--{text}"],
        ["simulate", f"--x{text}"],
        [text],
    ):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and len(err) < 1500 and "\0" not in err and "\x1b" not in err
    for call in (lambda: schedules.get(text), lambda: Action.parse(text), lambda: TrainConfig(model=text)):
        with pytest.raises(ValueError, match=r"unknown|is no action") as caught:
            call()
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, 3, ["cpu"], {"a": 1}, np.zeros(3), object()])
def test_configurations_refuse_what_is_no_name(value: Any) -> None:
    for name in ("schedule", "model", "optimizer", "dtype", "transport", "device", "data", "policy", "out"):
        with pytest.raises(ValueError, match=f"--{name} is .*: give a name"):
            TrainConfig(**{name: value})


# --------------------------------------------------------------------------------------- arguments of the pipeline


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": np.zeros(3)}, "policy is"),
        ({"policy": 3}, "policy is 3"),
        ({"lookahead": "yes"}, "lookahead is 'yes'"),
        ({"chunks": ""}, "chunks is ''"),
        ({"chunks": True}, "chunks is True"),
        ({"costs": (1, 2, 3)}, r"costs is \(1, 2, 3\)"),
        ({"buffers": True}, "buffers is True"),
        ({"buffers": np.ones(2)}, "buffers is"),
        ({"tied_weights": "weight"}, "tied_weights is 'weight'"),
        ({"tied_weights": True}, "tied_weights is True"),
        ({"tied_weights": ["weight"]}, "tied_weights has 'weight'"),
        (
            {"tied_weights": [paci_rt.TiedWeight(owner_stage="0", owner="a", reader_stage=1, reader="b")]},
            "tied weight with",
        ),
        ({"optimizer": ["adam"]}, "optimizer is 'adam'"),
        ({"optimizer": 3}, "optimizer is 3"),
        ({"loss_fn": "mse"}, "loss_fn is 'mse'"),
        ({"scale_grads": None}, "scale_grads is None"),
        ({"schedule": 3}, "schedule is 3"),
        ({"device": True}, "device is True"),
        ({"device": ""}, "device is ''"),
        ({"device": "xyz"}, "device is 'xyz'"),
        ({"slack": math.nan}, "slack is nan"),
    ],
)
def test_pipelines_refuse_arguments_of_other_types(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        local(**options)


def test_modules_and_stages_are_what_they_should_be() -> None:
    for modules in ("linear", 3, None, nn.Linear(3, 3)):
        with pytest.raises((ValueError, paci_rt.PaciError), match="modules"):
            paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.SGD)
    with pytest.raises(paci_rt.PaciError, match=r"modules\[1\] is a bool"):
        local([nn.Linear(3, 3), True])
    for place in ((True, 2), ("0", 2), (0, "2"), (0, 2**40), (0, None), (math.nan, 2)):
        with pytest.raises(ValueError, match=r"stage_index|num_stages"):
            paci_rt.PipelineStage(nn.Linear(3, 3), *place)


@pytest.mark.parametrize("given", [3, "a", [1], {3: 4}])
def test_loss_kwargs_are_keyword_arguments(given: Any) -> None:
    pipeline = local()
    with pytest.raises(TypeError, match="loss_kwargs is"):
        pipeline.step(torch.ones(4, 3), target=torch.ones(4, 3), loss_kwargs=given)
    pipeline.step(torch.ones(4, 3), target=torch.ones(4, 3))  # nothing has run before


def test_sparse_inputs_are_refused_by_name() -> None:
    pipeline = local()
    with pytest.raises(ValueError, match=r"kwargs\['mask'\] is a tensor of layout torch.sparse_coo"):
        pipeline.step(torch.ones(4, 3), target=torch.ones(4, 3), mask=torch.ones(4, 3).to_sparse())


# --------------------------------------------------------------------------------------------- profiles and plans


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("forward_s", 1e300),
        ("forward_s", 10**400),
        ("parameter_bytes", 1e30),
        ("forward_s", math.nan),
        ("forward_s", "1"),
    ],
)
def test_profiles_refuse_numbers_that_no_sum_can_hold(key: str, value: Any) -> None:
    content = Profile(blocks=(BLOCK,)).to_json()
    content["blocks"][0][key] = value
    with pytest.raises(ValueError, match=rf"blocks\[0\].{key} is .*: give a"):
        parse_profile(content)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulations": True}, "accumulation is True: give a list"),
        ({"accumulations": 3}, "accumulation is 3: give a list"),
        ({"accumulations": list(range(1, 100))}, "at most 64"),
        ({"chunks": "2"}, "chunks is '2': give a list"),
        ({"memory_limit_bytes": "1GB"}, "memory limit is '1GB' bytes"),
        ({"memory_limit_bytes": math.nan}, "memory limit is nan bytes"),
        ({"drift_limit": 0.5}, "drift limit is 0.5"),
        ({"delay_limit": [1]}, r"delay limit is \[1\]"),
        ({"device_speeds": 3}, "device speeds are 3"),
        ({"device_speeds": [1e300, 1.0]}, "device speed 1e\\+300"),
        ({"schedules": "paci"}, "schedules is 'paci': give a list of names"),
        ({"policies": [3]}, r"policies is \[3\]: give a list of names"),
        ({"slack": np.zeros(2)}, "slack is"),
    ],
)
def test_plans_refuse_what_they_cannot_choose_from(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(Profile(blocks=(BLOCK,) * 4), **{"stages": 2, "accumulations": [2], **options})


# ---------------------------------------------------------------------------------------------- left-over variables

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def started(variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    return subprocess.run(
        [sys.executable, "-m", "paci_rt", *words],
        env={**clean, **variables},
        capture_output=True,
        text=True,
        timeout=deadline(60),
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "RANK='0' is in the environment without WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE='4' is in the environment without RANK"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x' is in the environment, which is no number"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE='' is in the environment"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "without MASTER_ADDR and MASTER_PORT: torchrun sets all of them; unset"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR=''"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_left_over_variables_of_torchrun_are_said_at_once(variables: dict[str, str], said: str, command: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main([command, "--steps", "1"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_stray_rank_hides_no_error() -> None:
    run = started({"RANK": "3"}, "simulate", "--stages", "0")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "--stages is 0" in run.stderr


def test_a_stray_rank_does_not_make_train_wait() -> None:
    run = started({"RANK": "0", "WORLD_SIZE": "2"}, "train", "--steps", "1")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "unset RANK and WORLD_SIZE to train without torchrun" in run.stderr


def test_the_numbers_of_a_profile_file_are_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(Profile(blocks=(BLOCK,)).to_json()).replace("0.01", "1" + "0" * 400, 1))
    with pytest.raises(ValueError, match=r"forward_s is an integer of 1,\d+ bits: give a number"):
        paci_rt.planner.load_profile(path)
    for content in ("1" * 5000, "[" * 100_000, "{", b"\xff\xfe".decode("latin-1")):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not JSON"):
            paci_rt.planner.load_profile(path)
