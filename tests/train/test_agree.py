"""Processes of ``paci-rt train`` that were given different options or data refuse to train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paci_rt
from paci_rt import launch
from paci_rt.runtime.agreement import require_same
from paci_rt.train.agree import facts_of_run
from paci_rt.train.config import TrainConfig
from paci_rt.train.data import Corpus, load_corpus
from paci_rt.train.trainer import train

TEXT = "one two three four five six seven eight nine ten. " * 60


def config(folder: Path, **options: Any) -> TrainConfig:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    shared = {"stages": 2, "steps": 2, "batch_size": 4, "seq_len": 16, "data": str(text), "eval_batches": 1}
    return TrainConfig(**{**shared, **options})


def corpus(one: TrainConfig) -> Corpus:
    return load_corpus(one.data, vocab_size=one.shape.data_vocab_size, seq_len=one.seq_len)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "--seed is 0 on rank 0 and 1 on rank 1"),
        ({"lr": 2e-3}, "--lr is 0.001 on rank 0 and 0.002 on rank 1"),
        ({"dtype": "bf16"}, "--dtype is fp32 on rank 0 and bf16 on rank 1"),
        ({"schedule": "1f1b"}, "--schedule is paci on rank 0 and 1f1b on rank 1"),
        ({"batch_size": 8}, "--batch-size is 4 on rank 0 and 8 on rank 1"),
        ({"eval_interval": 2}, "--eval-interval is 1 on rank 0 and 2 on rank 1"),
        ({"partition": (3, 5)}, r"--partition is \[4, 4\] on rank 0 and \[3, 5\] on rank 1"),
        ({"out": "somewhere"}, "--out is null on rank 0 and a folder on rank 1"),
    ],
)
def test_options_that_decide_a_run(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    ours, theirs = config(tmp_path), config(tmp_path, **options)
    told = [facts_of_run(one, corpus(one), 0) for one in (ours, theirs)]
    with pytest.raises(paci_rt.DisagreementError, match=words):
        require_same(told)


def test_what_a_host_may_have_for_itself(tmp_path: Path) -> None:
    ours = config(tmp_path, out="a", resume="b")
    copy = tmp_path / "elsewhere.txt"
    copy.write_text(TEXT)
    theirs = replace(ours, data=str(copy), out="c", resume="d", threads=2, port=9, transfer_timeout=7.0, trace=True)
    require_same([facts_of_run(one, corpus(one), 5) for one in (ours, theirs)])
    with pytest.raises(paci_rt.DisagreementError, match="steps in --resume is 5 on rank 0 and 6 on rank 1"):
        require_same([facts_of_run(ours, corpus(ours), steps) for steps in (5, 6)])


def test_the_text_itself_is_compared(tmp_path: Path) -> None:
    ours = config(tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("seven", "SEVEN", 1))
    told = [facts_of_run(one, corpus(one), 0) for one in (ours, replace(ours, data=str(other)))]
    words = r"the text of --data is [0-9a-f]{16} \(3,000 tokens\) on rank 0 and .* on rank 1 \(copy the same file"
    with pytest.raises(paci_rt.DisagreementError, match=words):
        require_same(told)


def test_a_large_corpus_is_sampled_to_its_end() -> None:
    size = (64 << 20) + 12345
    tokens = np.zeros(size, dtype=np.uint8)
    before = Corpus(name="x", train=tokens, val=tokens[:100], vocab_size=256).digest()
    tokens[-1] = 1
    assert Corpus(name="x", train=tokens, val=tokens[:100], vocab_size=256).digest() != before
    assert Corpus(name="x", train=tokens[:-2], val=tokens[:100], vocab_size=256).digest() != before


def with_another_seed(ctx: launch.Context, one: TrainConfig) -> Any:
    return train(replace(one, seed=ctx.rank), ctx)


def test_a_run_ends_before_its_first_step(tmp_path: Path) -> None:
    words = "DisagreementError: the processes of this run disagree: --seed is 0 on rank 0 and 1 on rank 1"
    with pytest.raises(paci_rt.StageFailed, match=words):
        launch.run(with_another_seed, 2, (config(tmp_path),))
