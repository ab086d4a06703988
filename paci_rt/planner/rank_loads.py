"""Seconds and bytes of a rank that holds several pieces, for many partitions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from paci_rt.action import OPS, Op, decode_fields
from paci_rt.planner.profile import Profile
from paci_rt.schedules import Placement, ScheduleFamily, Shape
from paci_rt.simulate.costs import Floats

Ints = npt.NDArray[np.int64]
FIELDS = ("compute_s", "forward_s", "parameter_bytes", "activation_bytes", "stash_bytes")


@dataclass(frozen=True)
class RankKeeps:
    """What a rank keeps of its pieces.

    Attributes:
        copies: bytes per byte of its parameters: the weights, optimizer state, accumulator and further versions.
        forwards: ``[moment, piece]``: micro-batches between F and backward, at the moments when most is held.
        stashes: ``[moment, piece]``: those between I and W.
        recompute: whether forwards run twice.
    """

    copies: float
    forwards: Floats
    stashes: Floats
    recompute: bool = False


def moments_by_piece(family: ScheduleFamily, shape: Shape, rank: int) -> tuple[Floats, Floats]:
    """``forwards`` and ``stashes`` of :class:`RankKeeps`, from the order in which ``rank`` works."""
    windows = 1 if family.flush else 2 + -(-family.in_flight_bound(shape, rank) // shape.accumulation)
    stage, op, _ = decode_fields(family.stream(shape, rank, windows))
    mine = stage[:, None] == np.array(shape.stages_of(rank))
    is_op = {one: (op == OPS.index(one))[:, None] & mine for one in (Op.F, Op.B, Op.I, Op.W)}
    change = {one: of.astype(np.int64) for one, of in is_op.items()}
    forwards = np.cumsum(change[Op.F] - change[Op.B] - change[Op.I], axis=0)
    stashes = np.cumsum(change[Op.I] - change[Op.W], axis=0)
    held = np.unique(np.concatenate((forwards, stashes), axis=1), axis=0)
    kept: list[Ints] = []
    for row in held[::-1]:  # a row that exceeds another comes before it
        if not kept or not (np.array(kept) >= row).all(axis=1).any():
            kept.append(row)
    found = np.array(kept, dtype=np.float64)
    return found[:, : shape.chunks], found[:, shape.chunks :]


@dataclass(frozen=True, kw_only=True)
class RankLoads:
    """Sums over the pieces of a rank.

    Attributes:
        profile: what is cut. places: which rank holds which pieces. speeds: of each rank's device.
        again: which stages run their forwards twice.
        keeps: of each rank; None where memory does not matter.
        limits_bytes: of each rank.
    """

    profile: Profile
    places: Placement
    speeds: Sequence[float]
    again: Sequence[bool]
    keeps: Sequence[RankKeeps] | None = None
    limits_bytes: Sequence[float] | None = None

    @cached_property
    def stages(self) -> Ints:
        """``[rank, piece]``: the stages of each rank, in the order of the model."""
        return np.array([list(self.places.stages_of(rank)) for rank in range(self.places.ranks)], dtype=np.int64)

    @cached_property
    def _sums(self) -> dict[str, tuple[Floats, Floats]]:
        """By field of a block: sums over the middle blocks before each, and what the outer stages have besides."""
        roles = np.array([block.role for block in self.profile.blocks])
        found = {}
        for name in FIELDS:
            values = np.array([getattr(block, name) for block in self.profile.blocks], dtype=np.float64)
            besides = np.zeros(self.places.num_stages)
            besides[0] += values[roles == "first"].sum()
            besides[-1] += values[roles == "last"].sum()
            found[name] = np.concatenate(([0.0], np.cumsum(values[roles == "middle"]))), besides
        return found

    @cached_property
    def alike(self) -> bool:
        """Whether all middle blocks take equally long."""
        middle = [block for block in self.profile.blocks if block.role == "middle"]
        return len({(block.compute_s, any(self.again) and block.forward_s) for block in middle}) == 1

    @cached_property
    def _arriving(self) -> Floats:
        """Bytes that a micro-batch brings to a piece, by its first middle block."""
        before = sum(block.role == "first" for block in self.profile.blocks)
        sizes = [self.profile.input_bytes, *(block.boundary_bytes for block in self.profile.blocks)]
        return np.array([sizes[0], *sizes[before + 1 : before + self.profile.middle + 1]], dtype=np.float64)

    def _of(self, name: str, stages: Ints, starts: Ints, ends: Ints) -> Floats:
        sums, besides = self._sums[name]
        return np.asarray(sums[ends] - sums[starts] + besides[stages])

    def piece_seconds(self, rank: int | slice, starts: Ints, ends: Ints) -> Floats:
        """Seconds of a micro-batch on each piece of ``rank``; its pieces hold middle blocks ``starts ... ends - 1``,
        both ``[..., piece]``, or ``[..., rank, piece]`` for all ranks."""
        stages = self.stages[rank]
        total = self._of("compute_s", stages, starts, ends)
        if any(self.again):
            total = total + np.where(np.array(self.again)[stages], self._of("forward_s", stages, starts, ends), 0.0)
        return np.asarray(total / np.asarray(self.speeds, dtype=np.float64)[rank, None])

    def seconds(self, rank: int | slice, starts: Ints, ends: Ints) -> Floats:
        """:meth:`piece_seconds`, summed over the pieces."""
        return np.asarray(self.piece_seconds(rank, starts, ends).sum(axis=-1))

    def rank_bytes(self, rank: int, starts: Ints, ends: Ints) -> Floats:
        """Peak bytes of ``rank``, from the ``[..., piece]`` of :meth:`piece_seconds`."""
        assert self.keeps is not None
        keeps, stages = self.keeps[rank], self.stages[rank]
        weights = self._of("parameter_bytes", stages, starts, ends).sum(axis=-1)
        kept = self._of("activation_bytes", stages, starts, ends)
        during: Floats | float = 0.0
        if keeps.recompute:
            arriving = np.broadcast_to(self._arriving[starts], kept.shape)
            during, kept = np.maximum(kept - arriving, 0.0).max(axis=-1), arriving
        stashed = self._of("stash_bytes", stages, starts, ends)
        held = (kept @ keeps.forwards.T + stashed @ keeps.stashes.T).max(axis=-1)
        return np.asarray(keeps.copies * weights + held + during)

    def bytes_of_all(self, starts: Ints, ends: Ints) -> Floats:
        """``[..., rank]``: :meth:`rank_bytes` of all ranks, from ``[..., rank, piece]``."""
        found = [self.rank_bytes(rank, starts[..., rank, :], ends[..., rank, :]) for rank in range(self.places.ranks)]
        return np.stack(found, axis=-1)

    def fits(self, rank: int, starts: Ints, ends: Ints, most_s: float) -> npt.NDArray[np.bool_]:
        """Whether ``rank`` takes at most ``most_s`` and keeps within its memory."""
        fast = self.seconds(rank, starts, ends) <= most_s
        if self.limits_bytes is None:
            return np.asarray(fast)
        return np.asarray(fast & (self.rank_bytes(rank, starts, ends) <= self.limits_bytes[rank]))
