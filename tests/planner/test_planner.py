"""Plans: cuts against brute force, memory against the simulator, limits, and reading profiles."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from paci_rt import planner, schedules
from paci_rt.planner import BlockProfile, Profile, load_profile, parse_profile, plan, stage_costs
from paci_rt.planner.candidate import Candidate, Limits
from paci_rt.planner.evaluate import Evaluator
from paci_rt.schedules import Shape, policies
from paci_rt.simulate import simulate


def block(name: str, role: str = "middle", **values) -> BlockProfile:
    standard = {
        "forward_s": 0.010, "input_grad_s": 0.010, "weight_grad_s": 0.008, "parameter_bytes": 1000,
        "activation_bytes": 900, "stash_bytes": 700, "boundary_bytes": 100,
    }  # fmt: skip
    return BlockProfile(name=name, role=role, **{**standard, **values})


def model(blocks: int = 8, **values) -> Profile:
    """Equal blocks between a small embedding and a head that takes half a block's time."""
    light = {"weight_grad_s": 0.0, "stash_bytes": 0, "activation_bytes": 100}
    return Profile(
        blocks=(
            block("embedding", "first", forward_s=0.001, input_grad_s=0.001, parameter_bytes=3000, **light),
            *(block(f"h.{i}") for i in range(blocks)),
            block("head", "last", forward_s=0.005, input_grad_s=0.009, parameter_bytes=3000, **light),
        ),
        **{"input_bytes": 16, "update_s_per_byte": 1e-7, **values},
    )


def random_model(rng: np.random.Generator, blocks: int) -> Profile:
    def uneven(name: str, role: str) -> BlockProfile:
        seconds = rng.uniform(0.001, 0.02, 3)
        sizes = rng.integers(100, 2000, 4)
        return block(
            name, role, forward_s=seconds[0], input_grad_s=seconds[1], weight_grad_s=seconds[2],
            parameter_bytes=int(sizes[0]), activation_bytes=int(sizes[1] + sizes[2]), stash_bytes=int(sizes[2]),
            boundary_bytes=int(sizes[3]),
        )  # fmt: skip

    middle = (uneven(f"h.{i}", "middle") for i in range(blocks))
    return Profile(
        blocks=(uneven("embedding", "first"), *middle, uneven("head", "last")),
        input_bytes=int(rng.integers(10, 500)),
        update_s_per_byte=float(rng.uniform(0, 1e-6)),
        hop_s=float(rng.uniform(0, 0.003)),
        bandwidth_bytes_per_s=1e6,
    )


def cuts(blocks: int, stages: int):
    for at in itertools.combinations(range(1, blocks), stages - 1):
        yield tuple(np.diff((0, *at, blocks)).tolist())


def evaluator(profile: Profile, stages: int, *, memory: float = math.inf, speeds=None) -> Evaluator:
    return Evaluator(
        profile=profile, speeds=tuple(speeds or (1.0,) * stages), limits=Limits(memory_bytes=(memory,) * stages)
    )


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
        schedules=[name], policies=[policy], slack=0, delay_limit=None,
    ).chosen  # fmt: skip
    assert outcomes[found.partition][0] == pytest.approx(fastest, rel=1e-9)
    assert outcomes[found.partition][1] <= limit
    assert max(found.predicted.peak_memory_bytes) == int(outcomes[found.partition][1])
    least = min(size for _, size in outcomes.values())
    with pytest.raises(ValueError, match="the least that any needs is") as caught:
        plan(
            profile, stages=stages, accumulations=[accumulation], memory_limit_bytes=least * 0.999,
            device_speeds=speeds, schedules=[name], policies=[policy], slack=0, delay_limit=None,
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


# --------------------------------------------------------------------------------------------------------- the choice


def test_the_plan_is_the_least_demanding_of_the_fastest():
    found = plan(model(8), stages=4, accumulations=[1, 2, 4, 8])
    chosen = found.chosen
    assert (chosen.schedule, chosen.policy, chosen.slack) == ("paci", "bounded", 0)
    fits = [one for one in found.candidates if one.rejected is None]
    best = max(one.predicted.micro_batches_per_s for one in fits)
    near = [one for one in fits if one.predicted.micro_batches_per_s >= (1 - planner.AS_FAST) * best]
    least = min(max(one.predicted.peak_memory_bytes) for one in near)
    assert chosen in near
    assert max(chosen.predicted.peak_memory_bytes) == least
    assert chosen.predicted.delay == min(
        one.predicted.delay for one in near if max(one.predicted.peak_memory_bytes) == least
    )
    assert {one.schedule for one in found.best_of_each()} == set(schedules.FAMILIES)


def test_limits_of_drift_and_delay():
    options = {"stages": 4, "accumulations": [1, 4], "schedules": ["paci", "1f1b"]}
    chosen = plan(model(8), **options).chosen
    assert (chosen.schedule, chosen.accumulation, chosen.lookahead) == ("paci", 4, True)
    assert plan(model(8), **options, lookahead=False).chosen.schedule == "1f1b"
    assert plan(model(8), **options, lookahead=False, delay_limit=1).chosen.schedule == "paci"
    fastest = plan(model(8), **options, delay_limit=None, policies=["bounded"], slack=0)
    assert max(one.predicted.delay for one in fastest.candidates) == 3
    consistent = plan(model(8), **options, drift_limit=0, delay_limit=None)
    assert consistent.chosen.predicted.drift == 0
    assert (consistent.chosen.schedule, consistent.chosen.policy) == ("paci", "stash")
    reasons = {one.rejected for one in consistent.candidates if one.policy == "bounded" and one.schedule == "paci"}
    assert "drift 3, 3 over the limit of 0" in reasons
    assert plan(model(8), **options, drift_limit=0, delay_limit=0).chosen.schedule == "1f1b"
    measured = {one.rejected for one in plan(model(8), **options).candidates}
    assert {"delay 3, 2 over the limit of 1", "delay 1, 1 over the limit of 0 without look-ahead"} <= measured
    with pytest.raises(ValueError, match="a higher delay limit, or none, lets it run"):
        plan(model(8), **{**options, "schedules": ["async-1f1b"]})


def test_slack_is_worth_its_memory_where_links_are_slow():
    options = {"stages": 4, "accumulations": [8], "schedules": ["paci"], "policies": ["bounded"]}
    quick = plan(model(4), **options)
    assert quick.chosen.slack == 0 and quick.without_slack is None
    slow = model(4, hop_s=0.02)
    found = plan(slow, **options)
    best, strict = found.chosen.predicted, found.without_slack.predicted
    assert found.chosen.slack == (3, 2, 1, 0)
    assert found.without_slack.partition == found.chosen.partition
    assert best.micro_batches_per_s > 0.99 * quick.chosen.predicted.micro_batches_per_s
    assert best.micro_batches_per_s > 1.2 * strict.micro_batches_per_s
    assert (strict.drift, best.drift) == (1, 1) and max(best.peak_memory_bytes) > max(strict.peak_memory_bytes)
    assert found.to_json()["without_slack"]["drift"] == 1
    assert plan(slow, **options, slack=0).chosen.predicted == strict
    assert plan(slow, **options, slack=(2, 0, 1, 0)).chosen.slack == (2, 0, 1, 0)


def test_slack_keeps_to_the_limits():
    """As much as memory and delay allow, not all or nothing."""
    options = {"stages": 4, "schedules": ["paci"], "policies": ["bounded"]}
    slow = model(4, hop_s=0.02)
    strict, free = plan(slow, **options, accumulations=[8], slack=0).chosen, plan(slow, **options, accumulations=[8])
    tight = plan(slow, **options, accumulations=[8], memory_limit_bytes=max(strict.predicted.peak_memory_bytes))
    assert tight.chosen.slack == 0
    assert any(one.slack == (3, 2, 1, 0) and "over its limit" in (one.rejected or "") for one in tight.candidates)
    between = max(free.chosen.predicted.peak_memory_bytes) - 1
    some = plan(slow, **options, accumulations=[8], memory_limit_bytes=between).chosen
    assert some.slack not in (0, (3, 2, 1, 0))
    speeds = [one.predicted.micro_batches_per_s for one in (strict, some, free.chosen)]
    assert speeds == sorted(speeds) and len(set(speeds)) == 3
    late = plan(slow, **options, accumulations=[4])
    assert late.chosen.slack != 0 and late.chosen.predicted.delay == 1  # at most one forward more on the first stage
    assert any(one.slack == (3, 2, 1, 0) and "delay 2" in (one.rejected or "") for one in late.candidates)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_slack_is_better(seed):
    """Against all slack that three stages can have, within a limit of memory or without."""
    rng = np.random.default_rng(seed)
    profile = replace(random_model(rng, 5), hop_s=float(rng.uniform(0.002, 0.02)))
    family, options = schedules.get("paci"), {"stages": 3, "accumulations": [8], "schedules": ["paci"]}
    options |= {"policies": ["bounded"], "delay_limit": None}
    limit = math.inf
    if seed % 2:
        # No room for all that it would like to have.
        limit = np.mean([max(plan(profile, **options, slack=s).chosen.predicted.peak_memory_bytes) for s in (0, 1)])
    judge = evaluator(profile, 3, memory=limit)
    rates = []
    for first, second in itertools.product(range(9), range(6)):
        if second > first + 1:
            continue
        one = Candidate(schedule="paci", policy="bounded", accumulation=8, lookahead=True, slack=(first, second, 0))
        one = judge.prepare(one, family)
        one = one if one.rejected else judge.simulate(one, family)
        rates += [one.predicted.micro_batches_per_s] if not one.rejected else []
    found = plan(profile, **options, memory_limit_bytes=None if limit == math.inf else limit).chosen
    assert found.predicted.micro_batches_per_s >= (1 - 2 * planner.AS_FAST) * max(rates)


def test_a_slow_device_gets_less():
    found = plan(model(8), stages=2, accumulations=[4], device_speeds=(1, 0.3), schedules=["paci"]).chosen
    assert found.partition == (7, 1)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 9}, "9 stages, but there are only 8 blocks"),
        ({"stages": 0}, "stages is 0"),
        ({"accumulations": []}, "no accumulation to choose from"),
        ({"accumulations": [0]}, "accumulation is 0"),
        ({"slack": -1}, "slack is -1"),
        ({"chunks": [0]}, "chunks is 0"),
        ({"memory_limit_bytes": -5}, "memory limit is -5 bytes"),
        ({"memory_limit_bytes": (1e9, 1e9, 1e9)}, "3 memory limits for 2 stages"),
        ({"drift_limit": -1}, "drift limit is -1"),
        ({"device_speeds": (1,)}, "1 device speeds for 2 stages"),
        ({"device_speeds": (1, math.nan)}, "device speed nan"),
        ({"schedules": ["zb2p"]}, "unknown schedule 'zb2p': did you mean 'zb-2p'"),
        ({"policies": ["stach"]}, "unknown policy 'stach': did you mean 'stash'"),
        ({"schedules": ["pipedream"], "policies": ["bounded"]}, "none of pipedream can run under bounded"),
        ({"schedules": ["pipedream"], "accumulations": [4]}, "pipedream updates after every micro-batch"),
        ({"schedules": ["paci"], "policies": ["bounded"], "drift_limit": 0}, "no schedule fits: the nearest is paci"),
    ],
)
def test_what_cannot_be_planned(options, words):
    with pytest.raises(ValueError, match=words):
        plan(model(8), **{"stages": 2, "accumulations": [1, 2], **options})


def test_nothing_fits_names_the_device_that_is_short():
    with pytest.raises(ValueError, match=r"on device 1, .* over its limit"):
        plan(model(8), stages=2, accumulations=[1], memory_limit_bytes=(1e9, 1000))


def test_a_profile_without_times():
    still = {"forward_s": 0.0, "input_grad_s": 0.0, "weight_grad_s": 0.0}
    with pytest.raises(ValueError, match="no block of the profile takes any time"):
        plan(Profile(blocks=(block("h.0", **still),)), stages=1, accumulations=[1])


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_profile_survives_its_file(tmp_path):
    profile = replace(model(3, hop_s=1e-3), profiled={"model": "gpt-tiny"}, has_masters=True)
    for one in (profile, replace(profile, bandwidth_bytes_per_s=2e9)):
        (tmp_path / "profile.json").write_text(json.dumps(one.to_json(), allow_nan=False))
        assert load_profile(tmp_path / "profile.json") == one


GOOD = {**model(2).to_json(), "profiled": {"model": "gpt-tiny"}}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("version", 2, "version is 2, and this program reads version 1"),
        ("version", None, "version is missing: give a number"),
        ("format", "profile", "format is 'profile': give a file that paci-rt plan --profile wrote"),
        ("blocks", [], r"blocks is \[\]: give a list with one entry per block"),
        ("blocks", None, "blocks is missing"),
        ("blocks.1.forward_s", -1.0, r"blocks\[1\].forward_s is -1.0: give a number of at least 0"),
        ("blocks.1.forward_s", math.nan, r"blocks\[1\].forward_s is nan"),
        ("blocks.1.forward_s", "fast", r"blocks\[1\].forward_s is 'fast'"),
        ("blocks.1.forward_s", True, r"blocks\[1\].forward_s is True"),
        ("blocks.0.stash_bytes", None, r"blocks\[0\].stash_bytes is missing"),
        ("blocks.0.stash_bytes", 1.5, r"blocks\[0\].stash_bytes is 1.5: give a whole number"),
        ("blocks.0.role", "center", r"blocks\[0\].role is 'center': give one of first, middle, last"),
        ("blocks.0.role", "last", "the roles of the blocks are last, middle, middle, last"),
        ("blocks.0.colour", "red", r"blocks\[0\].colour is unknown"),
        ("blocks.0.name", "", r"blocks\[0\].name is ''"),
        ("blocks.1", 7, r"blocks\[1\] is 7: give a JSON object"),
        ("bandwidth_bytes_per_s", 0, "bandwidth_bytes_per_s is 0: give a number above 0"),
        ("hop_s", 10**400, "hop_s is 1000"),
        ("has_masters", 1, "has_masters is 1: give true or false"),
        ("profiled", [], r"profiled is \[\]: give an object"),
    ],
)
def test_malformed_profiles(tmp_path, path, value, words):
    """One line that says which key, and what was found."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = data
    for part in parents:
        target = target[part]
    if value is None:
        del target[last]
    else:
        target[last] = value
    with pytest.raises(ValueError, match=words) as caught:
        parse_profile(data)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_profile(tmp_path):
    for text, words in (
        ("{", "is not JSON"),
        ("[1]", "the file is"),
        ("{}", "format is missing"),
        ("\xff", "is not JSON"),
    ):
        (tmp_path / "odd.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=words) as caught:
            load_profile(tmp_path / "odd.json")
        assert "odd.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        load_profile(tmp_path / "nowhere.json")
