"""What a checkpoint of ``paci-rt train`` says about the run that wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from paci_rt.errors import CheckpointError
from paci_rt.train.config import TrainConfig
from paci_rt.train.families import MODELS, SHAPE_OPTIONS, difference, shape_of
from paci_rt.train.model import ModelShape


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
