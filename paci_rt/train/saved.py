"""What a checkpoint of ``paci-rt train`` says about the run that wrote it, and the uncut model in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paci_rt import checkpoint
from paci_rt.errors import CheckpointError
from paci_rt.runtime.checkpoint_files import read_parts
from paci_rt.runtime.checkpoint_index import KINDS, index_file, names_in
from paci_rt.train.config import DTYPES, TrainConfig
from paci_rt.train.families import MODELS, SHAPE_OPTIONS, difference, shape_of
from paci_rt.train.model import ModelShape, parameter_shapes
from paci_rt.train.option_checks import flag_of
from paci_rt.wording import shown

TAKEN = ("batch_size", "accumulation", "seq_len", "eval_batches", "data", "dtype")
"""Options of a run that its evaluation takes over, beside those of the model."""

DECIDE = (
    "data", "seed", "batch_size", "seq_len", "lr", "min_lr", "lr_steps", "warmup_steps", "weight_decay", "beta1",
    "beta2", "momentum", "clip_grad_norm", "on_nonfinite", "skip_spikes",
)  # fmt: skip
"""Options that decide what is trained, whatever the stages and the schedule."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The uncut model of a checkpoint.

    Attributes:
        path: as it was given. steps: local updates behind it.
        options: those that it was trained with.
        module: from int64 tokens ``[batch, seq]`` to logits ``[batch, seq, vocab]``, in evaluation mode.
    """

    path: str
    steps: int
    options: Mapping[str, Any]
    shape: ModelShape
    module: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype


def load_model(path: str | os.PathLike[str]) -> SavedModel:
    """Read the model of a checkpoint on the CPU, without the state of its optimizers.

    Args:
        path: folder of the checkpoint, as ``--out`` named it, or an index in it.

    Raises:
        CheckpointError: none of ``paci-rt train`` there, a damaged one, or one of a model that this version lacks.
    """
    index = checkpoint.verify(path)
    saved = index["extra"].get("config")
    if not isinstance(saved, dict) or saved.get("dtype") not in DTYPES:
        raise CheckpointError(f"{os.fspath(path)}: this checkpoint was not written by paci-rt train")
    shape = saved_shape(path, saved)
    wanted = parameter_shapes(shape)
    stored = set(names_in(index, "params"))
    if stored != set(wanted):
        odd = sorted(stored ^ set(wanted))[0]
        raise CheckpointError(f"{os.fspath(path)} does not fit the model {shape.name}: {odd!r} is in one alone")
    names: dict[str, set[str]] = {kind: set() for kind in KINDS} | {"params": set(wanted)}
    found = read_parts(index_file(path).parent, index, names)["params"]
    wrong = [name for name, size in wanted.items() if found[name].shape != size]
    if wrong:
        raise CheckpointError(
            f"{os.fspath(path)} does not fit the model {shape.name}: {wrong[0]} is {list(found[wrong[0]].shape)}, not "
            f"{list(wanted[wrong[0]])}"
        )
    with torch.device("meta"):
        module = shape.make_stage(range(shape.layers), first=True, last=True)
    module.load_state_dict({name: found[name].clone() for name in wanted}, assign=True)
    module.requires_grad_(False).eval()
    return SavedModel(path=os.fspath(path), steps=int(index["windows"]), options=saved, shape=shape, module=module)


def config_of(model: SavedModel, changes: Mapping[str, Any]) -> TrainConfig:
    """A configuration with the model, data and batches of a run, all in one stage, and ``changes``.

    Raises:
        ValueError: a change that cannot work.
    """
    names = ("model", *SHAPE_OPTIONS, *TAKEN)
    kept = {name: model.options[name] for name in names if model.options.get(name) is not None}
    return TrainConfig(**{**kept, "stages": 1, "schedule": "gpipe", "transport": "local", **changes})


def saved_shape(path: str | os.PathLike[str], saved: Mapping[str, Any]) -> ModelShape:
    """The shape of the model in a checkpoint.

    Args:
        path: of the checkpoint, for messages.
        saved: the options that it was trained with.

    Raises:
        CheckpointError: they name no model that there is.
    """
    model = saved.get("model")
    if not isinstance(model, str) or model not in MODELS:
        raise CheckpointError(f"{path} is a checkpoint of the model {model!r}, which this version does not have")
    try:
        return shape_of(model, saved)
    except ValueError as error:
        raise CheckpointError(f"{path} is a checkpoint of an impossible model: {error}") from None


def changed_options(config: TrainConfig) -> str:
    """In which options that decide numbers a run differs from the one whose checkpoint it resumes; empty in none."""
    saved = checkpoint.read_index(str(config.resume))["extra"]["config"]
    found = []
    for name in DECIDE:
        ours, theirs = (_comparable(name, value) for value in (getattr(config, name), saved.get(name)))
        if name in saved and ours != theirs:
            found.append(f"{_said(name, getattr(config, name))} (it had {_said(name, saved[name])})")
    return ", ".join(found)


def _comparable(name: str, value: Any) -> Any:
    return os.path.realpath(value) if name == "data" and isinstance(value, str) else value


def _said(name: str, value: Any) -> str:
    flag = flag_of(name)
    return f"no {flag}" if value is None else f"{flag} {shown(value, 80)[1:-1] if isinstance(value, str) else value}"


def check_same_shape(config: TrainConfig, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless ``--resume`` has a model of the shape that the options say."""
    theirs = saved_shape(f"--resume {config.resume}", saved)
    name = difference(theirs, config.shape)
    if name is None:
        return
    options = [f"--{one.replace('_', '-')} {saved[one]}" for one in SHAPE_OPTIONS if saved.get(one) is not None]
    remedy = f"use --model {saved['model']} {' '.join(options)}".rstrip()
    if not options:
        remedy = f"use --model {saved['model']} and no other option of its shape"
    raise CheckpointError(
        f"--resume {config.resume} has a model whose {name} is {getattr(theirs, name)}, not "
        f"{getattr(config.shape, name)}; {remedy}"
    )
