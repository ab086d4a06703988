"""Checks of single options of :class:`paci_rt.train.config.TrainConfig`."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from paci_rt.schedules import ScheduleFamily, Shape, policies
from paci_rt.wording import shown, unknown

KEEP_WEIGHTS = ("stash", "2bw")
"""Policies under which a backward has the weights of its forward."""

FORESEEN = ("adamw", "sgd", "torch-adamw", "torch-sgd")
"""Optimizers whose next steps policy ``predict`` can tell."""


def flag_of(name: str) -> str:
    """``--batch-size`` of ``batch_size``."""
    return "--" + name.replace("_", "-")


def check_known(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError for a name that is not one of ``choices``."""
    if value not in choices:
        raise unknown(flag, value, choices)


def plain(value: Any) -> Any:
    """A number, text or path of another class, such as ``numpy.float64``, ``Path`` or an ``Enum`` with values of
    ``str``, as Python's own; files could not hold it otherwise."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(plain(one) for one in value)
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str.__str__(value) if isinstance(value, str) else value  # str() of an Enum would give its name


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


def lookahead_of(config: Any, family: ScheduleFamily) -> bool:
    """Whether forwards look ahead: as asked, by default where schedule, policy and optimizer can.

    Raises:
        ValueError: it was asked for, and the policy or the optimizer cannot.
    """
    still = config.optimizer == "sgd" and config.momentum == 0
    torchs = config.optimizer.startswith("torch-")
    if config.lookahead and torchs:
        raise ValueError(
            f"--lookahead with --optimizer {config.optimizer}: only paci_rt's own optimizers tell where they are "
            f"going; use --optimizer {config.optimizer.removeprefix('torch-')}"
        )
    if config.lookahead and still:
        raise ValueError("--lookahead with --momentum 0: nothing tells where sgd is going; use a momentum above 0")
    ahead = policies.looks_ahead(family, config.policy or "", config.lookahead)
    return ahead and not torchs and not still


def check_predict(config: Any, family: ScheduleFamily, shape: Shape) -> None:
    """Raise ValueError for policy ``predict`` with an optimizer whose next steps do not follow from its momentum."""
    late = (policies.bounds("predict", family, shape, rank)[1] for rank in range(shape.ranks))
    if config.policy != "predict" or not any(late):
        return
    if config.optimizer not in FORESEEN:
        raise ValueError(
            f"--policy predict with --optimizer {config.optimizer}, whose next steps do not follow from its momentum: "
            f"use {', '.join(FORESEEN)}, or another policy"
        )
    if config.optimizer.endswith("sgd") and config.momentum == 0:
        raise ValueError(
            f"--policy predict with --optimizer {config.optimizer} and --momentum 0: nothing tells where it is going; "
            "use a momentum above 0, or another policy"
        )


def check_tied(config: Any, family: ScheduleFamily) -> None:
    """Raise ValueError where the embedding's copy at the head could not be the one that a policy wants."""
    places = config.places
    if not config.shape.tied or places.num_stages == 1 or config.policy not in KEEP_WEIGHTS:
        return
    if config.policy == "2bw":
        raise ValueError(
            f"--policy 2bw of {family.name} with tied embeddings: the head's copy has one version, not two; use "
            "--no-tied, or another policy or schedule such as paci"
        )
    if places.chunks > 1 and places.rank_of(0) == places.last_rank:
        raise ValueError(
            f"--policy stash under {family.name} with tied embeddings: the last stage has several micro-batches in "
            "flight, and the head's copy one version; use --no-tied, or --policy bounded"
        )


def check_recompute_blocks(config: Any, family: ScheduleFamily, shape: Shape) -> None:
    """Raise ValueError where blocks would run again at other weights than their forward had, without a word of it."""
    if not config.recompute_blocks or not any(family.drift_bound(shape, rank) for rank in range(shape.ranks)):
        return
    if config.policy not in (*KEEP_WEIGHTS, "recompute"):
        known = [name for name in ("recompute", *KEEP_WEIGHTS) if name in family.policies]
        raise ValueError(
            f"--recompute-blocks under {family.name} with --policy {config.policy}: weights change between a forward "
            f"and its backward, so that blocks would run again at other ones; "
            + (f"use --policy {' or '.join(known)}" if known else "leave it out, or use a schedule that flushes")
        )
