"""What ``paci-rt plan`` prints and writes: the profile, the plan, what else there was, and the command that runs it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from paci_rt import schedules
from paci_rt.planner import AS_FAST, Candidate, Plan, Prediction, Profile, TokenOverhead, stage_costs
from paci_rt.planner.token_overhead import NONE
from paci_rt.report import text
from paci_rt.report.machine import machine
from paci_rt.schedules import Placement, policies
from paci_rt.schedules.slack import slack_text
from paci_rt.train.families import MODELS

VARIANTS = 3
"""Rows for other ways to run the chosen schedule."""


def report(profile: Profile, plan: Plan, *, source: str, command: str | None) -> str:
    """Everything that the command prints.

    Args:
        source: where the profile comes from, in words.
        command: from :func:`train_command`.
    """
    parts = [_profile_text(profile, source), _plan_text(profile, plan)]
    parts += [_rivals_text(profile, plan), _rejected_text(plan), _command_text(profile, plan.chosen, command)]
    return "\n\n".join(part for part in parts if part)


def to_json(profile: Profile, plan: Plan, command: str | None) -> dict[str, Any]:
    """The plan as ``--json`` writes it."""
    summary = {key: value for key, value in profile.to_json().items() if key not in ("format", "version", "blocks")}
    return {**plan.to_json(), "stages": len(plan.device_speeds), "command": command, "profile": summary}


def train_command(profile: Profile, chosen: Candidate, *, optimizer: str = "adamw") -> str | None:
    """The ``paci-rt train`` command that runs the plan; None for a model that it does not know."""
    profiled, family = profile.profiled, schedules.get(chosen.schedule)
    if profiled.get("model") not in MODELS or chosen.partition is None:
        return None
    options: list[tuple[str, Any]] = [
        ("--model", profiled["model"]),
        ("--stages", len(chosen.partition) // chosen.chunks),
        ("--schedule", chosen.schedule),
        ("--partition", ",".join(map(str, chosen.partition))),
        ("--accumulation", chosen.accumulation),
        ("--batch-size", chosen.accumulation * profiled["rows"]),
        ("--seq-len", profiled["seq_len"]),
    ]
    if chosen.slack:
        options.append(("--slack", slack_text(chosen.slack)))
    if family.takes_chunks:
        options.append(("--chunks", chosen.chunks))
    if chosen.policy != family.policies[0]:
        options.append(("--policy", chosen.policy))
    words = ["paci-rt", "train"]
    if chosen.lookahead != policies.looks_ahead(family, chosen.policy, None):
        words.append("--lookahead" if chosen.lookahead else "--no-lookahead")
    if chosen.step_costs is not None:
        options.append(("--step-costs", _step_ms(chosen.step_costs).text()))
    if chosen.activation_limit is not None:
        options.append(("--activation-limit", f"{chosen.activation_limit:g}"))
    if optimizer != "adamw":
        options.append(("--optimizer", optimizer))
    if profiled.get("dtype", "fp32") != "fp32":
        options.append(("--dtype", profiled["dtype"]))
    if profiled["threads"] != 1:
        options.append(("--threads", profiled["threads"]))
    return shlex.join([*words, *(str(word) for pair in options for word in pair)])


def _step_ms(costs: schedules.StepCosts) -> schedules.StepCosts:
    """In milliseconds, with one value for all stages where they do not differ."""

    def ms(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(1e3 * value for value in (values if len(set(values)) > 1 else values[:1]))

    forward, input_grad, weight_grad = (ms(each) for each in costs[:3])
    return schedules.StepCosts(forward, input_grad, weight_grad, 1e3 * costs.hop, costs.stash)


# ------------------------------------------------------------------------------------------------------------- profile


def _profile_text(profile: Profile, source: str) -> str:
    what = profile.profiled
    rows = []
    for block in profile.blocks:
        alike = sum(other.measured_as == block.measured_as for other in profile.blocks) if block.measured_as else 1
        if block.measured_as not in ("", block.name):
            continue
        rows.append(
            (
                f"{block.name} (and {alike - 1} like it)" if alike > 1 else block.name,
                *(_ms(value) for value in (block.forward_s, block.input_grad_s, block.weight_grad_s)),
                *(
                    text.size(value) if value else text.NOTHING
                    for value in (
                        block.parameter_bytes,
                        block.activation_bytes,
                        block.stash_bytes,
                        block.boundary_bytes,
                    )
                ),
            )
        )
    header = ("block", "forward", "input grad", "weight grad", "parameters", "activations", "stash", "output")
    threads = f"{what['threads']} thread{'s' if what['threads'] > 1 else ''}"
    return (
        f"Profile of {what.get('model', 'a model')}, {source}: micro-batches of {what['rows']} x {what['seq_len']} "
        f"tokens, {what.get('dtype', 'unknown type')}, {threads}\n"
        f"{text.table(header, rows)}\n"
        f"Messages between stages: {_link_text(profile)}."
    )


def _link_text(profile: Profile) -> str:
    bandwidth = profile.bandwidth_bytes_per_s
    if not profile.hop_s and math.isinf(bandwidth):
        return "taken to cost nothing (give --hop-ms and --bandwidth, or --measure-link)"
    speed = "any size" if math.isinf(bandwidth) else f"{text.size(bandwidth)}/s"
    return f"{_ms(profile.hop_s)} latency, {speed}"


def _ms(value_s: float) -> str:
    return f"{1e3 * value_s:.3g} ms" if value_s else text.NOTHING


# ---------------------------------------------------------------------------------------------------------------- plan


def _plan_text(profile: Profile, plan: Plan) -> str:
    chosen, found = plan.chosen, _predicted(plan.chosen)
    ranks, pieces = len(plan.device_speeds), _piece_seconds(profile, plan)
    seconds = [sum(one) for one in pieces]
    mean_s = sum(seconds) / ranks
    sequences = chosen.accumulation * profile.profiled["rows"]
    tokens_per_s = found.micro_batches_per_s * profile.profiled["rows"] * profile.profiled["seq_len"]
    lines = [
        f"Plan for {ranks} stage{'s' if ranks > 1 else ''}: {chosen.schedule}, {_options(chosen)}",
        f"  update      every {chosen.accumulation} micro-batch{'es' if chosen.accumulation > 1 else ''}, which is "
        f"{sequences} sequences",
        f"  partition   {','.join(map(str, chosen.partition or ()))}",
        f"  throughput  {found.micro_batches_per_s:,.4g} micro-batches/s, {tokens_per_s:,.0f} tokens/s, at "
        f"{text.share(found.utilization)} utilization",
        *_overhead_lines(plan),
        *_slack_lines(plan),
        f"  drift       at most {found.drift}, delay at most {found.delay}",
        f"  balance     the busiest device computes {_ms(max(seconds))} per micro-batch, all of them {_ms(mean_s)} "
        f"on average: {text.share(mean_s / max(seconds))}",
    ]
    return "\n".join(lines) + "\n\n" + _devices_table(profile, plan, pieces)


def _overhead_lines(plan: Plan) -> list[str]:
    """What the plan takes in tokens, and how soon it is there beside the best that flushes, with the same update."""
    chosen, found = plan.chosen, _predicted(plan.chosen).overhead
    lines = []
    if found.basis != NONE.basis:
        lines.append(f"  tokens      {_overhead_text(found)}; {found.basis}")
    flushed = [
        one
        for one in plan.candidates
        if one.rejected is None
        and one.accumulation == chosen.accumulation
        and schedules.get(one.schedule).flush
        and one.schedule != chosen.schedule
    ]
    if flushed and not schedules.get(chosen.schedule).flush:
        best = max(flushed, key=_speed)
        ratio = f"{_speed(chosen) / _speed(best):.2f} times as soon at a loss as {best.schedule}"
        lines.append(f"  time        {ratio}, the best that flushes with the same update")
    return lines


def _overhead_text(found: TokenOverhead) -> str:
    if found.f is None:
        return "unknown, and counted as if they were those of 1f1b"
    end = "?" if found.high is None else f"{found.high:.2f}"
    interval = "" if found.low is None else f" ({found.low:.2f} to {end})"
    return f"{found.f:.2f}{interval} times those of 1f1b for the same loss"


def _slack_lines(plan: Plan) -> list[str]:
    """What the slack of the plan gives, and what it takes."""
    if plan.without_slack is None:
        return []
    found, strict = _predicted(plan.chosen), _predicted(plan.without_slack)
    price = max(found.peak_memory_bytes) - max(strict.peak_memory_bytes)
    speed = found.micro_batches_per_s / strict.micro_batches_per_s
    if price < 0:
        return [
            f"  slack       below 0, fewer in flight: {speed:.3f} times as fast as the strict order on the same",
            f"              stages, for {text.size(-price)} less on the fullest device, drift {found.drift} instead of "
            f"{strict.drift}, delay {found.delay} instead of {strict.delay}",
        ]
    return [
        f"  slack       makes it {speed:.3f} times as fast as the strict "
        f"order on the same stages, for {text.size(price)} more on",
        f"              the fullest device, drift {found.drift} instead of {strict.drift}, delay {found.delay} instead "
        f"of {strict.delay}",
    ]


def _options(one: Candidate) -> str:
    """Policy, slack, chunks and limit of activations, as far as the schedule has a choice."""
    parts = [f"policy {one.policy}"]
    parts += ["look-ahead"] if one.lookahead else []
    parts += [f"slack {slack_text(one.slack)}"] if schedules.get(one.schedule).takes_slack else []
    parts += [f"{one.chunks} chunks per device"] if one.chunks > 1 else []
    parts += [f"activation limit {one.activation_limit:g}"] if one.activation_limit is not None else []
    return ", ".join(parts)


def _places(plan: Plan) -> Placement:
    """Which device holds which pieces."""
    shape = plan.chosen.shape(len(plan.device_speeds))
    return Placement(num_stages=shape.num_stages, chunks=shape.chunks, name=shape.placement)


def _piece_seconds(profile: Profile, plan: Plan) -> list[list[float]]:
    """Compute time of a micro-batch on each piece of each device."""
    assert plan.chosen.partition is not None
    places, speeds = _places(plan), plan.device_speeds
    costs = stage_costs(profile, plan.chosen.partition, device_speeds=speeds, placement=places.name)
    names = ("forward_s", "input_grad_s", "weight_grad_s")
    parts = [costs.per_stage(name, places.num_stages) for name in names]
    parts.append(np.where(plan.chosen.recomputing(places.ranks), parts[0], 0.0))
    total = np.sum(parts, axis=0)
    return [[float(total[stage]) for stage in places.stages_of(rank)] for rank in range(places.ranks)]


def _devices_table(profile: Profile, plan: Plan, seconds: Sequence[Sequence[float]]) -> str:
    """A row per device: what it holds, computes and keeps; of several pieces how long each takes."""
    assert plan.chosen.partition is not None
    bounds, places = profile.bounds(plan.chosen.partition), _places(plan)
    rows = []
    for rank, need in enumerate(_predicted(plan.chosen).peak_memory_bytes):
        mine, times = [bounds[stage] for stage in places.stages_of(rank)], seconds[rank]
        held = "; ".join(_names(profile, *bound) for bound in mine)
        limit = plan.limits.memory_bytes[rank]
        share = text.share(need / limit) if math.isfinite(limit) else text.NOTHING
        weights = sum(block.parameter_bytes for start, end in mine for block in profile.blocks[start:end])
        taken = _ms(sum(times)) + (f" ({' + '.join(map(_ms, times))})" if len(times) > 1 else "")
        cells = (f"{plan.device_speeds[rank]:g}", taken, text.size(weights), text.size(need), share)
        rows.append((str(rank), held, *cells))
    header = ("device", "blocks", "speed", "per micro-batch", "weights", "peak memory", "of its limit")
    return text.table(header, rows)


def _names(profile: Profile, start: int, end: int) -> str:
    """``embedding, h.0 … h.3``."""
    parts = []
    for role in ("first", "middle", "last"):
        names = [block.name for block in profile.blocks[start:end] if block.role == role]
        parts += [f"{names[0]} … {names[-1]}"] if len(names) > 2 else names
    return ", ".join(parts)


# -------------------------------------------------------------------------------------------------------------- rivals


def _rivals_text(profile: Profile, plan: Plan) -> str:
    """The best way to run every schedule, and other ways to run the chosen one."""
    chosen = plan.chosen
    variants = [
        one for one in plan.candidates[1:] if one.predicted and not one.rejected and one.schedule == chosen.schedule
    ]
    others = [one for one in plan.best_of_each()[1:] if one.rejected is None]
    shown = sorted([*others, *variants[:VARIANTS]], key=plan.candidates.index)
    rows = [_row(profile, one, chosen) for one in (chosen, *shown)]
    header = ("schedule", "policy", "slack", "micro-batches", "sequences", "throughput", "tokens", "vs plan",
              "utilization", "peak memory", "drift", "delay")  # fmt: skip
    fastest = max((one for one in plan.candidates if one.rejected is None), key=_speed)
    unknown = [one for one in (chosen, *shown) if not _predicted(one).overhead.known]
    lines = [
        "What else there was: of every schedule what ranks first, and the next ways to run the chosen one. "
        "Micro-batches\nand sequences are those of an update, throughput is in micro-batches/s, memory that of the "
        "fullest device;\ntokens are over those of 1f1b for the same loss, and vs plan is throughput over tokens.",
        text.table(header, rows),
        f"The best makes the progress of {_speed(fastest):,.4g} micro-batches/s of 1f1b. Of those within "
        f"{text.share(AS_FAST)} of it the plan is\nthe one with the least memory, then the least delay, then the least "
        "drift, then the smallest update.",
    ]
    if unknown:
        names = ", ".join(dict.fromkeys(one.schedule for one in unknown))
        lines.append(
            f"Tokens of {names} are unknown (?) and counted as 1: paci-rt calibrate measures them, and without "
            "--delay-limit\nonly what was measured competes."
        )
    return "\n".join(lines)


def _row(profile: Profile, one: Candidate, chosen: Candidate) -> tuple[str, ...]:
    found, name = _predicted(one), one.schedule
    if one.chunks > 1:
        name += f" x{one.chunks}"
    if one.activation_limit is not None:
        name += f", limit {one.activation_limit:g}"
    return (
        name + (" (plan)" if one is chosen else ""),
        one.policy + (", look-ahead" if one.lookahead else ""),
        slack_text(one.slack) if schedules.get(one.schedule).takes_slack else text.NOTHING,
        str(one.accumulation),
        str(one.accumulation * profile.profiled["rows"]),
        f"{found.micro_batches_per_s:,.4g}",
        "?" if found.overhead.f is None else f"{found.overhead.f:.2f}",
        f"{found.progress_per_s / _speed(chosen):.3f}",
        text.share(found.utilization),
        text.size(max(found.peak_memory_bytes)),
        str(found.drift),
        str(found.delay),
    )


def _rejected_text(plan: Plan) -> str:
    """Schedules of which nothing fits, and policies of the others of which nothing fits, with the reasons."""
    fit = {(one.schedule, one.policy) for one in plan.candidates if one.rejected is None}
    nearest: dict[tuple[str, str], Candidate] = {}
    for one in plan.candidates:
        if one.rejected is not None and (one.schedule, one.policy) not in fit:
            nearest.setdefault((one.schedule, one.policy), one)
    if not nearest:
        return ""
    alike: dict[tuple[str, str], list[Candidate]] = {}
    for one in nearest.values():
        alike.setdefault((one.schedule, str(one.rejected)), []).append(one)
    lines = []
    for (schedule, why), found in alike.items():
        under = ", ".join(one.policy for one in found)
        lines.append(f"  {schedule} ({under}; accumulation {found[0].accumulation}): {why}")
    return "Rejected, by schedule and policy what comes nearest to the limits:\n" + "\n".join(lines)


def _command_text(profile: Profile, chosen: Candidate, command: str | None) -> str:
    if command is None:
        return (
            f"paci-rt train has no model {profile.profiled.get('model')!r}, so there is no command that runs this plan."
        )
    found, cores = _predicted(chosen), machine()["cores"]
    needed = len(found.peak_memory_bytes) * profile.profiled["threads"]
    notes = []
    if needed > cores:
        notes.append(
            f"This machine has {cores} core{'s' if cores > 1 else ''} for {needed} threads of stages, so a run here is "
            "slower than predicted."
        )
    if profile.profiled.get("machine") not in (None, machine()):
        notes.append("The profile comes from another machine.")
    return "Run it:\n  " + command + "".join(f"\n{note}" for note in notes)


def _predicted(one: Candidate) -> Prediction:
    assert one.predicted is not None
    return one.predicted


def _speed(one: Candidate) -> float:
    return _predicted(one).progress_per_s
