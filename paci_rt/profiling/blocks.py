"""Measures a model block by block: what the planner needs to know about it.

Blocks run in a row, as they do on a stage: all forwards, then all input gradients backwards through them, then all
weight gradients, then all updates. So the weights and activations of a block have left the nearest caches again by the
time they are needed, as they will in a run. Of blocks that are alike a few copies are enough; the rest share their
numbers.

Each block is a :class:`~paci_rt.runtime.stage.PipelineStage` with an optimizer, and its backward is split as
:mod:`paci_rt.runtime.split_backward` does it: what is measured is what the executor runs.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.optim import AdamW
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.planner.profile import ROLES, BlockProfile, Profile
from paci_rt.runtime.stage import PipelineStage

COPIES = 3
"""Blocks of one kind that are measured: with fewer, weights stay in caches that a real stage of several would
overflow (a tenth faster for one block of GPT-2's shape at width 384, one thread)."""
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of the model that stays in one piece.

    Attributes:
        name: unique.
        role: ``first``, ``middle`` or ``last``; see :mod:`paci_rt.planner.profile`.
        build: makes the module, on the CPU.
        kind: blocks of one kind cost the same; empty for one of its own.
    """

    name: str
    role: str
    build: Callable[[], nn.Module]
    kind: str = ""


@dataclass(slots=True)
class _Measured:
    """One block under measurement; samples in seconds by what was timed."""

    block: Block
    kind: str
    stage: PipelineStage
    bound: StageOptimizer | None
    samples: dict[str, list[float]]
    sizes: dict[str, int]


def profile_blocks(
    blocks: Sequence[Block],
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    threads: int = 1,
    repeats: int = 10,
    profiled: dict[str, Any] | None = None,
) -> Profile:
    """Measure ``blocks``, each of which takes what the one before it returns (one tensor).

    Times are medians over ``repeats`` micro-batches after two for warming up. A block whose input needs no gradient,
    such as an embedding, has the gradients of its own parameters in ``input_grad_s`` where they cannot be put off.

    Args:
        blocks: in order.
        inputs: a micro-batch for the first block.
        loss: from the last block's output to a scalar.
        threads: that a stage computes on.
        repeats: micro-batches that are timed.
        profiled: what to write into the profile about what this was.

    Raises:
        ValueError: no block, a name or role that cannot be, or a number below 1.
    """
    _check(blocks, threads=threads, repeats=repeats)
    with _threads(threads):
        chain = _chain(blocks)
        for number in range(WARM_UP + repeats):
            _micro_batch(chain, number, inputs, loss)
    by_kind: dict[str, list[_Measured]] = defaultdict(list)
    for one in chain:
        by_kind[one.kind].append(one)
    trained = [one for one in chain if one.bound is not None]
    weights = sum(one.sizes["parameter_bytes"] for one in trained)
    state = sum(one.sizes["state_bytes"] for one in trained)
    updates = sum(_median([one], "update_s") for one in trained)
    return Profile(
        blocks=tuple(_block_profile(block, by_kind[kind]) for block, kind in zip(blocks, _kinds(blocks), strict=True)),
        input_bytes=inputs.nbytes,
        update_s_per_byte=updates / weights if weights else 0.0,
        state_bytes_per_parameter_byte=state / weights if weights else 0.0,
        has_masters=any(one.sizes["master_bytes"] for one in trained),
        profiled=dict(profiled or {}),
    )


def _check(blocks: Sequence[Block], *, threads: int, repeats: int) -> None:
    for name, value in (("threads", threads), ("repeats", repeats)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: give an integer of at least 1")
    if not blocks:
        raise ValueError("there is nothing to profile: give at least one block")
    for block in blocks:
        if block.role not in ROLES:
            raise ValueError(f"block {block.name!r} has the role {block.role!r}: give one of {', '.join(ROLES)}")
    names = [block.name for block in blocks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two blocks are called {twice[0]!r}: give each a name of its own")


def _kinds(blocks: Sequence[Block]) -> list[str]:
    """What each block shares its numbers under. The first and the last are like no other: one has no input that
    needs a gradient, the other computes the loss."""
    inner = range(1, len(blocks) - 1)
    return [f"kind {one.kind}" if one.kind and at in inner else f"name {one.name}" for at, one in enumerate(blocks)]


def _chain(blocks: Sequence[Block]) -> list[_Measured]:
    """The blocks to measure: every kind, up to ``COPIES`` of it."""
    seen: dict[str, int] = defaultdict(int)
    chosen = []
    for block, kind in zip(blocks, _kinds(blocks), strict=True):
        seen[kind] += 1
        if seen[kind] <= COPIES:
            chosen.append((block, kind))
    chain = []
    for at, (block, kind) in enumerate(chosen):
        module = block.build()
        stage = PipelineStage(module, at, len(chosen))
        trainable = {name: param for name, param in module.named_parameters() if param.requires_grad}
        bound = None
        if trainable:
            # Rate 0: the arithmetic is that of any rate, and the weights stay what they are.
            bound = bind_optimizer(AdamW(trainable.values(), lr=0.0), dict(module.named_parameters()))
            stage.attach(bound)
        chain.append(_Measured(block, kind, stage, bound, defaultdict(list), {}))
    return chain


def _micro_batch(chain: list[_Measured], number: int, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """One micro-batch through all blocks and back, one update included."""
    x = inputs
    for one in chain:
        x = x.clone()  # where a message would arrive
        if not one.stage.is_first and x.is_floating_point():
            x.requires_grad_(True)
        message, output, value = _timed(one, "forward_s", one.stage.forward, number, (x,), {}, _loss_of(one, loss))
        if number == 0:
            one.sizes["activation_bytes"] = one.stage.kept_bytes(number)[0]
            one.sizes["boundary_bytes"] = output.nbytes if value is None else 0  # nothing leaves the last
        x = output if message is None else message.tensors[0]
    gradient: Tensor | None = None
    for one in reversed(chain):
        arriving = None if gradient is None else gradient.clone()
        back = _timed(one, "input_grad_s", _input_grad, one.stage, number, arriving)
        gradient = back.tensors[0] if back.tensors else None
        if number == 0:
            one.sizes["stash_bytes"] = one.stage.pending_bytes(number)
    for one in reversed(chain):
        _timed(one, "weight_grad_s", one.stage.weight_gradients, number)
    for one in chain:
        if one.bound is not None:
            _timed(one, "update_s", one.bound.update, 1)
            if number == 0:
                memory = one.bound.memory
                one.sizes["master_bytes"] = memory["masters"]
                one.sizes["state_bytes"] = memory["masters"] + memory["optimizer"] + memory["accumulators"]
        if number == 0:
            one.sizes["parameter_bytes"] = sum(param.nbytes for param in one.stage.parameters())


def _input_grad(stage: PipelineStage, number: int, gradient: Tensor | None) -> Any:
    return stage.backward(number, (gradient,), split=True)


def _loss_of(one: _Measured, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    return loss if one.stage.is_last else None


def _timed(one: _Measured, what: str, fn: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter()
    result = fn(*args)
    one.samples[what].append(time.perf_counter() - start)
    return result


def _block_profile(block: Block, alike: list[_Measured]) -> BlockProfile:
    sizes = alike[0].sizes
    return BlockProfile(
        name=block.name,
        role=block.role,
        measured_as=alike[0].block.name,
        forward_s=_median(alike, "forward_s"),
        input_grad_s=_median(alike, "input_grad_s"),
        weight_grad_s=_median(alike, "weight_grad_s") if sizes["stash_bytes"] else 0.0,
        parameter_bytes=sizes["parameter_bytes"],
        activation_bytes=sizes["activation_bytes"],
        stash_bytes=sizes["stash_bytes"],
        boundary_bytes=sizes["boundary_bytes"],
    )


def _median(alike: list[_Measured], what: str) -> float:
    return statistics.median(sample for one in alike for sample in one.samples[what][WARM_UP:])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
