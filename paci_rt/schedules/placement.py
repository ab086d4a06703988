"""Which rank holds which stages: in a line, in a circle, or in a V.

With ``P`` ranks, rank ``r`` holds stage ``r`` in a line; stages ``r, r + P, r + 2P ...`` in a circle; and in a V stages
``r`` and ``2P - 1 - r``, so that the first and the last stage share rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paci_rt.schedules import limits
from paci_rt.wording import shown

LINE, CIRCLE, V = "line", "circle", "v"
PLACEMENTS = (LINE, CIRCLE, V)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which rank holds which stages.

    Attributes:
        num_stages: stages of all ranks together.
        chunks: stages of each rank.
        name: ``line``, ``circle`` or ``v``; None is a line for one stage a rank, and a circle for more.

    Raises:
        ValueError: an unknown name, a number out of range, stages that are not a multiple of ``chunks``, or chunks that
            the placement cannot have.

    Example:
        >>> from paci_rt.schedules import Placement
        >>> v = Placement(num_stages=6, chunks=2, name="v")
        >>> [list(v.stages_of(rank)) for rank in range(v.ranks)]
        [[0, 5], [1, 4], [2, 3]]
        >>> circle = Placement(num_stages=6, chunks=2)
        >>> circle.name, [circle.rank_of(stage) for stage in range(6)]
        ('circle', [0, 1, 2, 0, 1, 2])
    """

    num_stages: int
    chunks: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        limits.check_integer("num_stages", self.num_stages, 1, limits.MOST_STAGES)
        limits.check_integer("chunks", self.chunks, 1, limits.MOST_STAGES)
        if self.name is None or (self.name == CIRCLE and self.chunks == 1):
            object.__setattr__(self, "name", LINE if self.chunks == 1 else CIRCLE)
        if self.name not in PLACEMENTS:
            raise ValueError(f"placement is {shown(self.name)}: give one of {', '.join(PLACEMENTS)}")
        check_pieces(self.name, self.chunks)
        if self.num_stages % self.chunks:
            raise ValueError(
                f"num_stages is {self.num_stages} and chunks {self.chunks}: every rank holds as many stages, so give "
                "a multiple of chunks"
            )

    @classmethod
    def over(cls, ranks: int, name: str | None) -> Placement:
        """The placement called ``name`` on ``ranks`` ranks, where their stages need not be known: to find the rank of
        one that ran."""
        return cls(num_stages=2 * ranks, chunks=2, name=V) if name == V else cls(num_stages=ranks)

    @property
    def ranks(self) -> int:
        """Processes of the pipeline, ``P``."""
        return self.num_stages // self.chunks

    @property
    def last_rank(self) -> int:
        """The rank that holds the last stage."""
        return int(self.rank_of(self.num_stages - 1))

    def rank_of(self, stage: Any) -> Any:
        """The rank that holds ``stage``: an integer, or an array of them."""
        rank = stage % self.ranks
        if self.name != V:
            return rank
        return rank + (stage // self.ranks) * (self.ranks - 1 - 2 * rank)

    def chunk_of(self, stage: Any) -> Any:
        """Which of its rank's stages ``stage`` is, from 0, in the order of the model."""
        return stage // self.ranks

    def stages_of(self, rank: int) -> range:
        """The stages that ``rank`` holds, in the order of the model."""
        if self.name == V:
            return range(rank, self.num_stages - rank, self.num_stages - 1 - 2 * rank)
        return range(rank, self.num_stages, self.ranks)

    def local(self, stage: int) -> bool:
        """Whether what ``stage`` computes stays on its rank: the next stage is there too."""
        return stage + 1 < self.num_stages and self.rank_of(stage) == self.rank_of(stage + 1)


def check_pieces(placement: str | None, chunks: int) -> None:
    """Raise ValueError unless a rank can have ``chunks`` stages under ``placement``."""
    if placement == LINE and chunks != 1:
        raise ValueError(f"chunks is {chunks} and placement 'line': a line has one stage a rank, so give chunks 1")
    if placement == V and chunks != 2:
        raise ValueError(f"chunks is {chunks} and placement 'v': a V has two stages a rank, so give chunks 2")
