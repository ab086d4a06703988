"""Partitions of ranks with several pieces: against all partitions, the simulator's memory, and limits of memory."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from paci_rt import schedules
from paci_rt.planner import plan, stage_costs, step_costs
from paci_rt.planner.candidate import Candidate
from paci_rt.planner.rank_cuts import cuts_by_rank
from paci_rt.planner.rank_loads import RankKeeps, RankLoads, moments_by_piece
from paci_rt.planner.rank_partition import best_by_rank, least_full
from paci_rt.schedules import Placement, policies
from paci_rt.simulate import simulate
from support.profiles import cuts, evaluator, model, random_model

EXACT = 2e-6
"""The search knows times to one millionth."""


def even(blocks: int, stages: int) -> tuple[int, ...]:
    return tuple(blocks // stages + (stage >= stages - blocks % stages) for stage in range(stages))


def ends(loads: RankLoads, cut: tuple[int, ...]):
    at = np.cumsum((0, *cut))
    return at[loads.stages], at[loads.stages + 1]


def slowest(loads: RankLoads, cut: tuple[int, ...]) -> float:
    return float(loads.seconds(slice(None), *ends(loads, cut)).max())


def fullest(loads: RankLoads, cut: tuple[int, ...]) -> float:
    return float(loads.bytes_of_all(*ends(loads, cut)).max())


def squares(loads: RankLoads, cut: tuple[int, ...]) -> float:
    return float((loads.piece_seconds(slice(None), *ends(loads, cut)) ** 2).sum())


def some_loads(rng: np.random.Generator, name: str | None, *, chunks: int = 2, equal: bool = False) -> RankLoads:
    """A small model on unequal devices, some of which recompute; ranks hold some of each piece's activations."""
    ranks = int(rng.integers(1, 5 if chunks == 2 else 4))
    blocks = int(rng.integers(ranks * chunks, ranks * chunks + 5))
    places = Placement(num_stages=ranks * chunks, chunks=chunks, name=name)
    twice = rng.random(ranks) < 0.3
    keeps = [
        RankKeeps(
            rng.uniform(2, 5), rng.integers(0, 6, (3, chunks)).astype(float), rng.integers(0, 3, (3, chunks)) * 1.0
        )
        for _ in range(ranks)
    ]
    return RankLoads(
        profile=model(blocks) if equal else random_model(rng, blocks),
        places=places,
        speeds=rng.uniform(0.5, 2.0, ranks).tolist(),
        again=[bool(twice[places.rank_of(stage)]) for stage in range(places.num_stages)],
        keeps=keeps,
    )


def all_of(loads: RankLoads) -> list[tuple[int, ...]]:
    return list(cuts(loads.profile.middle, loads.places.num_stages))


def start_of(loads: RankLoads) -> tuple[int, ...]:
    return even(loads.profile.middle, loads.places.num_stages)


# -------------------------------------------------------------------------------------------- against all partitions


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", ["v", None])
@pytest.mark.parametrize("seed", range(25))
def test_no_partition_has_a_faster_slowest_rank(seed, name, lean):
    loads = some_loads(np.random.default_rng(seed), name)
    found = best_by_rank(loads, start_of(loads), lean=lean)
    assert sum(found) == loads.profile.middle and min(found) >= 1
    assert slowest(loads, found) <= min(slowest(loads, cut) for cut in all_of(loads)) * (1 + EXACT)


@pytest.mark.parametrize("name", ["v", None])
@pytest.mark.parametrize("seed", range(40))
def test_no_partition_within_the_memory_is_faster(seed, name):
    rng = np.random.default_rng(seed)
    loads = some_loads(rng, name)
    needs = {cut: fullest(loads, cut) for cut in all_of(loads)}
    limit = float(rng.choice(list(needs.values()))) * (1 + 1e-9)
    within = replace(loads, limits_bytes=(limit,) * loads.places.ranks)
    fastest = min(slowest(loads, cut) for cut, need in needs.items() if need <= limit)
    found = best_by_rank(within, start_of(loads))
    assert needs[found] <= limit
    assert slowest(loads, found) <= fastest * (1 + EXACT)
    nothing = replace(loads, limits_bytes=(min(needs.values()) * 0.99,) * loads.places.ranks)
    assert best_by_rank(nothing, start_of(loads)) is None
    assert needs[least_full(nothing, start_of(loads))] >= min(needs.values())


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(15))
def test_of_equal_blocks_in_a_circle_of_any_depth_none_is_faster(seed, chunks):
    loads = some_loads(np.random.default_rng(seed), None, chunks=chunks, equal=True)
    found = best_by_rank(loads, start_of(loads))
    assert slowest(loads, found) <= min(slowest(loads, cut) for cut in all_of(loads)) * (1 + EXACT)


@pytest.mark.parametrize("name", ["v", None])
@pytest.mark.parametrize("seed", range(15))
def test_among_equals_pieces_are_even_or_the_fullest_rank_holds_the_least(seed, name):
    loads = some_loads(np.random.default_rng(seed), name, equal=True)
    fastest = min(slowest(loads, cut) for cut in all_of(loads))
    equals = [cut for cut in all_of(loads) if slowest(loads, cut) <= fastest * (1 + 1e-7)]
    start = start_of(loads)
    found = best_by_rank(loads, start)
    assert squares(loads, found) == pytest.approx(min(squares(loads, cut) for cut in equals), rel=1e-3)
    lean = best_by_rank(loads, start, lean=True)
    assert fullest(loads, lean) == pytest.approx(min(fullest(loads, cut) for cut in equals), rel=1e-5)


def test_a_dear_head_shares_its_rank_in_a_v_with_less_of_the_first_half():
    """Twelve blocks, and a head that takes four and a half: by stage rank 1 of 2 in a circle would take 9.5."""
    light = model(12)
    last = replace(light.blocks[-1], forward_s=0.045, input_grad_s=0.045, weight_grad_s=0.036)
    first = replace(light.blocks[0], forward_s=0.0, input_grad_s=0.0)
    profile = replace(light, blocks=(first, *light.blocks[1:-1], last))

    def seconds(name: str | None) -> list[float]:
        places = Placement(num_stages=4, chunks=2, name=name)
        loads = RankLoads(profile=profile, places=places, speeds=(1.0, 1.0), again=(False,) * 4)
        cut = best_by_rank(loads, (3, 4, 4, 1))
        return (loads.seconds(slice(None), *ends(loads, cut)) / 0.028).tolist()

    assert seconds("v") == pytest.approx([8.5, 8.0])
    assert seconds(None) == pytest.approx([8.0, 8.5])


# -------------------------------------------------------------------------------------------------------- large cases


@pytest.mark.parametrize(
    ("ranks", "chunks", "blocks", "name"), [(64, 2, 192, "v"), (32, 2, 96, None), (8, 3, 96, None)]
)
@pytest.mark.parametrize("equal", [True, False])
def test_many_ranks_take_seconds_and_give_the_same_again(ranks, chunks, blocks, name, equal):
    profile = model(blocks) if equal else random_model(np.random.default_rng(1), blocks)
    places = Placement(num_stages=ranks * chunks, chunks=chunks, name=name)
    loads = RankLoads(profile=profile, places=places, speeds=(1.0,) * ranks, again=(False,) * ranks * chunks)
    begin = time.process_time()
    found = best_by_rank(loads, even(blocks, ranks * chunks))
    assert time.process_time() - begin < 20  # below one on an idle core
    assert found == best_by_rank(loads, even(blocks, ranks * chunks))
    bound = sum(block.compute_s for block in profile.blocks) / ranks
    dearest = max(block.compute_s for block in profile.blocks)
    assert bound <= slowest(loads, found) <= bound + 2 * dearest


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("policy", ["bounded", "recompute"])
@pytest.mark.parametrize("name", [name for name, one in schedules.FAMILIES.items() if one.chunks == 2])
def test_memory_of_a_rank_is_the_simulators(name, policy):
    family, profile = schedules.get(name), random_model(np.random.default_rng(3), 11)
    cut = (1, 2, 1, 3, 2, 2)
    one = Candidate(schedule=name, policy=policy, accumulation=6, chunks=2, partition=cut)
    costs = stage_costs(profile, cut, device_speeds=(1.0,) * 3, placement=family.placement)
    one = replace(one, step_costs=step_costs(costs, one.recomputing(3)) if family.takes_costs else None)
    shape = one.shape(3)
    run = simulate(family, shape, costs, policy=policy, windows=6)
    keeps = [
        RankKeeps(0.0, *moments_by_piece(family, shape, rank), policies.recomputes(policy, family, shape, rank))
        for rank in range(3)
    ]
    places = Placement(num_stages=6, chunks=2, name=family.placement)
    again = one.recomputing(3)
    loads = RankLoads(profile=profile, places=places, speeds=(1.0,) * 3, again=again, keeps=keeps)
    found = loads.bytes_of_all(*ends(loads, cut)).tolist()
    simulated = [run.peak_activation_bytes[rank] for rank in range(3)]
    if policy == "bounded":
        assert found == pytest.approx(simulated, rel=1e-12)  # whole numbers of bytes
    else:  # which piece runs again when is not weighed: the largest may at any moment
        assert all(mine >= theirs * (1 - 1e-12) for mine, theirs in zip(found, simulated, strict=True))


def test_a_plan_looks_for_partitions_within_the_memory():
    """A limit that the fastest partition of every rank breaks, and another partition keeps."""
    options = {"stages": 2, "accumulations": [8], "policies": ["bounded"], "delay_limit": None}
    for name in ("zb-v", "interleaved-1f1b", "paci-v"):
        free = plan(model(12), **options, schedules=[name]).chosen
        needs = {
            cut: max(evaluator(model(12), 2).simulate(replace(free, partition=cut, step_costs=None),
                     schedules.get(name)).predicted.peak_memory_bytes)
            for cut in cuts(12, 4)
        }  # fmt: skip
        limit = (min(needs.values()) + max(free.predicted.peak_memory_bytes)) / 2
        assert limit < max(free.predicted.peak_memory_bytes), name
        found = plan(model(12), **options, schedules=[name], memory_limit_bytes=limit).chosen
        assert max(found.predicted.peak_memory_bytes) <= limit
        with pytest.raises(ValueError, match="the least that any needs is"):
            plan(model(12), **options, schedules=[name], memory_limit_bytes=min(needs.values()) * 0.5)


@pytest.mark.parametrize("name", ["paci-v", "zb-v", "interleaved-1f1b", "looped-bfs"])
def test_a_plan_is_as_fast_as_the_best_of_what_it_had_to_choose_from(name):
    profile, family = random_model(np.random.default_rng(5), 10), schedules.get(name)
    judge = evaluator(profile, 2)
    one = Candidate(schedule=name, policy="bounded", accumulation=8, chunks=2)
    offered = cuts_by_rank(
        profile, one, family, speeds=(1.0, 1.0), limits_bytes=judge.limits.memory_bytes, by_stage=even(10, 4)
    )
    rates = [judge.simulate(replace(one, partition=cut), family).predicted.micro_batches_per_s for cut in offered]
    chosen = plan(profile, stages=2, accumulations=[8], schedules=[name], policies=["bounded"], delay_limit=None).chosen
    assert len(set(offered)) == len(offered)
    assert chosen.predicted.micro_batches_per_s >= 0.989 * max(rates)
    if name == "paci-v":  # its order is fitted to the partition that it is planned for
        costs = stage_costs(profile, chosen.partition, device_speeds=(1.0, 1.0), placement="v")
        assert chosen.step_costs == step_costs(costs, (False,) * 4)
