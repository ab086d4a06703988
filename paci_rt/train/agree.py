"""What all processes of a training run must have been given alike."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from paci_rt.runtime.agreement import agree, versions
from paci_rt.train.config import TrainConfig
from paci_rt.train.data import Corpus
from paci_rt.transport.rendezvous import Meeting

OWN = frozenset(
    {"data", "out", "resume", "profile", "device", "transport", "transfer_timeout", "threads", "port", "trace"}
    | {"max_restarts", "grace_s", "log", "tensorboard", "wandb"}
)
"""Options that a host may have for itself: paths, places and deadlines. The rest decides the numbers, or what the
processes do together, such as validating."""


def facts_of_run(config: TrainConfig, corpus: Corpus, first_step: int) -> dict[str, Any]:
    """By option its value, JSON-ready, and what paths hold in place of the paths."""
    options = {one.name: getattr(config, one.name) for one in fields(config) if one.name not in OWN}
    return {
        **versions(),
        **{"--" + name.replace("_", "-"): value for name, value in options.items()},
        "the text of --data": corpus.digest(),
        "--out": "a folder" if config.out is not None else None,
        "steps in --resume": first_step,
    }


def agree_on_run(config: TrainConfig, corpus: Corpus, first_step: int) -> None:
    """Compare :func:`facts_of_run` with all processes of the default group.

    Raises:
        DisagreementError: a process was given something else; the message names it, the values and the ranks.
        TransportError: a process did not come in time.
    """
    agree(Meeting(None, config.transfer_timeout, kind="run"), facts_of_run(config, corpus, first_step))
