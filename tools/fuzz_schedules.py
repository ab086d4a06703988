"""Fuzz targets: schedules, their costs, slack and the simulator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fuzz_support import REFUSED, Target, attempt, floats, holds, huge, often, small, some_of, times, weird, words
from paci_rt import plan_slack, schedules
from paci_rt.action import OPS, Action, Op, decode_fields
from paci_rt.schedules import policies, slack
from paci_rt.schedules.base import check_shape
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.validate import validate
from paci_rt.simulate import Costs, simulate

MOST = 4000
"""Actions of a case that is played to its end."""

slacks = often(st.integers(0, 6), st.lists(st.integers(0, 4), max_size=6), st.lists(weird, max_size=3), huge, weird)
step_costs = often(
    st.builds(schedules.StepCosts),
    st.builds(schedules.StepCosts, forward=times(), input_grad=times(), weight_grad=times(), hop=floats, stash=floats),
    st.builds(schedules.StepCosts, forward=weird, hop=weird),
)
shapes = st.fixed_dictionaries(
    {"num_stages": small(1, 6), "accumulation": small(1, 12)},
    optional={"slack": slacks, "chunks": small(1, 3), "costs": step_costs},
)
names = often(st.sampled_from(list(schedules.FAMILIES)), words)


def shape_of(target: str, given: dict[str, Any], family: Any) -> Any:
    """A shape that a family can have, or REFUSED."""

    def make() -> Any:
        shape = schedules.Shape(**given)
        check_shape(family, shape)
        return shape

    return attempt(target, make)


def check_schedule(case: tuple[str, dict[str, Any], Any, Any]) -> None:
    name, given, policy, windows = case
    family = attempt("schedules", lambda: schedules.get(name))
    if family is REFUSED:
        return
    shape = shape_of("schedules", given, family)
    if shape is REFUSED:
        return
    resolved = attempt("schedules", lambda: policies.resolve(family, shape, policy))
    count = shape.num_stages * shape.accumulation * windows
    if count > MOST:
        return
    streams = [family.stream(shape, rank, windows) for rank in range(shape.ranks)]
    stages, ops, _ = decode_fields(np.concatenate(streams))
    for stage in range(shape.num_stages):
        forwards = int(((stages == stage) & (ops == OPS.index(Op.F))).sum())
        updates = int(((stages == stage) & (ops == OPS.index(Op.U))).sum())
        holds(forwards == windows * shape.accumulation, f"{forwards} forwards on stage {stage} of {shape}")
        holds(updates == windows, f"{updates} updates on stage {stage} of {shape}")
    if resolved is not REFUSED:
        validate(Lowering(family=family, shape=shape), windows=windows)


def check_simulation(case: tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    name, given, costs, options = case
    family = schedules.get(name)
    shape = shape_of("simulate", given, family)
    made = attempt("simulate", lambda: Costs(**costs))
    if shape is REFUSED or made is REFUSED:
        return
    windows = options.get("windows", 1)
    small_case = not isinstance(windows, int) or shape.num_stages * shape.accumulation * windows <= MOST
    if not small_case and windows * shape.num_stages * shape.accumulation <= 10**8:
        return
    found = attempt("simulate", lambda: simulate(family, shape, made, **options))
    if found is REFUSED:
        return
    holds(math.isfinite(found.makespan_s) and found.makespan_s >= 0, f"makespan {found.makespan_s} of {case}")
    holds(0 <= found.bubble_rate <= 1, f"bubble rate {found.bubble_rate} of {case}")
    if min(min(getattr(made, name)) for name in ("forward_s", "input_grad_s", "weight_grad_s")) < 1e-6:
        return  # what takes no time is not counted one by one
    bounds = [family.in_flight_bound(shape, rank) for rank in range(shape.ranks)]
    holds(all(a <= b for a, b in zip(found.peak_activations.values(), bounds, strict=True)), f"activations of {case}")
    holds(found.max_drift <= max(family.drift_bound(shape, rank) for rank in range(shape.ranks)), f"drift of {case}")


costs_of = st.fixed_dictionaries(
    {"forward_s": times(), "input_grad_s": times(), "weight_grad_s": times()},
    optional={
        "update_s": times(),
        "hop_s": often(st.floats(0, 1), floats, weird),
        "bandwidth_bytes_per_s": often(st.floats(1, 1e9), floats, weird),
        "message_bytes": times(),
        "activation_bytes": times(),
        "micro_batch_factors": times(),
        "noise": often(st.floats(0, 1), floats, weird),
        "seed": small(0, 100),
    },
)
simulate_options = some_of(
    {
        "windows": small(1, 4),
        "policy": often(st.sampled_from(policies.POLICIES), words),
        "lookahead": st.sampled_from([None, True, False]),
        "keep_events": st.booleans(),
    }
)


def check_plan(case: tuple[Any, Any, dict[str, Any]]) -> None:
    stage_times, hops, options = case
    found = attempt("slack", lambda: plan_slack(stage_times, hops, **options))
    if found is REFUSED:
        return
    loops = slack.Loops(stage_times, hops, **{key: value for key, value in options.items() if key != "tolerance"})
    period = loops.period(found)
    holds(len(found) == len(stage_times) and found[-1] == 0, f"slack {found} of {case}")
    if not loops.shortest_period:
        return  # no slack hides a link from stages that take no time
    holds(period <= loops.shortest_period * (1.0 + options.get("tolerance", slack.TOLERANCE)) * (1 + 1e-6), f"{case}")


def lists(most: int) -> st.SearchStrategy[Any]:
    fine = st.lists(st.floats(0.01, 10), min_size=1, max_size=most)
    return often(fine, st.lists(floats, max_size=most), st.lists(weird, max_size=3))


def matched() -> st.SearchStrategy[Any]:
    """Stage times, and as many links as lie between the stages."""
    both = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 50)), min_size=1, max_size=6)
    return both.map(lambda pairs: ([time for time, _ in pairs], [hop for _, hop in pairs[1:]]))


plans = st.tuples(
    often(matched(), st.tuples(lists(5), lists(5))),
    some_of({"least_period": often(st.floats(0, 20), floats), "tolerance": often(st.floats(0, 1), floats)}),
).map(lambda case: (*case[0], case[1]))


def check_texts(case: tuple[str, str]) -> None:
    kind, text = case
    parse = {"slack": slack.parse_slack, "costs": schedules.StepCosts.parse, "action": Action.parse}[kind]
    found = attempt("texts", lambda: parse(text))
    if found is not REFUSED and kind == "slack":
        holds(slack.parse_slack(slack.slack_text(found)) == found, f"{text!r} read back")
    if found is not REFUSED and kind == "action":
        holds(Action.parse(str(found)) == found, f"{text!r} read back")


digits = st.text("0123456789,.:eE+-_ FBIWURSCEVDTG", max_size=24) | words
texts = st.tuples(st.sampled_from(["slack", "costs", "action"]), digits)

TARGETS = [
    Target(
        "schedules",
        st.tuples(names, shapes, st.none() | st.sampled_from(policies.POLICIES) | words, st.integers(1, 3)),
        check_schedule,
        2,
    ),
    Target(
        "simulate",
        st.tuples(st.sampled_from(list(schedules.FAMILIES)), shapes, costs_of, simulate_options),
        check_simulation,
        2,
    ),
    Target("slack", plans, check_plan, 1),
    Target("texts", texts, check_texts, 0.5),
]
