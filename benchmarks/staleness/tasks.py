"""What the convergence benchmark trains: small models of several families, cut into any number of stages.

Weights and batches are pure functions of (seed, name) and (update, seed): a task is the same for any cut and in any
process.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from paci_rt.train.data import Corpus, load_corpus
from paci_rt.train.gpt import MODELS, GPTConfig, build_stage, cross_entropy, default_partition
from paci_rt.wording import unknown
from staleness import glyphs, models
from staleness.draws import MASK_TOKEN, mask, seeded

HELD_BACK_SEQUENCES = 48
CORPUS_VARIABLE = "ISO_LOSS_CORPUS"
HELD_BACK_MASKED = 192  # sequences; only about one position in seven of them is measured
HELD_BACK_IMAGES = 256


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
    """A GPT on the text of Python's standard library, bytes as tokens.

    Attributes:
        model: its shape; ``layers`` of it are those of the task.
        seq_len: tokens per sequence.
        text: name and fingerprint of another text, which :func:`use_corpus` has named.
    """

    model: GPTConfig
    seq_len: int
    text: str | None = None

    @cached_property
    def corpus(self) -> Corpus:
        """The text, opened once.

        Raises:
            ValueError: it is not the one that the task names.
        """
        path = None if self.text is None else os.environ.get(CORPUS_VARIABLE)
        corpus = load_corpus(path, vocab_size=self.model.vocab_size, seq_len=self.seq_len)
        if self.text is not None and (path is None or self.text != _label(corpus, path)):
            raise ValueError(f"the text is not {self.text}: give the same --corpus as when the runs were planned")
        return corpus

    def build(self, num_stages: int, seed: int) -> list[nn.Module]:
        sizes = default_partition(self.model, num_stages, seq_len=self.seq_len)
        return [build_stage(self.model, at, num_stages, seed=seed, partition=sizes) for at in range(num_stages)]

    def batch(self, update: int, seed: int) -> tuple[Tensor, Tensor]:
        return self.corpus.batch(update, self.batch_size, self.seq_len, seed)

    def held_back(self) -> tuple[Tensor, Tensor]:
        return self.corpus.validation(HELD_BACK_SEQUENCES, self.seq_len)


@dataclass(frozen=True, kw_only=True)
class LlamaTask(TextTask):
    """A Llama-like decoder on the same text."""

    def build(self, num_stages: int, seed: int) -> list[nn.Module]:
        sizes = models.even_partition(self.name, self.layers, num_stages)
        return models.build_stages(models.llama(self.model), sizes, seed)


@dataclass(frozen=True, kw_only=True)
class EncoderTask(TextTask):
    """A BERT-like encoder that fills in what is masked of the same text.

    Every sequence has the same number of targets, so the mean over equal micro-batches' means is that over the batch.
    ``units_per_update`` counts all tokens that are read, not only the targets among them.
    """

    def build(self, num_stages: int, seed: int) -> list[nn.Module]:
        sizes = models.even_partition(self.name, self.layers, num_stages)
        return models.build_stages(models.encoder(self.model), sizes, seed)

    def batch(self, update: int, seed: int) -> tuple[Tensor, Tensor]:
        tokens, _ = self.corpus.batch(update, self.batch_size, self.seq_len, seed)
        return mask(tokens, seeded("mask", seed, update))

    def held_back(self) -> tuple[Tensor, Tensor]:
        tokens, _ = self.corpus.validation(HELD_BACK_MASKED, self.seq_len)
        return mask(tokens, seeded("mask held back"))


@dataclass(frozen=True, kw_only=True)
class GlyphTask(Task):
    """An MLP-Mixer that tells letters and digits apart; see :mod:`replay.glyphs`."""

    model: models.MixerConfig

    def build(self, num_stages: int, seed: int) -> list[nn.Module]:
        sizes = models.even_partition(self.name, self.layers, num_stages)
        return models.build_stages(models.mixer(self.model), sizes, seed)

    def batch(self, update: int, seed: int) -> tuple[Tensor, Tensor]:
        return glyphs.training_batch(update, self.batch_size, seed)

    def held_back(self) -> tuple[Tensor, Tensor]:
        return glyphs.held_back_set(HELD_BACK_IMAGES)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)


def _text(name: str, model: GPTConfig, *, batch_size: int, seq_len: int, kind: type[TextTask] = TextTask) -> TextTask:
    return kind(
        name=name,
        layers=model.layers,
        batch_size=batch_size,
        units_per_update=batch_size * seq_len,
        model=model,
        seq_len=seq_len,
    )


def _glyphs(name: str, model: models.MixerConfig, *, layers: int, batch_size: int) -> GlyphTask:
    return GlyphTask(
        name=name, layers=layers, batch_size=batch_size, units_per_update=batch_size, unit="images", model=model
    )


NANO = GPTConfig(name="gpt-nano", vocab_size=256, context=256, layers=8, heads=4, width=64, tied=False)
LLAMA = replace(NANO, name="llama-nano")
ENCODER = replace(NANO, name="encoder-nano", vocab_size=MASK_TOKEN + 1)
MIXER = models.MixerConfig(size=glyphs.SIZE, patch=7, width=64, classes=len(glyphs.CHARACTERS))

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _text("gpt-tiny", MODELS["gpt-tiny"], batch_size=32, seq_len=128),
        _text("gpt-nano", NANO, batch_size=32, seq_len=64),
        _text("gpt-nano-64x32", NANO, batch_size=64, seq_len=32),
        _text("llama-nano", LLAMA, batch_size=32, seq_len=64, kind=LlamaTask),
        _text("encoder-nano", ENCODER, batch_size=32, seq_len=64, kind=EncoderTask),
        _glyphs("mixer-nano", MIXER, layers=8, batch_size=128),
    )
}


def use_corpus(path: str) -> str:
    """Let tasks in this process and those that it starts train on the text at ``path``.

    Returns:
        Its name and fingerprint, which name no place.
    """
    os.environ[CORPUS_VARIABLE] = path
    return _label(load_corpus(path, vocab_size=NANO.vocab_size, seq_len=1), path)


def _label(corpus: Corpus, path: str) -> str:
    return f"{Path(path).name} {corpus.digest()}"


def make_task(
    name: str,
    *,
    layers: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    corpus: str | None = None,
) -> Task:
    """The task called ``name``, with another number of blocks, width, batch or text where they are given.

    Raises:
        ValueError: no task has that name, or a number is below 1 or not for that task.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task = TASKS[name]
    if layers is not None and layers < 1:
        raise ValueError(f"layers={layers}: a model has at least one block")
    given = {"layers": layers, "batch_size": batch_size}
    changes: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if not isinstance(task, TextTask):
        if width is not None or corpus is not None or batch_size is not None:
            raise ValueError(f"{name} trains on images: it takes no width, batch size or corpus")
        return replace(task, **changes)  # type: ignore[arg-type]
    shape: dict[str, int] = {key: value for key, value in (("layers", layers), ("width", width)) if value is not None}
    if width is not None and (width < 1 or width % task.model.heads):
        raise ValueError(f"width={width}: give a multiple of the {task.model.heads} heads of {name}")
    changes |= {"model": replace(task.model, **shape), "text": corpus}  # type: ignore[arg-type]
    changes["units_per_update"] = task.seq_len * (batch_size or task.batch_size)
    return replace(task, **changes)  # type: ignore[arg-type]
