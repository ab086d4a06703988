"""The choice among candidates, and what cannot be planned."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from paci_rt import planner, schedules
from paci_rt.planner import OverheadRow, OverheadTable, Profile, plan
from paci_rt.planner.candidate import Candidate
from support.profiles import block, evaluator, model, random_model


def test_the_plan_is_the_least_demanding_of_the_fastest():
    free = OverheadRow(optimizer="adamw", lookahead=True, delay=1, share=0.375, f=1.0)  # then throughput decides
    found = plan(model(8), stages=4, accumulations=[1, 2, 4, 8], overheads=OverheadTable(rows=(free,)))
    chosen = found.chosen
    assert (chosen.schedule, chosen.policy, chosen.slack) == ("paci", "bounded", 0)
    fits = [one for one in found.candidates if one.rejected is None]
    best = max(one.predicted.progress_per_s for one in fits)
    near = [one for one in fits if one.predicted.progress_per_s >= (1 - planner.AS_FAST) * best]
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
    bare = plan(model(8), **options, lookahead=False)
    late = next(one for one in bare.candidates if one.schedule == "paci" and one.rejected is None)
    assert late.predicted.overhead.f > 1.4 and not late.lookahead
    assert bare.chosen.predicted.progress_per_s >= late.predicted.progress_per_s
    assert plan(model(8), **options, lookahead=False, delay_limit=0).chosen.schedule == "1f1b"
    fastest = plan(model(8), **options, delay_limit=None, policies=["bounded"], slack=0)
    assert max(one.predicted.delay for one in fastest.candidates) == 3
    consistent = plan(model(8), **options, drift_limit=0, delay_limit=None)
    assert consistent.chosen.predicted.drift == 0
    assert (consistent.chosen.schedule, consistent.chosen.policy) == ("paci", "stash")
    reasons = {one.rejected for one in consistent.candidates if one.policy == "bounded" and one.schedule == "paci"}
    assert "drift 3, 3 over the limit of 0" in reasons
    assert plan(model(8), **options, drift_limit=0, delay_limit=0).chosen.schedule == "1f1b"
    reasons = {one.rejected for one in plan(model(8), **options).candidates}
    assert "token overhead: nothing was measured for adamw, policy bounded, look-ahead, delay 3" in reasons
    with pytest.raises(ValueError, match="measure it with paci-rt calibrate, or give a delay limit"):
        plan(model(8), **{**options, "schedules": ["async-1f1b"]})
    with pytest.raises(ValueError, match="a higher delay limit, or none, lets it run"):
        plan(model(8), **{**options, "schedules": ["async-1f1b"]}, delay_limit=2)
    with pytest.raises(ValueError, match="delay limit is 'some'"):
        plan(model(8), **options, delay_limit="some")


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
