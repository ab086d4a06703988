"""Candidates for a plan: cuts against brute force, memory against the simulator, limits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paci_rt import schedules
from paci_rt.planner import Profile, plan, stage_costs
from paci_rt.planner.candidate import Candidate
from paci_rt.planner.evaluate import Evaluator
from paci_rt.schedules import Shape, policies
from paci_rt.simulate import simulate
from support.profiles import cuts, evaluator, model, random_model

# ------------------------------------------------------------------------------------------------------ stage costs


def test_costs_of_stages_count_embedding_and_head():
    costs = stage_costs(model(4), (1, 3))
    assert costs.forward_s == pytest.approx((0.011, 0.035))
    assert costs.input_grad_s == pytest.approx((0.011, 0.039))
    assert costs.weight_grad_s == pytest.approx((0.008, 0.024))
    assert costs.weight_bytes == (4000, 6000)
    assert costs.update_s == pytest.approx((4e-4, 6e-4))
    assert costs.activation_bytes == (1000, 2800)
    assert costs.stash_bytes == (700, 2100)
    assert costs.input_bytes == (16, 100)
    assert costs.message_bytes == (100, 100)


def test_a_device_of_half_the_speed_takes_twice_as_long():
    whole = stage_costs(model(4), (1, 1, 1, 1))
    uneven = stage_costs(model(4), (1, 1, 1, 1), device_speeds=(1, 0.5))  # two chunks a device
    for name in ("forward_s", "input_grad_s", "weight_grad_s", "update_s"):
        assert getattr(uneven, name) == tuple(
            pytest.approx(value * factor) for value, factor in zip(getattr(whole, name), (1, 2, 1, 2), strict=True)
        )
    assert uneven.weight_bytes == whole.weight_bytes


@pytest.mark.parametrize(
    ("partition", "speeds", "words"),
    [
        ((4, 5), None, "partition 4,5 must give every stage at least one block and add up to 8"),
        ((0, 8), None, "partition 0,8 must"),
        ((), None, "of no stages"),
        ((3, 5), (1, 0), "device speed 0: give numbers above 0"),
        ((2, 2, 4), (1, 1), "3 stages on 2 devices"),
    ],
)
def test_costs_of_stages_that_cannot_be(partition, speeds, words):
    with pytest.raises(ValueError, match=words):
        stage_costs(model(8), partition, device_speeds=speeds)


# --------------------------------------------------------------------------------------------------- cuts and memory


@pytest.mark.parametrize("seed", range(40))
def test_the_cut_is_the_best_of_all_that_fit(seed):
    """Uneven blocks, unequal devices, a memory limit: against every cut, with the simulator's own peak memory."""
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(3, 8))
    stages = int(rng.integers(2, min(blocks, 4) + 1))
    profile, speeds = random_model(rng, blocks), tuple(rng.uniform(0.5, 2.0, stages).tolist())
    name, policy = (("paci", "bounded"), ("zb-h1", "bounded"), ("paci", "stash"), ("gpipe", "recompute"))[seed % 4]
    family, accumulation = schedules.get(name), int(rng.integers(1, 5))
    shape = Shape(num_stages=stages, accumulation=accumulation)
    ahead = (name, policy) == ("paci", "bounded")
    versions = [policies.copies_held(policy, family, shape, rank, ahead) for rank in range(stages)]

    def outcome(partition: tuple[int, ...]) -> tuple[float, float]:
        """Seconds of the dearest stage and bytes of the fullest."""
        costs = stage_costs(profile, partition, device_speeds=speeds)
        run = simulate(family, shape, costs, policy=policy, windows=8)
        times = costs.forward_s, costs.input_grad_s, costs.weight_grad_s
        twice = [policies.recomputes(policy, family, shape, rank) for rank in range(stages)]
        seconds = max((1 + again) * f + i + w for again, f, i, w in zip(twice, *times, strict=True))
        copies = [1 + profile.state_bytes_per_parameter_byte + extra for extra in versions]
        weights = [copy * size for copy, size in zip(copies, costs.weight_bytes, strict=True)]
        return seconds, max(weight + run.peak_activation_bytes[rank] for rank, weight in enumerate(weights))

    outcomes = {cut: outcome(cut) for cut in cuts(blocks, stages)}
    limit = float(rng.choice([size for _, size in outcomes.values()])) * (1 + 1e-9)
    fastest = min(seconds for seconds, size in outcomes.values() if size <= limit)
    found = plan(
        profile, stages=stages, accumulations=[accumulation], memory_limit_bytes=limit, device_speeds=speeds,
        schedules=[name], policies=[policy], slack=0, delay_limit=None, lookahead=ahead,
    ).chosen  # fmt: skip
    assert outcomes[found.partition][0] == pytest.approx(fastest, rel=1e-9)
    assert outcomes[found.partition][1] <= limit
    assert max(found.predicted.peak_memory_bytes) == int(outcomes[found.partition][1])
    least = min(size for _, size in outcomes.values())
    with pytest.raises(ValueError, match="the least that any needs is") as caught:
        plan(
            profile, stages=stages, accumulations=[accumulation], memory_limit_bytes=least * 0.999,
            device_speeds=speeds, schedules=[name], policies=[policy], slack=0, delay_limit=None, lookahead=ahead,
        )  # fmt: skip
    assert f"needs {least / 2**20:,.1f} MiB" in str(caught.value)


@pytest.mark.parametrize("name", schedules.FAMILIES)
def test_every_schedule_and_policy_is_planned_within_its_bounds(name):
    """Simulated, each keeps below its analytic bound of throughput and its bounds of drift and delay."""
    family = schedules.get(name)
    for accumulation in (1,) if family.one_micro_batch_windows else (4, 8):
        found = plan(model(8, hop_s=1e-4), stages=4, accumulations=[accumulation], schedules=[name], delay_limit=None)
        assert {one.schedule for one in found.candidates} == {name}
        simulated = [one for one in found.candidates if one.predicted]
        assert {one.policy for one in simulated} | {one.policy for one in found.candidates if one.rejected} == set(
            family.policies
        )
        for one in simulated:
            bound = evaluator(model(8), 4).at_most(one, family)
            assert 0 < one.predicted.micro_batches_per_s <= bound * (1 + 1e-9)
            assert 0 < one.predicted.utilization <= 1
            assert len(one.partition) == 4 * one.chunks
            assert len(one.predicted.peak_memory_bytes) == 4
            assert (one.step_costs is not None) == family.takes_costs
            assert json.dumps(one.to_json())


def test_searched_schedules_keep_within_the_memory():
    """Their order depends on the cut and the cut on what the order keeps."""
    free = plan(model(8), stages=4, accumulations=[8], schedules=["zb-2p"], policies=["bounded"]).chosen
    limit = 0.9 * max(free.predicted.peak_memory_bytes)
    tight = plan(
        model(8), stages=4, accumulations=[1, 2, 4, 8], memory_limit_bytes=limit, schedules=["zb-2p"],
        policies=["bounded"],
    ).chosen  # fmt: skip
    assert max(tight.predicted.peak_memory_bytes) <= limit
    assert tight.predicted.micro_batches_per_s < free.predicted.micro_batches_per_s


def test_chunks_have_their_limits_checked():
    found = plan(model(8), stages=2, accumulations=[4], schedules=["interleaved-1f1b"], policies=["bounded"]).chosen
    assert found.chunks == 2 and len(found.partition) == 4
    with pytest.raises(ValueError, match=r"interleaved-1f1b with accumulation 4, policy bounded, 2 chunks \(needs"):
        plan(
            model(8), stages=2, accumulations=[4], schedules=["interleaved-1f1b"], policies=["bounded"],
            memory_limit_bytes=max(found.predicted.peak_memory_bytes) - 1,
        )  # fmt: skip


@pytest.mark.parametrize("policy", ["predict", "bounded"])
def test_masters_stand_in_for_the_copy_that_running_ahead_needs(policy):
    def peak(profile: Profile, **more) -> tuple[int, ...]:
        options = {"schedules": ["paci"], "policies": [policy], "slack": 0, "delay_limit": 1, **more}
        found = plan(profile, stages=2, accumulations=[2], **options).chosen
        assert found.lookahead == (policy == "bounded" and "lookahead" not in more)
        return found.predicted.peak_memory_bytes

    weights = stage_costs(model(8), (4, 4)).weight_bytes
    with_copy, without = peak(model(8)), peak(model(8, has_masters=True))
    assert (with_copy[0] - without[0], with_copy[1] - without[1]) == (weights[0], 0)  # none on the last stage
    if policy == "bounded":
        assert peak(model(8), lookahead=False) == without


def test_look_ahead_costs_by_the_bytes_that_it_moves():
    for masters, share in ((False, 32 / 28), (True, 24 / 30)):
        costs = stage_costs(model(8, has_masters=masters), (2, 2, 2, 2))
        assert costs.predict_s == pytest.approx([share * update for update in costs.update_s])


def test_candidates_that_cannot_win_are_not_simulated(monkeypatch):
    simulated = []

    def counting(self, one: Candidate, family) -> Candidate:
        simulated.append(one.accumulation)
        return original(self, one, family)

    original = Evaluator.simulate
    monkeypatch.setattr(Evaluator, "simulate", counting)
    plan(model(8), stages=8, accumulations=[1, 2, 64], schedules=["zb-1p"], policies=["bounded"])
    assert simulated == [64]
