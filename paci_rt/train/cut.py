"""Where a model is cut that nobody has profiled, when a process holds several pieces of it.

What a micro-batch takes is estimated from multiply-adds, and what it keeps from the width. The planner's partitions by
rank (:mod:`paci_rt.planner.rank_cuts`) are then simulated, and the best is taken.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from paci_rt import schedules
from paci_rt.planner import BlockProfile, Candidate, Profile, stage_costs, step_costs
from paci_rt.planner.candidate import Limits
from paci_rt.planner.evaluate import Evaluator
from paci_rt.schedules import StepCosts
from paci_rt.train.model import ModelShape, default_partition
from paci_rt.train.option_checks import check_pieces
from paci_rt.wording import shown

KEPT = 16
"""Numbers that a block keeps of a token between forward and backward, over its width, about."""
STASHED = 0.5
"""What of them a weight gradient that is put off needs, about."""
MOST_WINDOW = 4
"""Micro-batches of a window that is simulated, over the pieces: more change nothing."""


class Run(NamedTuple):
    """What a cut depends on.

    Attributes:
        shape: of the model. schedule, policy: names.
        accumulation, rows, seq_len: micro-batches of an update, sequences of one, tokens of a sequence.
        ranks, chunks: processes, and pieces in each.
        element_bytes: of a number.
    """

    shape: ModelShape
    schedule: str
    policy: str
    accumulation: int
    rows: int
    seq_len: int
    ranks: int
    chunks: int
    element_bytes: int


def run_of(config: Any, family: schedules.ScheduleFamily) -> Run:
    """What a cut of this configuration depends on, whose numbers have been checked."""
    return Run(
        shape=config.shape,
        schedule=family.name,
        policy=config.policy if config.policy in family.policies else family.policies[0],
        accumulation=config.accumulation,
        rows=config.batch_size // (config.accumulation * config.replicas),
        seq_len=config.seq_len,
        ranks=config.stages,
        chunks=config.chunks,
        element_bytes=config.torch_dtype.itemsize,
    )


def checked(given: Any, run: Run) -> tuple[int, ...]:
    """Blocks of each piece: what ``--partition`` says, or the best cut where it is None.

    Raises:
        ValueError: more pieces than blocks, or a partition that is none.
    """
    shape, pieces = run.shape, run.ranks * run.chunks
    check_pieces(run.ranks, run.chunks, shape.layers, shape.name)
    if given is None:
        return best_cut(run)
    example = default_partition(shape, pieces, seq_len=run.seq_len)
    if not (isinstance(given, (list, tuple)) and all(type(size) is int for size in given)):
        raise ValueError(f"--partition is {shown(given)}: give blocks per stage, such as {example}")
    if len(given) != pieces or sum(given) != shape.layers or min(given) < 1:
        raise ValueError(
            f"--partition {','.join(map(str, given))} must give each of {pieces} stages at least one block "
            f"and add up to the {shape.layers} of {shape.name}; for example {','.join(map(str, example))}"
        )
    return tuple(given)


@lru_cache(maxsize=256)
def best_cut(run: Run) -> tuple[int, ...]:
    """Blocks of each piece; the same in every process."""
    one = _candidate(run)
    if run.chunks > 1:
        limits = Limits(memory_bytes=(math.inf,) * run.ranks, measured=False)
        judge = Evaluator(profile=estimate(run), speeds=(1.0,) * run.ranks, limits=limits)
        found = judge.best_cut(one, schedules.get(run.schedule)).partition
        if found is not None:  # otherwise it cannot run at all, and whoever checks that says why
            return found
    return default_partition(run.shape, run.ranks * run.chunks, seq_len=run.seq_len)


def costs_of(run: Run, partition: tuple[int, ...]) -> StepCosts:
    """What an order is fitted to on these blocks by piece; its unit is a block's forward."""
    placement = schedules.get(run.schedule).placement
    costs = stage_costs(estimate(run), partition, device_speeds=(1.0,) * run.ranks, placement=placement)
    return step_costs(costs, _candidate(run).recomputing(run.ranks))


def _candidate(run: Run) -> Candidate:
    accumulation = min(run.accumulation, MOST_WINDOW * run.ranks * run.chunks)
    return Candidate(schedule=run.schedule, policy=run.policy, accumulation=accumulation, chunks=run.chunks)


def estimate(run: Run) -> Profile:
    """The model as the planner sees it, from arithmetic alone; a forward through a block takes a second."""
    shape, tokens = run.shape, run.rows * run.seq_len
    block = _parameters(shape, 2) - _parameters(shape, 1)
    first, last = _parameters(shape, 1, first=True) - block, _parameters(shape, 1, last=True) - block
    head_s, boundary = shape.head_macs / shape.block_macs(run.seq_len), tokens * shape.width

    def part(name: str, seconds: float, parameters: int, kept: int) -> BlockProfile:
        return BlockProfile(
            name=name,
            role=name,
            forward_s=seconds,
            input_grad_s=seconds,
            weight_grad_s=seconds,
            parameter_bytes=run.element_bytes * parameters,
            activation_bytes=run.element_bytes * kept,
            stash_bytes=round(STASHED * run.element_bytes * kept),
            boundary_bytes=run.element_bytes * boundary,
        )

    middle = part("middle", 1.0, block, KEPT * boundary)
    blocks = part("first", 0.0, first, boundary), *(middle,) * shape.layers
    return Profile(blocks=(*blocks, part("last", head_s, last, tokens * shape.vocab_size)), input_bytes=8 * tokens)


def _parameters(shape: ModelShape, blocks: int, *, first: bool = False, last: bool = False) -> int:
    with torch.device("meta"):
        module = shape.make_stage(range(blocks), first=first, last=last)
    return sum(parameter.numel() for parameter in module.parameters())
