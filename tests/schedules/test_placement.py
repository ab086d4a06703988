from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest

from paci_rt import schedules
from paci_rt.schedules import FAMILIES, Placement, Shape
from paci_rt.schedules.base import check_shape, check_takes
from paci_rt.schedules.lowering import Lowering

ALL = [
    *(("line", ranks, 1) for ranks in (1, 2, 3, 8)),
    *(("circle", ranks, chunks) for ranks, chunks in itertools.product((1, 2, 3, 8), (1, 2, 3))),
    *(("v", ranks, 2) for ranks in (1, 2, 3, 4, 8)),
]


@pytest.mark.parametrize(("name", "ranks", "chunks"), ALL)
def test_every_stage_lies_on_one_rank(name: str, ranks: int, chunks: int) -> None:
    placement = Placement(num_stages=ranks * chunks, chunks=chunks, name=name)
    assert placement.ranks == ranks
    held = [list(placement.stages_of(rank)) for rank in range(ranks)]
    assert sorted(itertools.chain(*held)) == list(range(ranks * chunks))
    for rank, stages in enumerate(held):
        assert stages == sorted(stages) and len(stages) == chunks
        assert [placement.rank_of(stage) for stage in stages] == [rank] * chunks
        assert [placement.chunk_of(stage) for stage in stages] == list(range(chunks))
    every = np.arange(ranks * chunks)
    assert placement.rank_of(every).tolist() == [placement.rank_of(int(stage)) for stage in every]
    stays = [placement.rank_of(stage) == placement.rank_of(stage + 1) for stage in range(ranks * chunks - 1)]
    assert [placement.local(stage) for stage in range(ranks * chunks)] == [*stays, False]


def test_a_v_turns_on_the_last_rank() -> None:
    v = Placement(num_stages=8, chunks=2, name="v")
    assert [list(v.stages_of(rank)) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert [v.local(stage) for stage in range(8)] == [False, False, False, True, False, False, False, False]


def test_a_shape_follows_its_placement() -> None:
    v = Shape(num_stages=6, accumulation=2, chunks=2, placement="v")
    assert (v.ranks, [list(v.stages_of(rank)) for rank in range(3)]) == (3, [[0, 5], [1, 4], [2, 3]])
    circle = Shape(num_stages=6, accumulation=2, chunks=2)
    assert (circle.placement, list(circle.stages_of(1))) == ("circle", [1, 4])
    assert Shape(num_stages=6, accumulation=2).placement == "line"
    assert Shape(num_stages=6, accumulation=2) == Shape(num_stages=6, accumulation=2, placement="circle")
    assert circle != v
    assert replace(v, accumulation=4).rank_of(5) == 0 and pickle.loads(pickle.dumps(v)) == v


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"name": "w"}, "placement is 'w': give one of line, circle, v"),
        ({"name": "line", "chunks": 2}, "a line has one stage a rank"),
        ({"name": "v", "chunks": 1}, "a V has two stages a rank"),
        ({"name": "v", "chunks": 3}, "a V has two stages a rank"),
        ({"name": "v", "chunks": 2, "num_stages": 3}, "num_stages is 3 and chunks 2"),
        ({"num_stages": 0}, "num_stages is 0"),
    ],
)
def test_placements_that_cannot_be_are_refused(given: dict, why: str) -> None:
    given = {"num_stages": 6, **given}
    with pytest.raises(ValueError, match=why):
        Placement(**given)
    given["placement"] = given.pop("name", None)
    with pytest.raises(ValueError, match=why):
        Shape(accumulation=2, **given)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_schedule_runs_in_its_own_placement_alone(name: str) -> None:
    family = FAMILIES[name]
    assert family.chunks == {"line": 1, "circle": 2, "v": 2}[family.placement]
    assert family.takes_chunks == (family.placement == "circle")
    other = "circle" if family.placement == "v" else "v"
    accumulation = 1 if family.one_micro_batch_windows else 8
    shape = Shape(num_stages=4, accumulation=accumulation, chunks=2, placement=other)
    with pytest.raises(ValueError, match=f"{name} (takes no chunks|places its stages in a {family.placement})"):
        check_shape(family, shape)
    with pytest.raises(ValueError, match=name):
        Lowering(family=family, shape=shape)


def test_chunks_of_a_v_are_two() -> None:
    family = replace(schedules.get("1f1b"), name="some-v", placement="v")
    for chunks in (1, 3):
        with pytest.raises(ValueError, match=rf"--chunks is {chunks}: some-v has two stages a rank.*use --chunks 2"):
            check_takes(family, chunks=chunks, prefix="--")
    check_takes(family, chunks=2)
    check_takes(family)
