"""What the convergence benchmark trains: small models of several families, cut into any number of stages.

Weights and batches are pure functions of (seed, name) and (update, seed): a task is the same for any cut and in any
process.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from paci_rt.train.data import Corpus, load_corpus
from paci_rt.train.gpt import MODELS, GPTConfig, build_stage, cross_entropy, default_partition

HELD_BACK_SEQUENCES = 48


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A model with its data.

    Attributes:
        layers: blocks; the model is cut into at most so many stages.
        batch_size: sequences or images an update.
        units_per_update: what an update consumes, in ``unit``: tokens, or images.
    """

    name: str
    layers: int
    batch_size: int
    units_per_update: int
    unit: str = "tokens"

    @abstractmethod
    def build(self, num_stages: int, seed: int) -> list[nn.Module]:
        """The stages, first to last; parameters do not depend on the cut."""

    @abstractmethod
    def batch(self, update: int, seed: int) -> tuple[Tensor, Tensor]:
        """Input and target of one update, ``batch_size`` along dimension 0."""

    @abstractmethod
    def held_back(self) -> tuple[Tensor, Tensor]:
        """Input and target that no batch contains."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean nats per token, or per image."""
        return cross_entropy(output, target)

    def is_hidden_matrix(self, name: str, param: nn.Parameter) -> bool:
        """Whether Muon takes a parameter: matrices inside blocks."""
        return param.dim() == 2 and name.startswith("transformer.h.")


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A GPT on the text of Python's standard library, bytes as tokens."""

    model: GPTConfig
    seq_len: int

    @cached_property
    def corpus(self) -> Corpus:
        """The text, opened once."""
        return load_corpus(None, vocab_size=self.model.vocab_size, seq_len=self.seq_len)

    def build(self, num_stages: int, seed: int) -> list[nn.Module]:
        sizes = default_partition(self.model, num_stages, seq_len=self.seq_len)
        return [build_stage(self.model, at, num_stages, seed=seed, partition=sizes) for at in range(num_stages)]

    def batch(self, update: int, seed: int) -> tuple[Tensor, Tensor]:
        return self.corpus.batch(update, self.batch_size, self.seq_len, seed)

    def held_back(self) -> tuple[Tensor, Tensor]:
        return self.corpus.validation(HELD_BACK_SEQUENCES, self.seq_len)


def _gpt(name: str, model: GPTConfig, *, batch_size: int, seq_len: int) -> TextTask:
    return TextTask(
        name=name,
        layers=model.layers,
        batch_size=batch_size,
        units_per_update=batch_size * seq_len,
        model=model,
        seq_len=seq_len,
    )


NANO = GPTConfig(name="gpt-nano", vocab_size=256, context=256, layers=8, heads=4, width=64, tied=False)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _gpt("gpt-tiny", MODELS["gpt-tiny"], batch_size=32, seq_len=128),
        _gpt("gpt-nano", NANO, batch_size=32, seq_len=64),
        _gpt("gpt-nano-64x32", NANO, batch_size=64, seq_len=32),
    )
}


def make_task(name: str, *, layers: int | None = None) -> Task:
    """The task called ``name``, with another number of blocks where ``layers`` says so.

    Raises:
        ValueError: no task has that name, or ``layers`` is below 1.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {name!r}: {hint}choose from {', '.join(TASKS)}")
    task = TASKS[name]
    if layers is None:
        return task
    if layers < 1:
        raise ValueError(f"layers={layers}: a model has at least one block")
    changes: dict[str, object] = {"layers": layers}
    if isinstance(task, TextTask):
        changes["model"] = replace(task.model, layers=layers)
    return replace(task, **changes)  # type: ignore[arg-type]
