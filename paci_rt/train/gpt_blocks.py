"""The blocks of a model, as :mod:`paci_rt.profiling.blocks` measures them: embedding, transformer blocks, head with the
loss.

A partition counts the transformer blocks; the embedding is on the first stage and the head on the last, as in
:mod:`paci_rt.train.families`. A head that is tied to the embedding counts as one with a weight and optimizer state of
its own: an upper bound, since its state lives with the embedding, and the exchange between the two is left out.
"""

from __future__ import annotations

import torch
from torch import nn

from paci_rt.planner.profile import Profile
from paci_rt.profiling.blocks import Block, profile_blocks
from paci_rt.report.machine import machine
from paci_rt.train.config import DTYPES
from paci_rt.train.model import ModelShape, cross_entropy


def gpt_blocks(config: ModelShape, dtype: torch.dtype = torch.float32) -> list[Block]:
    """The model's parts in order, in the granularity at which it can be cut."""

    def part(name: str, role: str, numbers: range, *, kind: str = "") -> Block:
        def build() -> nn.Module:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                return config.make_stage(numbers, first=role == "first", last=role == "last").to(dtype)

        return Block(name=name, role=role, build=build, kind=kind)

    blocks = [part(f"h.{i}", "middle", range(i, i + 1), kind="block") for i in range(config.layers)]
    return [part("embedding", "first", range(0)), *blocks, part("head", "last", range(0))]


def profile_gpt(
    config: ModelShape, *, rows: int, seq_len: int, dtype: str = "fp32", threads: int = 1, repeats: int = 10
) -> Profile:
    """Measure one micro-batch of ``rows`` sequences of ``seq_len`` tokens, block by block.

    Args:
        dtype: a name in ``paci_rt.train.config.DTYPES``.
        threads: that a stage computes on.
        repeats: micro-batches that are timed.

    Raises:
        ValueError: a number below 1, or more tokens than the model has positions.
    """
    for name, value in (("rows", rows), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: give an integer of at least 1")
    if seq_len > config.context:
        raise ValueError(
            f"--seq-len {seq_len} exceeds the {config.context} positions of {config.name}; use at most that"
        )
    generator = torch.Generator().manual_seed(0)
    tokens, target = torch.randint(config.vocab_size, (2, rows, seq_len), generator=generator)  # int64 [rows, seq_len]
    profiled = {
        "model": config.name,
        "dtype": dtype,
        "rows": rows,
        "seq_len": seq_len,
        "threads": threads,
        "machine": machine(),
    }
    return profile_blocks(
        gpt_blocks(config, DTYPES[dtype]),
        tokens,
        lambda logits: cross_entropy(logits, target),
        threads=threads,
        repeats=repeats,
        profiled=profiled,
    )
