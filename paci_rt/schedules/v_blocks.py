"""Flushed schedules in a V that hold few activations: ``v-half`` and ``v-min``.

Qi et al., "Pipeline Parallelism with Controllable Memory" (arXiv 2405.15362): one micro-batch's F and I on all stages,
the building block, is repeated every six units of time, which is what a rank needs for F, I and W of two stages. How
far apart neighbouring stages stand in it decides how long activations live. ``v-half`` holds about half of 1F1B's,
``v-min`` about a third, both the same on all ranks. W fills what is left.

The order is fitted to F, I and W of equal length and to no hop.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from paci_rt.action import Codes, Op, encode
from paci_rt.schedules import limits
from paci_rt.schedules.base import Shape, join
from paci_rt.schedules.v_flush import Orders, v_family

PERIOD = 6
"""Units of time that a rank works on a micro-batch: F, I and W of two stages."""


class Steps(NamedTuple):
    """Units of time between neighbouring stages in a building block.

    Attributes:
        down, up: of forwards, to the last rank and back.
        back_down, back_up: of I, to the last rank and back.
    """

    down: int
    up: int
    back_down: int
    back_up: int


HALF, LEAST = Steps(2, 1, 2, 1), Steps(1, 1, 1, 1)


class Block(NamedTuple):
    """When F and I of micro-batch 0 begin, in units of time, on the stages of rank ``r``.

    Attributes:
        ranks: of the V.
        steps: between neighbouring ranks.
        turns: on the last rank, on the last stage, and on the last rank again.
    """

    ranks: int
    steps: Steps
    turns: tuple[int, int, int]

    def times(self, rank: int) -> tuple[int, int, int, int]:
        """Of F and I on the upper stage, then on the lower one."""
        last, below = self.ranks - 1, self.ranks - 1 - rank
        bottom = self.steps.down * last + self.turns[0]
        top = bottom + self.steps.up * last + self.turns[1]
        back = top + self.steps.back_down * last + self.turns[2]
        return (
            self.steps.down * rank,
            back + self.steps.back_up * below,
            bottom + self.steps.up * below,
            top + self.steps.back_down * rank,
        )

    @property
    def repeats(self) -> bool:
        """Whether no two actions of a rank meet when a block begins every ``PERIOD`` units."""
        some = range(min(self.ranks, PERIOD))  # the others have the same remainders
        return all(len({at % PERIOD for at in self.times(rank)}) == 4 for rank in some)

    @property
    def longest(self) -> int:
        """How long the activations of both stages live, on the rank where that is longest."""
        ends = [self.times(rank) for rank in (0, self.ranks - 1)]  # it grows or shrinks from rank to rank
        return max(up_back - up + low_back - low for up, up_back, low, low_back in ends)


@lru_cache(maxsize=64)
def building_block(ranks: int, steps: Steps) -> Block:
    """The block that repeats, with the waits at its turns that let activations live shortest."""
    waits = range(1, PERIOD + 1)
    blocks = [Block(ranks, steps, (one, two, three)) for one in waits for two in waits for three in waits]
    return min((block for block in blocks if block.repeats), key=lambda block: block.longest)


class _Rank:
    """What one rank still has to do, while the schedule is played in units of time.

    Attributes:
        left: F and I in the order of the blocks, as ``(op, stage, micro-batch)``, the next one last.
        stashes: stages and micro-batches between their I and their W, oldest first.
        most: activations and stashes that there may be after an F.
        held: of these, how many there are.
    """

    def __init__(self, rank: int, block: Block, micro_batches: int, spare: int) -> None:
        up, up_back, low, low_back = block.times(rank)
        stages = rank, 2 * block.ranks - 1 - rank
        starts = (
            (up, Op.F, stages[0]),
            (up_back, Op.I, stages[0]),
            (low, Op.F, stages[1]),
            (low_back, Op.I, stages[1]),
        )
        cells = [(at + PERIOD * m, op, stage, m) for at, op, stage in starts for m in range(micro_batches)]
        cells.sort(key=lambda cell: cell[0])
        self.left = [cell[1:] for cell in reversed(cells)]
        self.most = spare + max(itertools.accumulate(1 if cell[1] is Op.F else -1 for cell in cells))
        self.stashes: deque[tuple[int, int]] = deque()
        self.order: list[tuple[Op, int, int]] = []
        self.held = 0

    def act(self, ready: Callable[[Op, int, int], bool]) -> tuple[Op, int, int] | None:
        """What the rank does in this unit of time; None where it waits."""
        action = self.left[-1] if self.left and ready(*self.left[-1]) else None
        full = action is not None and action[0] is Op.F and self.held >= self.most
        if self.stashes and (action is None or full):
            action = (Op.W, *self.stashes.popleft())
        elif action is not None:
            self.left.pop()
            if action[0] is Op.I:
                self.stashes.append(action[1:])
        if action is not None:
            self.held += {Op.F: 1, Op.W: -1}.get(action[0], 0)
            self.order.append(action)
        return action


def _orders(ranks: int, micro_batches: int, *, steps: Steps, spare: int) -> Orders:
    """Play all ranks in units of time: F and I in the order of the blocks, W where a rank would wait.

    An F makes no more activations and stashes than the blocks have activations at their peak, and ``spare``.
    """
    block, last = building_block(ranks, steps), 2 * ranks - 1
    playing = [_Rank(rank, block, micro_batches, spare) for rank in range(ranks)]
    done: set[tuple[Op, int, int]] = set()

    def ready(op: Op, stage: int, m: int) -> bool:
        if op is Op.F:
            return stage == 0 or (op, stage - 1, m) in done
        return stage == last or (op, stage + 1, m) in done

    while any(one.left or one.stashes for one in playing):
        acted = [one.act(ready) for one in playing]
        ended = [action for action in acted if action is not None]
        assert ended, "building blocks that wait for each other"
        done.update(ended)
    return tuple(_encoded(one.order) for one in playing)


def _encoded(order: list[tuple[Op, int, int]]) -> Codes:
    return join(*(np.ravel(encode(stage, op, m)) for op, stage, m in order))


def _check(shape: Shape) -> None:
    limits.check_actions(
        shape.num_stages * shape.accumulation,
        "a schedule of building blocks is computed for",
        limits.MOST_SEARCHED,
        "stages or micro-batches, or use zb-v",
    )


V_HALF = v_family("v-half", partial(_orders, steps=HALF, spare=1), _check)
V_MIN = v_family("v-min", partial(_orders, steps=LEAST, spare=2), _check)
