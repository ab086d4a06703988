"""Where to cut a model whose ranks hold several pieces each, in a circle or in a V.

A full pipeline runs as fast as its slowest *rank*: what counts is the sum of its pieces. First the slowest rank is made
as fast as possible within the memory, and then the next ones. Among partitions as fast, :func:`best_by_rank` takes the
one with the most even pieces, as orders made for equal pieces want it, or the one whose fullest rank holds the least.

Blocks are moved one by one from piece to piece, across those between, for as long as that is better. If all middle
blocks take equally long, no partition is faster than what that finds. If they do not, and ranks hold two pieces, a
search over all partitions that is not too large (``MOST_STATES``) finds what the moves did not, or that there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paci_rt.planner.rank_loads import Ints, RankLoads
from paci_rt.schedules.placement import V

STEPS = 1_000_000
"""What the slowest rank's time is measured in, so that partitions that are equally good come out equal to the bit."""
MOST_STATES = 300_000
"""Transitions of the exact search, about; beyond, the moves must do."""
EXACT = 1e-6
"""As a share: how exactly it knows the slowest rank's time."""

Keys = Callable[[Ints], Ints]
"""From cuts ``[partition, stages + 1]`` to ``[partition, key]``: the lexicographically least is the best."""


def best_by_rank(loads: RankLoads, start: tuple[int, ...], *, lean: bool = False) -> tuple[int, ...] | None:
    """Blocks of each stage; None where none is possible within the memory.

    Args:
        loads: of the ranks; ``lean`` needs what they keep.
        start: any partition, to begin with.
        lean: among equally fast ones the least on the fullest rank, rather than even pieces.

    Example:
        Two ranks in a V, and a last stage that takes three blocks longer. By stage the best would be 3, 3, 2, 1:

        >>> from paci_rt.planner import BlockProfile, Profile
        >>> from paci_rt.planner.rank_loads import RankLoads
        >>> from paci_rt.planner.rank_partition import best_by_rank
        >>> from paci_rt.schedules import Placement
        >>> sizes = {"parameter_bytes": 0, "activation_bytes": 0, "stash_bytes": 0, "boundary_bytes": 0}
        >>> def block(role, seconds):
        ...     times = {"forward_s": seconds, "input_grad_s": seconds, "weight_grad_s": seconds}
        ...     return BlockProfile(name=role, role=role, **times, **sizes)
        >>> profile = Profile(blocks=(block("middle", 1.0),) * 9 + (block("last", 3.0),))
        >>> places = Placement(num_stages=4, chunks=2, name="v")
        >>> loads = RankLoads(profile=profile, places=places, speeds=(1.0, 1.0), again=(False,) * 4)
        >>> best_by_rank(loads, (2, 2, 2, 3))
        (2, 3, 3, 1)
    """
    cuts = np.cumsum((0, *start))
    cuts = _by_time(loads, np.cumsum((0, *start)))
    fits = not _over(loads, cuts[None]).any()
    if not (fits and loads.alike):
        better = _exact(loads, _slowest_s(loads, cuts) if fits else None)
        if better is not None:
            cuts = _by_time(loads, better)
        elif not fits:
            return None
    second, slow = _by_bytes(loads, cuts) if lean else _by_evenness(loads, cuts), _ticks(loads, cuts)
    slowest = int(slow(cuts[None]).max())

    def key(some: Ints) -> Ints:
        too_slow = np.maximum(slow(some).max(axis=-1) - slowest, 0)
        return np.column_stack((_over(loads, some), too_slow, second(some)))

    return tuple(np.diff(_descend(loads, cuts, key)).tolist())


def least_full(loads: RankLoads, start: tuple[int, ...]) -> tuple[int, ...]:
    """Where nothing keeps all limits, blocks of each stage that come near to it: the device that is fullest, as a share
    of its limit, is as little full as moves from ``start`` can make it."""
    return tuple(np.diff(_by_time(loads, np.cumsum((0, *start)))).tolist())


# ----------------------------------------------------------------------------------------------------- what is better


def _ends(loads: RankLoads, cuts: Ints) -> tuple[Ints, Ints]:
    """First block of every piece and the one after its last, ``[..., rank, piece]``."""
    return cuts[..., loads.stages], cuts[..., loads.stages + 1]


def _slowest_s(loads: RankLoads, cuts: Ints) -> float:
    return float(loads.seconds(slice(None), *_ends(loads, cuts)).max())


def _ticks(loads: RankLoads, cuts: Ints) -> Keys:
    """Time of each rank, in shares of that of the slowest one under ``cuts``."""
    unit = _slowest_s(loads, cuts) / STEPS or 1.0
    return lambda some: np.rint(loads.seconds(slice(None), *_ends(loads, some)) / unit).astype(np.int64)


def _over(loads: RankLoads, cuts: Ints) -> Ints:
    """By how much the fullest rank breaks its limit, 0 where none does."""
    if loads.limits_bytes is None:
        return np.zeros(len(cuts), dtype=np.int64)
    share = (loads.bytes_of_all(*_ends(loads, cuts)) / np.array(loads.limits_bytes)).max(axis=-1)
    return np.where(share > 1, np.maximum(1, np.rint(np.minimum(share - 1, 1e9) * STEPS)), 0).astype(np.int64)


def _falling(values: Ints) -> Ints:
    return np.asarray(-np.sort(-values, axis=-1))


def _later(cuts: Ints) -> Ints:
    """Less where later stages hold more, for earlier ones have more micro-batches in flight."""
    return np.asarray(cuts[:, 1:].sum(axis=-1))


def _by_time(loads: RankLoads, cuts: Ints) -> Ints:
    """The fastest cuts that moves lead to, within the memory if they lead there."""
    ticks = _ticks(loads, cuts)
    return _descend(loads, cuts, lambda some: np.column_stack((_over(loads, some), _falling(ticks(some)))))


def _by_evenness(loads: RankLoads, cuts: Ints) -> Keys:
    unit = _slowest_s(loads, cuts) / 1e4 or 1.0

    def key(some: Ints) -> Ints:
        squares = np.rint((loads.piece_seconds(slice(None), *_ends(loads, some)) / unit) ** 2).sum(axis=(-1, -2))
        return np.column_stack((squares.astype(np.int64), _later(some)))

    return key


def _by_bytes(loads: RankLoads, cuts: Ints) -> Keys:
    unit, even = float(loads.bytes_of_all(*_ends(loads, cuts)).max()) / STEPS or 1.0, _by_evenness(loads, cuts)

    def key(some: Ints) -> Ints:
        fullest = np.rint(loads.bytes_of_all(*_ends(loads, some)).max(axis=-1) / unit).astype(np.int64)
        return np.column_stack((fullest, even(some)))

    return key


# -------------------------------------------------------------------------------------------------------------- moves


def _descend(loads: RankLoads, cuts: Ints, key_of: Keys) -> Ints:
    """Move a block from a piece to another one while that makes the key less, from the slowest rank first."""
    least = key_of(cuts[None])[0]
    improved = True
    while improved:
        improved = False
        order = np.argsort(-loads.seconds(slice(None), *_ends(loads, cuts)), kind="stable")
        for rank in order.tolist():
            moved = _moves(cuts, loads.stages[rank])
            if not len(moved):
                continue
            keys = key_of(moved)
            best = int(np.lexsort(keys.T[::-1])[0])
            if tuple(keys[best]) < tuple(least):
                cuts, least, improved = moved[best], keys[best], True
    return cuts


def _moves(cuts: Ints, pieces: Ints) -> Ints:
    """``cuts`` with a block less on one of ``pieces``, and one more on one of the other stages."""
    stages = np.arange(len(cuts) - 1)
    givers = pieces[np.diff(cuts)[pieces] > 1]
    giver, taker = (part.ravel() for part in np.meshgrid(givers, stages, indexing="ij"))
    giver, taker = giver[giver != taker], taker[giver != taker]
    at = np.arange(len(cuts))
    forward = (at > giver[:, None]) & (at <= taker[:, None])  # cuts between a giver and a later taker
    backward = (at > taker[:, None]) & (at <= giver[:, None])
    return np.asarray(cuts - forward + backward)


# -------------------------------------------------------------------------------------------------------- exact search


def _exact(loads: RankLoads, known_s: float | None) -> Ints | None:
    """The cuts whose slowest rank is fastest, if that is faster than ``known_s``; None where it is not, or where the
    search would be too large. ``known_s`` is None where nothing is known to fit into the memory."""
    ranks, blocks = loads.places.ranks, loads.profile.middle
    slack = blocks - 2 * ranks
    turns: list[int | None] = [None] if loads.places.name == V else list(range(ranks, ranks + slack + 1))
    if loads.places.chunks != 2 or len(turns) * ranks * (slack + 1) ** 2 > MOST_STATES:
        return None
    found, below_s = _within(loads, turns, np.inf if known_s is None else known_s * (1 - EXACT)), 0.0
    best = found
    while found is not None:
        known_s = _slowest_s(loads, found)
        best, found = found, None
        while found is None and known_s - below_s > EXACT * known_s:
            at_most_s = (known_s + below_s) / 2
            found = _within(loads, turns, at_most_s)
            below_s = below_s if found is not None else at_most_s
    return best


def _within(loads: RankLoads, turns: list[int | None], most_s: float) -> Ints | None:
    """Cuts with which no rank takes longer than ``most_s`` or more than its memory; None where there are none."""
    return next((cuts for turn in turns if (cuts := _reach(loads, turn, most_s)) is not None), None)


def _reach(loads: RankLoads, turn: int | None, most_s: float) -> Ints | None:
    """The same with ``turn`` blocks in the first half of a circle's stages; in a V there is no such number.

    Rank by rank: how many blocks its predecessors and it can have taken in the second half of the stages, given how
    many they took in the first. More is never worse.
    """
    ranks, blocks = loads.places.ranks, loads.profile.middle
    slack, none = blocks - 2 * ranks, -1
    most = np.full(slack + 1, none)  # index: blocks of the first half beyond one each
    most[0] = 0
    came: list[tuple[Ints, Ints]] = []
    for rank in range(ranks):
        left = ranks - 1 - rank
        before = np.arange(rank, rank + slack + 1)[:, None]
        after = before.T + 1
        top = blocks - after - 2 * left if turn is None else np.where(after <= turn - left, blocks - turn - left, none)
        most_after = _furthest(loads, rank, turn, most_s, (before, after), most[:, None], top)
        most_after = np.where((most[:, None] >= 0) & (after > before), most_after, none)
        came.append((most_after.argmax(axis=0), most))
        most = most_after.max(axis=0)
    first = np.arange(ranks, ranks + slack + 1)
    done = (most >= 0) & (most == blocks - first) & (first == (first if turn is None else turn))
    return _traced(came, int(done.argmax()), most, turn, blocks) if done.any() else None


def _furthest(
    loads: RankLoads, rank: int, turn: int | None, most_s: float, first: tuple[Ints, Ints], start: Ints, top: Ints
) -> Ints:
    """The most blocks of the second half, up to ``top``, that are taken once ``rank`` has its two pieces; -1 for none.

    Its first piece begins and ends after so many blocks of the first half as ``first`` says, and its second one begins
    after ``start`` of the second.
    """
    blocks = loads.profile.middle
    shape = np.broadcast_shapes(first[0].shape, first[1].shape)
    low = np.broadcast_to(start, shape).copy()
    high = np.maximum(np.broadcast_to(top, shape), low)
    none = low
    while (low < high).any():
        middle = (low + high + 1) // 2
        ends = (start, middle) if turn is not None else (blocks - middle, blocks - start)
        second = [one + (turn or 0) for one in ends]
        starts, stops = (
            np.stack(np.broadcast_arrays(np.minimum(mine, blocks), np.clip(other, 0, blocks)), axis=-1)
            for mine, other in zip(first, second, strict=True)
        )
        fits = loads.fits(rank, starts, stops, most_s)
        low, high = np.where(fits & (low < high), middle, low), np.where(fits, high, middle - 1)
        high = np.maximum(low, high)
    return np.where(low > none, low, -1)


def _traced(came: list[tuple[Ints, Ints]], at: int, most: Ints, turn: int | None, blocks: int) -> Ints:
    """The cuts that lead to state ``at`` of the last rank."""
    first, second = [len(came) + at], [int(most[at])]
    for rank, (source, before) in reversed(list(enumerate(came))):
        at = int(source[at])
        first.append(rank + at)
        second.append(int(before[at]))
    later = [blocks - one for one in second] if turn is None else [turn + one for one in second[::-1]]
    return np.array([*first[::-1], *later[1:]], dtype=np.int64)
