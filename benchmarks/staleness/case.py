"""What a convergence benchmark runs, as data: a method, and a method on a task with a pipeline, a rate and a seed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

SHAPES = ("cosine", "constant", "drops", "wsd")
DECAY_SHARE = 0.2
"""Of a run under ``wsd``, at its end."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a run trains.

    Attributes:
        schedule, policy, lookahead: as for ``paci_rt.LocalPipeline``.
        optimizer: a name in ``replay.run.OPTIMIZERS``, paci_rt's own or a rival's.
        beta1: first moment's decay, where the optimizer has one.
        rates: learning rates of the stages: ``same``, ``pipemare`` (its T1) or ``delay-scaled``.
        flush_updates: so many first updates are each followed by a drain, which makes them those of 1F1B-flush.
        joined: stages join windows until no delay exceeds one update (``replay.joined``); their learning rate is that
            number of windows to this power times the others'.
        variant: of look-ahead, a name in ``replay.variants``; None is paci_rt's own.
    """

    schedule: str = "paci"
    policy: str | None = None
    lookahead: bool = False
    optimizer: str = "adamw"
    beta1: float = 0.9
    rates: str = "same"
    flush_updates: int = 0
    variant: str | None = None
    joined: float | None = None

    @property
    def flushes(self) -> bool:
        """Whether it is one of the synchronous baselines."""
        return self.schedule == "1f1b"


FLUSH, PACI, AHEAD = Method(schedule="1f1b"), Method(), Method(lookahead=True)
STASH = Method(policy="stash")


def _each(*optimizers: str) -> dict[str, Method]:
    """Flush, PACI and PACI with look-ahead under other optimizers than AdamW."""
    shared = replace(AHEAD, variant="shared")
    kinds = {"flush": FLUSH, "paci": PACI, "look-ahead": AHEAD, "look-ahead shared": shared}
    return {f"{kind} {name}": replace(method, optimizer=name) for name in optimizers for kind, method in kinds.items()}


METHODS: dict[str, Method] = {
    "flush": FLUSH,
    "paci": PACI,
    "look-ahead": AHEAD,
    **_each("nadam", "sgd", "lion", "muon"),
    # Other answers to delay: papers, then ideas of our own.
    "stash": STASH,
    "recompute": Method(policy="recompute"),
    "recompute look-ahead": Method(policy="recompute", lookahead=True),
    "2bw": Method(schedule="pipedream-2bw"),
    "spectrain": Method(policy="predict"),
    "pipemare": Method(rates="pipemare"),
    "async nadam": Method(optimizer="async-nadam"),
    "async nadam stash": replace(STASH, optimizer="async-nadam"),
    "error feedback": Method(optimizer="error-feedback-adamw"),
    "flush error feedback": replace(FLUSH, optimizer="error-feedback-adamw"),
    "error feedback muon": Method(optimizer="error-feedback-muon"),
    "rotated": Method(optimizer="rotated-adamw"),
    "flush rotated": replace(FLUSH, optimizer="rotated-adamw"),
    "delay-scaled rate": Method(rates="delay-scaled"),
    "flush 30 then paci": replace(PACI, flush_updates=30),
    "flush 30 then look-ahead shared": replace(AHEAD, flush_updates=30, variant="shared"),
    "flush beta1 0.95": replace(FLUSH, beta1=0.95),
    "paci beta1 0.95": replace(PACI, beta1=0.95),
    "look-ahead shared beta1 0.95": replace(AHEAD, beta1=0.95, variant="shared"),
    "look-ahead shared beta1 0.98": replace(AHEAD, beta1=0.98, variant="shared"),
    # Look-ahead made cheaper, or otherwise: replay.variants.
    "look-ahead every 2nd": replace(AHEAD, variant="every 2nd"),
    "look-ahead every 4th": replace(AHEAD, variant="every 4th"),
    "look-ahead once": replace(AHEAD, variant="once"),
    "look-ahead shared": replace(AHEAD, variant="shared"),
    "look-ahead one older": replace(AHEAD, variant="one older"),
    "look-ahead half newest": replace(AHEAD, variant="half newest"),
    "look-ahead blended": replace(AHEAD, variant="blended"),
    "look-ahead momentum first": replace(AHEAD, variant="momentum first"),
    "look-ahead joined": replace(AHEAD, joined=0.0),
    "look-ahead joined sqrt": replace(AHEAD, joined=0.5),
    "look-ahead joined linear": replace(AHEAD, joined=1.0),
    "look-ahead damped": replace(AHEAD, variant="damped"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: everything that decides its numbers.

    Attributes:
        task, layers: as for ``replay.tasks.make_task``; None is the task's own depth.
        stages, accumulation: of the pipeline.
        method: a name in METHODS.
        lr: peak learning rate. seed: of weights and batches.
        updates: of every stage. warmup: of them with a rising learning rate.
        shape: of the learning rate afterwards: ``cosine`` to a tenth, ``constant``, ``drops`` (to a tenth after half
            of the updates, to a hundredth after three quarters), or ``wsd`` (constant, then on a straight line to a
            tenth over the last fifth of all updates).
        dtype: ``fp32``, or ``bf16`` parameters with fp32 masters.
        device: ``cpu`` or ``cuda``.
        width, batch_size: in place of the task's own. beta2: second moment's decay. clip: largest gradient norm.
        corpus: name and fingerprint of the text, as ``tasks.use_corpus`` returns them; None is Python's library.
    """

    task: str
    layers: int | None = None
    stages: int
    accumulation: int
    method: str
    lr: float
    seed: int
    updates: int
    warmup: int
    shape: str = "cosine"
    dtype: str = "fp32"
    device: str = "cpu"
    width: int | None = None
    batch_size: int | None = None
    beta2: float | None = None
    clip: float | None = None
    corpus: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"unknown learning-rate shape {self.shape!r}: choose from {', '.join(SHAPES)}")

    @property
    def key(self) -> str:
        """A name that differs whenever anything does."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return " ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in given.items()
        )

    @property
    def group(self) -> tuple[Any, ...]:
        """What all its learning rates and seeds share."""
        return tuple(asdict(replace(self, lr=0.0, seed=0)).values())

    def rate(self, update: int) -> float:
        """Learning rate of ``update``, from 0, as a share of ``lr``."""
        if update < self.warmup:
            return (update + 1) / (self.warmup + 1)
        progress = min(1.0, (update - self.warmup) / max(1, self.updates - self.warmup))
        if self.shape == "constant":
            return 1.0
        if self.shape == "wsd":
            left = (self.updates - update) / max(1.0, DECAY_SHARE * self.updates)
            return 1.0 if left >= 1 else 0.1 + 0.9 * left
        if self.shape == "drops":
            return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
