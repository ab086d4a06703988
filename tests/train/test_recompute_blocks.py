"""Blocks that run again in their backward: less memory, and the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import paci_rt
from paci_rt.train.config import TrainConfig
from paci_rt.train.encoder import EncoderConfig
from paci_rt.train.gpt import GPTConfig
from paci_rt.train.llama import LlamaConfig
from paci_rt.train.model import Blocks, ModelShape, build_stage, cross_entropy, tied_weights

BASE: dict[str, Any] = {"name": "small", "vocab_size": 61, "context": 24, "layers": 8, "heads": 4, "width": 32}
SHAPES: dict[str, ModelShape] = {
    "gpt2": GPTConfig(**BASE, tied=True),
    "llama": LlamaConfig(**BASE, kv_heads=2, ffn_width=40, tied=False),
    "encoder": EncoderConfig(**BASE, ffn_width=40, tied=True),
}


def train(shape: ModelShape, again: bool, schedule: str, policy: str | None) -> tuple[list[Tensor], str, int]:
    """Losses, a hash of the weights, and the activations of all stages at their peaks, in bytes."""
    chunks = 2 if "interleaved" in schedule or schedule in ("zb-v", "paci-v", "dualpipe-v") else 1
    pieces = 2 * chunks
    pipeline = paci_rt.LocalPipeline(
        [build_stage(shape, at, pieces, seed=3, recompute_blocks=again) for at in range(pieces)],
        schedule=schedule,
        chunks=chunks,
        policy=policy,
        n_microbatches=4,
        loss_fn=cross_entropy,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        tied_weights=tied_weights(shape, pieces),
    )
    x = torch.randint(shape.data_vocab_size, (8, 24), generator=torch.Generator().manual_seed(5))
    losses: list[Tensor] = []
    for _ in range(3):
        pipeline.step(x, target=x, losses=losses)
    pipeline.drain()
    peak = sum(parts["activations"] for parts in pipeline.stats()["memory"].values())
    return losses, paci_rt.params_sha256(pipeline.named_parameters()), peak


@pytest.mark.parametrize(
    ("schedule", "policy"),
    [
        ("1f1b", None),
        ("gpipe", None),
        ("interleaved-1f1b", None),
        ("zb-h1", None),
        ("zb-2p", None),
        ("zb-v", None),
        ("dualpipe-v", None),
        ("1f1b", "recompute"),
        ("paci", "recompute"),
        ("paci-v", "recompute"),
        ("paci", "stash"),
        ("pipedream-2bw", None),
    ],
)
@pytest.mark.parametrize("name", SHAPES)
def test_the_bits_stay_and_memory_falls(name: str, schedule: str, policy: str | None) -> None:
    shape = SHAPES[name]
    if schedule == "pipedream-2bw":  # it takes no tied weights
        shape = replace(shape, tied=False)
    losses, digest, peak = train(shape, False, schedule, policy)
    again_losses, again_digest, again_peak = train(shape, True, schedule, policy)
    assert torch.equal(torch.stack(losses), torch.stack(again_losses)) and digest == again_digest
    if policy == "recompute":  # only what goes into a stage was kept before, and that is kept now
        assert again_peak <= peak
    else:
        assert again_peak < peak


def test_each_block_runs_twice_a_step_and_once_without_a_backward() -> None:
    module = build_stage(SHAPES["gpt2"], 0, 1, recompute_blocks=True)
    (blocks,) = (part for part in module.modules() if isinstance(part, Blocks))
    calls: list[int] = []
    for at, block in enumerate(blocks.values()):
        block.register_forward_pre_hook(lambda *_, at=at: calls.append(at))
    x = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        module(x)
    assert calls == list(range(8))
    module(x).sum().backward()
    assert calls[8:] == [*range(8), *reversed(range(8))]


@pytest.mark.parametrize("schedule", ["paci", "paci-split", "paci-v", "async-1f1b"])
def test_where_weights_move_between_forward_and_backward_it_is_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"--recompute-blocks under .*: weights change .*; use --policy "):
        TrainConfig(schedule=schedule, recompute_blocks=True)
    assert TrainConfig(schedule=schedule, recompute_blocks=True, policy="recompute").recompute_blocks


@pytest.mark.parametrize("options", [{"schedule": "1f1b"}, {"schedule": "paci", "stages": 1}, {"policy": "stash"}])
def test_where_they_stand_still_it_is_taken(options: dict[str, Any]) -> None:
    assert TrainConfig(recompute_blocks=True, **options).recompute_blocks


def test_it_is_a_switch() -> None:
    with pytest.raises(ValueError, match="--recompute-blocks is 1: give True or False"):
        TrainConfig(recompute_blocks=1)  # type: ignore[arg-type]


def test_what_goes_into_blocks_is_counted() -> None:
    _, _, peak = train(SHAPES["llama"], True, "1f1b", None)
    rows, tokens, width = 2, 24, 32
    kept_by_a_block = 4 * rows * tokens * width
    blocks, in_flight = 4, (2, 1)
    assert peak >= kept_by_a_block * blocks * sum(in_flight)
