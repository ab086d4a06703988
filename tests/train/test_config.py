"""Options of training: what follows from the others, and bad ones."""

from __future__ import annotations

import enum
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import paci_rt
from paci_rt import launch, schedules
from paci_rt.train import config_file
from paci_rt.train.build import build_pipeline, make_optimizer
from paci_rt.train.config import TrainConfig
from paci_rt.train.gpt import build_stage
from support.small_gpt import SMALL


def test_defaults_follow_from_the_other_options() -> None:
    config = TrainConfig()
    assert (config.schedule, config.accumulation, config.seq_len, config.partition) == ("paci", 4, 128, (4, 4))
    assert (config.lr_steps, config.warmup_steps, config.eval_interval) == (200, 40, 20)
    assert config.min_lr == pytest.approx(1e-4)
    assert TrainConfig(schedule="ASYNC-1F1B").accumulation == 1
    assert TrainConfig(model="gpt2").seq_len == 128
    assert TrainConfig(warmup_steps=0, steps=5).lr_factor(0) == 1.0


class Name(str, enum.Enum):
    PACI = "paci"


class Count(enum.IntEnum):
    THREE = 3


def test_numbers_and_names_of_other_classes_are_as_pythons_own_and_go_through_a_file(tmp_path: Path) -> None:
    others: dict[str, Any] = {
        "schedule": Name.PACI,
        "stages": Count.THREE,
        "slack": (Count.THREE, 1, 0),
        "lr": np.float64(2e-3),
        "min_lr": np.float64(2e-4),
        "data": np.str_("text.txt"),
        "out": Path("runs/a"),
    }
    owns = {
        "schedule": "paci",
        "stages": 3,
        "slack": (3, 1, 0),
        "lr": 2e-3,
        "min_lr": 2e-4,
        "data": "text.txt",
        "out": "runs/a",
    }
    config = TrainConfig(**others)
    assert config == TrainConfig(**owns)
    assert {name: type(getattr(config, name)) for name in owns} == {name: type(one) for name, one in owns.items()}
    file = tmp_path / "config.toml"
    file.write_text(config_file.text_of(config))
    read = config_file.read(file)
    assert set(read.pop("derived")) == set(config.derived)
    assert TrainConfig(**read) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", np.float32(1e-3)),
        ("lr", torch.tensor(1e-3)),
        ("lr", np.float64("nan")),
        ("stages", np.int64(2)),
        ("stages", True),
        ("trace", np.bool_(True)),
        ("slack", np.array([1, 0])),
        ("slack", (np.int64(1), 0)),
        ("partition", np.array([4, 4])),
    ],
)
def test_what_files_cannot_hold_is_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^--{name} is [^\n]*give [^\n]*$"):
        TrainConfig(**{name: value})


def test_options_follow_the_optimizer() -> None:
    betas = {kind: TrainConfig(optimizer=kind).beta2 for kind in ("adamw", "nadam", "lion", "muon")}
    assert betas == {"adamw": 0.95, "nadam": 0.95, "lion": 0.99, "muon": 0.95}
    assert (TrainConfig(optimizer="sgd").momentum, TrainConfig(optimizer="muon").momentum) == (0.9, 0.95)
    module = build_stage(SMALL["small"], 0, 1)
    optimizer = make_optimizer(TrainConfig(optimizer="muon", momentum=0.8), module.named_parameters())
    muon = {id(p): group["use_muon"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        in_block = name.startswith("transformer.h.") and name.endswith(".weight") and ".ln_" not in name
        assert muon[id(parameter)] == in_block, name
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_learning_rate_warms_up_and_falls() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=2.0, min_lr=0.5)
    factors = [config.lr_factor(step) for step in range(121)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx((1 + 0.25) / 2)  # halfway down
    assert factors[100] == factors[120] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", paci_rt.AdamW),
        ("nadam", paci_rt.NAdam),
        ("lion", paci_rt.Lion),
        ("muon", paci_rt.Muon),
        ("sgd", paci_rt.SGD),
        ("torch-adamw", torch.optim.AdamW),
        ("torch-sgd", torch.optim.SGD),
    ],
)
def test_only_matrices_decay(name: str, kind: type) -> None:
    module = build_stage(SMALL["small"], 0, 1)
    optimizer = make_optimizer(TrainConfig(optimizer=name, weight_decay=0.25), module.named_parameters())
    assert isinstance(optimizer, kind)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names: Iterator[tuple[str, Tensor]] = module.named_parameters()
    for parameter_name, parameter in names:
        plain = parameter_name.endswith(".bias") or ".ln_" in parameter_name
        assert decay[id(parameter)] == (0.0 if plain else 0.25), parameter_name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "pacy"}, "unknown schedule 'pacy': did you mean 'paci'"),
        ({"model": "gpt-tinny"}, "unknown --model 'gpt-tinny': did you mean 'gpt-tiny'"),
        ({"optimizer": "adam"}, "unknown --optimizer 'adam': did you mean 'adamw'"),
        ({"dtype": "fp8"}, "unknown --dtype 'fp8'"),
        ({"transport": "tcp"}, "unknown --transport 'tcp'"),
        ({"device": "cuda"}, "--device cuda: .*use --device cpu"),
        ({"accumulation": 0}, "--accumulation is 0: give an integer of at least 1"),
        ({"accumulation": -3}, "--accumulation is -3"),
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 1.5}, "--steps is 1.5"),
        ({"seed": -1}, "--seed is -1: give an integer of at least 0"),
        ({"seed": 2**63}, "--seed is .*at most"),
        ({"port": 70000}, "--port is 70000"),
        ({"stages": 9}, "9 stages, but gpt-tiny has only 8 blocks"),
        ({"stages": 0}, "--stages is 0"),
        ({"partition": (1, 2)}, "--partition 1,2 .*8 of gpt-tiny; for example 4,4"),
        ({"batch_size": 6}, "--batch-size 6 cannot be cut into 4 equal micro-batches; .*such as 8"),
        ({"seq_len": 257}, "--seq-len 257 exceeds the 256 positions"),
        ({"schedule": "1f1b", "slack": 1}, "--slack is 1: 1f1b takes no slack"),
        ({"slack": -1}, "--slack is -1: give an integer of at least 0"),
        ({"slack": (1, 1, 0)}, "--slack is 1,1,0, which is for 3 stages, and there are 2"),
        ({"slack": "auto"}, "--slack auto needs to know"),
        ({"schedule": "async-1f1b", "accumulation": 4}, "--accumulation is 4: async-1f1b .*--accumulation 1"),
        ({"dtype": "bf16", "optimizer": "torch-sgd"}, "no fp32 masters.*use --optimizer sgd"),
        ({"dtype": "fp16", "optimizer": "torch-adamw"}, "no fp32 masters.*use --optimizer adamw"),
        ({"dtype": "fp16", "on_nonfinite": "raise"}, "--dtype fp16 with --on-nonfinite raise.*leave"),
        ({"dtype": "fp16", "on_nonfinite": "skip-local"}, "--dtype fp16 with --on-nonfinite skip-local.*leave"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"beta2": 1.0}, "--beta2 is 1.0: give a number below 1"),
        ({"buffers": 3}, "--buffers is 3: give 1 or 2"),
        ({"log": b"x"}, "--log is b'x': give a name"),
        ({"wandb": 1}, "--wandb is 1: give True or False"),
        ({"warmup_share": 1.0}, "--warmup-share is 1.0: give a number below 1"),
        ({"save_interval": 5}, "--save-interval 5 needs a folder.*--out DIR"),
    ],
)
def test_bad_options_name_value_and_remedy(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


@pytest.mark.parametrize("schedule", list(schedules.FAMILIES))
def test_what_options_accept_can_be_built(schedule: str) -> None:
    """What a pipeline refuses is refused with the options, in one line, before any process is started."""
    family, built = schedules.get(schedule), 0
    small: dict[str, Any] = {"layers": 8, "width": 8, "heads": 2, "seq_len": 8, "transport": "local", "steps": 1}
    optimizers = (("adamw", True), *((name, False) for name in ("adamw", "nadam", "torch-sgd", "muon")))
    for policy, (optimizer, tied) in itertools.product(family.policies, optimizers):
        more: dict[str, Any] = {"momentum": 0.0} if optimizer == "torch-sgd" else {}
        try:
            config = TrainConfig(
                **small, **more, schedule=schedule, stages=2, policy=policy, optimizer=optimizer, tied=tied
            )
        except ValueError:
            continue
        pipeline, _ = build_pipeline(config, launch.Context(local=True))
        pipeline.close()
        built += 1
    assert built >= 4  # of at least 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "predict", "optimizer": "nadam"}, "--policy predict with --optimizer nadam, whose next steps"),
        ({"policy": "predict", "optimizer": "torch-sgd", "momentum": 0.0}, "torch-sgd and --momentum 0: nothing tells"),
        ({"schedule": "pipedream-2bw", "tied": True}, "--policy 2bw of pipedream-2bw with tied embeddings"),
        ({"schedule": "paci-v", "policy": "stash", "tied": True}, "--policy stash under paci-v with tied embeddings"),
    ],
)
def test_policies_that_cannot_be_kept_are_refused_with_the_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        TrainConfig(**options)
