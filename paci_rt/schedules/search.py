"""Searched zero-bubble schedules: ``zb-1p`` and ``zb-2p``, with at most P and 2P activations on a stage.

Zero Bubble Pipeline Parallelism: Qi et al., arXiv 2401.10241, section 3.1. A greedy construction runs once for every
combination of a few choices (:class:`_Rules`); of its orders and the hand-written ones that fit into the memory, the
one with the shortest longest stage is kept. Everything is computed from the shape alone, so all ranks find the same.

An order is written as a string of ``F``, ``I`` and ``W``: on a stage each of them takes the micro-batches in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from paci_rt.action import OPS, Codes, Op, decode_fields, encode
from paci_rt.schedules import limits
from paci_rt.schedules.base import ScheduleFamily, Shape, StepCosts, flush_family
from paci_rt.schedules.zero_bubble import hand_written

Orders = tuple[str, ...]
_LETTERS = (Op.F, Op.I, Op.W)


class _Rules(NamedTuple):
    """The choices that the search tries.

    Attributes:
        warm_up: forwards before the first I: as many as ``fit`` before it can start, one ``more`` where time is left
            over, or a number that falls ``evenly`` from the limit on the first stage to 1 on the last, which hides
            long hops.
        skip: a stage that has run more than one forward ahead of the next leaves out one that it would wait for.
        fill: idle times shorter than a W take one ``never``, where they would make the longest idle time of all
            stages grow (``level``), or ``always``.
    """

    warm_up: str
    skip: bool
    fill: str


class _Greedy:
    """Builds an order in rounds: in round ``j`` every stage, from the last to the first, runs I ``j`` and a forward.

    From last to first, because I ``j`` needs that of the stage after it, while each stage has at least one forward
    more behind it than the stage after it, so that no forward is asked for before it is there.
    """

    def __init__(self, micro_batches: int, costs: StepCosts, limit: int, rules: _Rules) -> None:
        self.m, self.costs, self.limit, self.rules = micro_batches, costs, limit, rules
        stages = range(len(costs.forward))
        self.close = 1e-9 * (sum(costs.forward) + sum(costs.input_grad) + costs.hop)  # two times that are the same
        self.now, self.idle = [0.0 for _ in stages], [0.0 for _ in stages]
        self.stashes = [0 for _ in stages]  # micro-batches between their I and their W
        self.letters: list[list[str]] = [[] for _ in stages]
        self.forward_end: list[list[float]] = [[] for _ in stages]
        self.input_grad_end: list[list[float]] = [[] for _ in stages]

    def build(self) -> Orders:
        stages = range(len(self.now))
        self._warm_up()
        for j in range(self.m):
            for stage in reversed(stages):
                self._input_grad(stage, j)
                if len(self.forward_end[stage]) < self.m and not self._skips(stage):
                    self._forward(stage)
        return tuple("".join(self.letters[stage]) + "W" * self.stashes[stage] for stage in stages)

    def _warm_up(self) -> None:
        """Forwards before the first I, counted from the last stage to the first."""
        last = len(self.now) - 1
        for stage in range(last + 1):
            before = self.forward_end[stage - 1] if stage else [0.0] * min(self.m, self.limit)
            for arrival in before:
                self._run(stage, "F", arrival + (self.costs.hop if stage else 0.0))
        least, first_input_grad = 1, 0.0
        for stage in range(last, -1, -1):
            end, most = self.forward_end[stage], self.m if self.m <= self.limit else self.limit - stage
            fit = 1 if stage == last else sum(moment <= first_input_grad + self.close for moment in end)
            if self.rules.warm_up == "evenly":
                fit = 1 + (self.limit - 1) * (last - stage) // max(last, 1)
            elif self.rules.warm_up == "more" and stage < last:
                fit += fit < len(end) and end[fit] - self.costs.forward[stage] < first_input_grad - self.close
            count = max(least, min(fit, most))
            del end[count:], self.letters[stage][count:]
            self.now[stage] = end[-1]
            self.idle[stage] = end[-1] - end[0] - (count - 1) * self.costs.forward[stage]
            first_input_grad = max(first_input_grad, end[-1]) + self.costs.input_grad[stage] + self.costs.hop
            least = min(count + 1, self.m)

    def _input_grad(self, stage: int, j: int) -> None:
        while self.stashes[stage] and self._memory(stage) + self.costs.stash - 1 > self.limit + 1e-6:
            self._weight_grad(stage)
        last = stage == len(self.now) - 1
        arrival = 0.0 if last else self.input_grad_end[stage + 1][j] + self.costs.hop
        self._fill(stage, arrival)
        self._run(stage, "I", arrival)
        self.stashes[stage] += 1

    def _forward(self, stage: int) -> None:
        while self.stashes[stage] and self._memory(stage) + 1 > self.limit + 1e-6:
            self._weight_grad(stage)
        arrival = self._arrival(stage)
        self._fill(stage, arrival)
        self._run(stage, "F", arrival)

    def _skips(self, stage: int) -> bool:
        """Whether the stage would wait for its next forward and can do without it in this round."""
        if not self.rules.skip or stage == len(self.now) - 1:
            return False
        ahead = len(self.forward_end[stage]) - len(self.forward_end[stage + 1])
        work = self.stashes[stage] * self.costs.weight_grad[stage]
        return ahead > 1 and self._arrival(stage) > self.now[stage] + work + self.close

    def _arrival(self, stage: int) -> float:
        """When the input of the stage's next forward is there."""
        return self.forward_end[stage - 1][len(self.forward_end[stage])] + self.costs.hop if stage else 0.0

    def _memory(self, stage: int) -> float:
        """Activations held, in micro-batches; a stash counts its share."""
        in_flight = len(self.forward_end[stage]) - len(self.input_grad_end[stage])
        return in_flight + self.stashes[stage] * self.costs.stash

    def _fill(self, stage: int, until: float) -> None:
        """Use the time before something arrives for W."""
        while self.stashes[stage] and self.now[stage] + self.costs.weight_grad[stage] <= until + self.close:
            self._weight_grad(stage)
        gap = until - self.now[stage]
        if gap > self.close and self.stashes[stage]:
            grows = self.idle[stage] + gap > max(self.idle) + self.close
            if self.rules.fill == "always" or (self.rules.fill == "level" and grows):
                self._weight_grad(stage)

    def _weight_grad(self, stage: int) -> None:
        self._run(stage, "W", 0.0)
        self.stashes[stage] -= 1

    def _run(self, stage: int, letter: str, arrival: float) -> None:
        start = max(self.now[stage], arrival)
        self.idle[stage] += start - self.now[stage]
        if letter == "F":
            self.now[stage] = start + self.costs.forward[stage]
            self.forward_end[stage].append(self.now[stage])
        elif letter == "I":
            self.now[stage] = start + self.costs.input_grad[stage]
            self.input_grad_end[stage].append(self.now[stage])
        else:
            self.now[stage] = start + self.costs.weight_grad[stage]
        self.letters[stage].append(letter)


def _longest_stage(orders: Orders, costs: StepCosts) -> float:
    """Longest time between a stage's first start and its last end, where everything starts as early as it can."""
    stages = range(len(orders))
    ends: dict[str, list[list[float]]] = {letter: [[] for _ in stages] for letter in "FIW"}
    times = dict(zip("FIW", (costs.forward, costs.input_grad, costs.weight_grad), strict=True))
    now, done = [0.0 for _ in stages], [0 for _ in stages]
    waiting = list(stages)[::-1]
    while waiting:
        stage = waiting.pop()
        clock, at = now[stage], done[stage]
        for letter in itertools.islice(orders[stage], at, None):
            own = ends[letter][stage]
            other = stage - 1 if letter == "F" else stage + 1
            if letter != "W" and other in stages:
                there = ends[letter][other]
                if len(there) <= len(own):
                    break
                clock = max(clock, there[len(own)] + costs.hop)
            clock += times[letter][stage]
            own.append(clock)
            at += 1
        if at > done[stage]:
            waiting += [other for other in (stage - 1, stage + 1) if other in stages]
        now[stage], done[stage] = clock, at
    assert done == [len(order) for order in orders], "an order that cannot run"
    return max(now[stage] - ends["F"][stage][0] + costs.forward[stage] for stage in stages)


def _peak(order: str, stash: float) -> float:
    """Most activations held at once, in micro-batches: F adds one, I gives back all but the stash, W the stash."""
    change = {"F": 1.0, "I": stash - 1, "W": -stash}
    return max(itertools.accumulate(change[letter] for letter in order))


def _candidates(micro_batches: int, costs: StepCosts, limit: int) -> Iterator[Orders]:
    """What the search chooses from; within ``limit``, except that one stash may always stand beside its activation."""
    stages = len(costs.forward)
    shape = Shape(num_stages=stages, accumulation=micro_batches)
    for ahead in (1, 2):
        codes = [hand_written(shape, stage, ahead) for stage in range(stages)]
        orders = tuple("".join(OPS[op].value for op in decode_fields(code)[1].tolist()) for code in codes)
        if all(_peak(order, costs.stash) <= limit + max(0, costs.stash - 1) + 1e-6 for order in orders):
            yield orders
    choices = itertools.product(("fit", "more", "evenly"), (False, True), ("level", "always", "never"))
    for rules in itertools.starmap(_Rules, choices):
        for held in range(stages, limit + 1, stages):  # so that zb-2p never loses to zb-1p
            yield _Greedy(micro_batches, costs, held, rules).build()


@lru_cache(maxsize=64)
def _search(micro_batches: int, costs: StepCosts, limit: int) -> Orders:
    """The best candidate, the first of equals."""
    best: Orders = ()
    shortest = float("inf")
    for orders in dict.fromkeys(_candidates(micro_batches, costs, limit)):
        length = _longest_stage(orders, costs)
        if not best or length < shortest * (1 - 1e-9):
            best, shortest = orders, length
    return best


def _order(shape: Shape, stage: int, *, held: int) -> Codes:
    costs = shape.costs.per_stage(shape.num_stages)
    order = _search(shape.accumulation, costs, held * shape.num_stages)[stage]
    letters = np.frombuffer(order.encode(), dtype=np.uint8)
    codes = np.empty(len(letters), dtype=np.int64)
    for op in _LETTERS:
        codes[letters == ord(op.value)] = encode(stage, op, np.arange(shape.accumulation))
    return codes


def _check(shape: Shape) -> None:
    size = shape.num_stages * shape.accumulation
    limits.check_actions(
        size,
        "a searched schedule is computed for",
        limits.MOST_SEARCHED,
        "stages or micro-batches, or use zb-h1",
    )
    shape.costs.per_stage(shape.num_stages)


def _family(name: str, held: int) -> ScheduleFamily:
    """The searched schedule whose stages hold at most ``held * P`` activations."""
    return flush_family(
        name,
        partial(_order, held=held),
        lambda shape, stage: min(held * shape.num_stages, shape.accumulation),
        split=True,
        takes_costs=True,
        check=_check,
    )


ZB_1P = _family("zb-1p", 1)
ZB_2P = _family("zb-2p", 2)
