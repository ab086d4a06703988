"""Checks of single options of :class:`paci_rt.train.config.TrainConfig`."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from paci_rt.wording import shown, unknown


def flag_of(name: str) -> str:
    """``--batch-size`` of ``batch_size``."""
    return "--" + name.replace("_", "-")


def check_known(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError for a name that is not one of ``choices``."""
    if value not in choices:
        raise unknown(flag, value, choices)


def check_text(flag: str, value: Any) -> None:
    """Raise ValueError for what is neither None nor a name or path that the system can have."""
    if value is None:
        return
    if not isinstance(value, (str, os.PathLike)) or isinstance(value, bytes):
        raise ValueError(f"{flag} is {shown(value)}: give a name")
    text = os.fspath(value)
    if "\0" in text or not text:
        raise ValueError(f"{flag} is {shown(text)}: a name has characters, and no zero bytes")


def check_switch(flag: str, value: Any) -> None:
    """Raise ValueError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{flag} is {shown(value)}: give True or False")


def check_pieces(stages: int, chunks: int, layers: int, model: str) -> None:
    """Raise ValueError for a model with fewer blocks than there are pieces, of which a process has several."""
    if chunks > 1 and stages * chunks > layers:
        remedy = f"use --stages {layers // chunks}" if layers >= chunks else "use a larger model"
        raise ValueError(
            f"--stages {stages} with {chunks} pieces of the model each: {model} has only {layers} blocks; {remedy}"
        )


def check_dtype(dtype: str, optimizer: str, on_nonfinite: str) -> None:
    """Raise ValueError for what does not go with parameters of ``dtype``."""
    if dtype != "fp32" and optimizer.startswith("torch-"):
        raise ValueError(
            f"--dtype {dtype} with --optimizer {optimizer}: torch's optimizers keep no fp32 masters, so small "
            f"updates would be rounded away; use --optimizer {optimizer.removeprefix('torch-')}"
        )
    if dtype == "fp16" and on_nonfinite != "skip-window":
        raise ValueError(
            f"--dtype fp16 with --on-nonfinite {on_nonfinite}: a loss scale that is too large shows in gradients that "
            "are not finite, whose window all stages must skip; leave --on-nonfinite out"
        )
