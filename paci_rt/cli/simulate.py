"""``paci-rt simulate``: what a schedule would do, from numbers or from a measured profile."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paci_rt import schedules
from paci_rt.cli import outputs, simulate_frontier
from paci_rt.cli.options import MS, integers, number, numbers, slack_argument
from paci_rt.cli.simulate_report import PRICE, report_text, to_json
from paci_rt.planner import auto_slack
from paci_rt.schedules import AUTO, ScheduleFamily, Shape, Slack, StepCosts, limits, policies
from paci_rt.schedules.base import check_shape, check_takes
from paci_rt.simulate import Costs, Simulation, simulate
from paci_rt.simulate.costs import LEAST_BANDWIDTH, most_of

DESCRIPTION = """\
Predict what a schedule does: bubbles, throughput, memory, drift and weight versions, from what each action costs.

Times are in milliseconds. Give one number for all stages, or one per stage with commas between them. With --chunks V,
each stage is cut into V equal pieces; give V numbers per stage to set every piece: first the first piece of every
stage, then the second. For example, a case from the Zero Bubble paper:

  paci-rt simulate --schedule zb-h1 --stages 8 --micro-batches 24 \\
    --forward 18.522 --input-grad 18.086 --weight-grad 9.337 --comm 0.601

The bubble rate is (C - work) / C. C is the longest time of any stage from its first forward to the end of its last
backward; work is the compute time of a stage, the mean over all stages.
"""

JSON_HELP = (
    "write the result: bubble_rate makespan (ms) steady_utilization peak_activations (one number per stage) max_drift "
    "weight_versions slack, histograms of drift and delay, throughput, bytes ...; with slack also without_slack"
)

# Option, field of Costs, its unit in that of the field, whether chunks share it, metavar, default as shown, meaning.
_COSTS: tuple[tuple[str, str, float, bool, str, str, str], ...] = (
    ("--forward", "forward_s", MS, True, "MS,...", "1", "forward of a micro-batch"),
    ("--input-grad", "input_grad_s", MS, True, "MS,...", "1", "input-gradient half of its backward"),
    ("--weight-grad", "weight_grad_s", MS, True, "MS,...", "1", "weight-gradient half; a whole backward takes both"),
    ("--update", "update_s", MS, True, "MS,...", "0", "local update"),
    ("--predict", "predict_s", MS, True, "MS,...", "0", "predicting the weights of an early forward"),
    ("--comm", "hop_s", MS, False, "MS", "0", "latency of a message between stages"),
    ("--bandwidth", "bandwidth_bytes_per_s", 1.0, False, "BYTES/S", "no limit", "of a link, one way, such as 25e9"),
    ("--message-bytes", "message_bytes", 1.0, False, "N,...", "0", "size of a stage's output"),
    ("--activation-bytes", "activation_bytes", 1.0, True, "N,...", "0", "kept from a forward to its backward"),
    ("--stash-bytes", "stash_bytes", 1.0, True, "N,...", "0", "part of them that stays until the weight-gradient half"),
    ("--input-bytes", "input_bytes", 1.0, False, "N,...", "0", "what policy recompute keeps instead of activations"),
    ("--weight-bytes", "weight_bytes", 1.0, True, "N,...", "0", "size of one version of the weights"),
)
_SINGLE = ("hop_s", "bandwidth_bytes_per_s")

PICTURES = (".png", ".pdf", ".svg")
MOST_SHOWN, MOST_DRAWN, MOST_ROWS = 2 * 10**6, 50_000, 128


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt simulate``."""
    names = ", ".join(schedules.FAMILIES)

    def option(group: Any, flag: str, kind: Any, metavar: str, text: str, default: Any = None) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)

    group = parser.add_argument_group("schedule")
    option(group, "--schedule", str, "NAME", f"{names} (default: paci)", "paci")
    option(group, "--stages", int, "P", "pipeline stages, one device each (default: 4)")
    option(group, "--micro-batches", int, "M", "micro-batches per window (schedules that update after every one run M "
           "windows instead) (default: 8)", 8)  # fmt: skip
    option(group, "--windows", int, "N", "local updates of every stage (default: 1 for schedules that flush; for "
           "the others enough to reach the steady state)")  # fmt: skip
    option(group, "--slack", slack_argument, "S|S,S,...,0|auto", "extra warm-up forwards: one number for all "
           "stages but the last, or one per stage, or auto: as many as hide the latency (default: 0)", 0)  # fmt: skip
    option(group, "--chunks", int, "V", "pieces of the model in each stage (interleaved and looped ones, default 2)")
    option(group, "--activation-limit", number, "X", "of paci-v: what a stage may hold, in whole stages of two pieces "
           "each (default: the least at full rate)")  # fmt: skip
    option(group, "--policy", str, "NAME", f"{', '.join(policies.POLICIES)} (default: the schedule's own)")
    group.add_argument(
        "--lookahead",
        action=argparse.BooleanOptionalAction,
        help="early forwards use predicted weights and take --predict longer (default: as the schedule; paci does)",
    )
    group = parser.add_argument_group("costs")
    for flag, field, _, _, metavar, default, meaning in _COSTS:
        option(group, flag, number if field in _SINGLE else numbers, metavar, f"{meaning} (default: {default})")
    option(group, "--micro-batch-factors", numbers, "X,...", "multiply the times of micro-batch m by number m; after "
           "the last number start again with the first (default: 1)")  # fmt: skip
    option(group, "--noise", number, "X", "relative standard deviation of every time (default: 0)", 0.0)
    option(group, "--seed", int, "N", "seed of the noise (default: 0)", 0)
    option(group, "--profile", str, "FILE", "take the costs from a file of paci-rt plan --profile; options given "
           "here replace its values")  # fmt: skip
    option(group, "--partition", integers, "N,N,...", "blocks of the profile per stage, or per piece with --chunks "
           "(default: balanced by the time of each stage, or of all its pieces)")  # fmt: skip
    group = parser.add_argument_group("results")
    option(group, "--plot", str, "FILE.png", "draw the timeline")
    group.add_argument("--frontier", action="store_true", help="of paci-v: print what more and fewer activations buy, "
                       "and paci's slack beside it; --json writes rows")  # fmt: skip
    option(group, "--trace", str, "FILE.json", "write the timeline, to open at ui.perfetto.dev")
    group.add_argument("--grid", action="store_true", help="print the timeline as text")


def run(args: argparse.Namespace) -> int:
    """``paci-rt simulate``."""
    for flag, path in (("--json", args.json), ("--plot", args.plot), ("--trace", args.trace)):
        outputs.check_file(flag, path)
    _check_integers(args)
    family = schedules.get(args.schedule)
    shape = _shape(args, family)
    policy = policies.resolve(family, shape, args.policy)
    costs, partition = _costs(args, family, shape, policy)
    if args.slack == AUTO:
        shape = replace(shape, slack=_planned(costs, family, shape, policy))
        policies.resolve(family, shape, policy)
    if family.takes_costs:
        shape = replace(shape, costs=_step_costs(costs, family, shape, policy))
        check_shape(family, shape)
    if args.frontier:
        return simulate_frontier.run(args, family, shape, costs, line=_line_costs(args, shape))
    windows = _windows(args, family, shape)
    _check_size(args, family, shape, windows)
    if args.plot is not None:
        from paci_rt.report import plots

        plots.require_matplotlib("--plot")
        if Path(args.plot).suffix.lower() not in PICTURES:
            raise ValueError(f"--plot {args.plot} is no picture: let the name end in {', '.join(PICTURES)}")
    shown = args.grid or args.plot is not None or args.trace is not None
    found = simulate(family, shape, costs, windows=windows, policy=policy, lookahead=args.lookahead, keep_events=shown)
    strict = None
    if shape.slack:
        order = replace(shape, slack=0)
        strict = simulate(family, order, costs, windows=windows, policy=policy, lookahead=args.lookahead)
    _write(args, found, strict, partition)
    print(report_text(found, strict))
    if args.grid:
        from paci_rt.trace import format_timeline

        width = min(160, max(80, shutil.get_terminal_size((120, 24)).columns))
        print("\n" + format_timeline(found.events, ranks=found.ranks, rank_of=shape.rank_of, width=width))
    return 0


def _check_integers(args: argparse.Namespace) -> None:
    bounds = (
        ("stages", 1, limits.MOST_STAGES),
        ("micro_batches", 1, limits.MOST_MICRO_BATCHES),
        ("windows", 1, limits.MOST_WINDOWS),
        ("chunks", 1, limits.MOST_STAGES),
        ("seed", 0, 2**63 - 1),
    )
    for name, least, most in bounds:
        value = getattr(args, name)
        if value is not None:
            limits.check_integer(f"--{name.replace('_', '-')}", value, least, most)
    if (args.stages or 1) * (args.chunks or 1) > limits.MOST_STAGES:
        raise ValueError(
            f"--stages {args.stages} of --chunks {args.chunks} are more than {limits.MOST_STAGES:,} pieces: give fewer"
        )


def _shape(args: argparse.Namespace, family: ScheduleFamily) -> Shape:
    chunks = family.chunks if args.chunks is None else args.chunks
    limits.check_activation_limit(args.activation_limit, "--activation-limit")
    check_takes(family, chunks=chunks, activation_limit=args.activation_limit, prefix="--")
    if args.partition is not None:
        if args.profile is None:
            raise ValueError("--partition cuts the blocks of a profile: give --profile FILE with it")
        if args.stages is None:
            args.stages = max(1, len(args.partition) // chunks)
        if len(args.partition) != args.stages * chunks:
            raise ValueError(
                f"--partition has {len(args.partition)} numbers for {args.stages} stages"
                f"{f' of {chunks} pieces' if chunks > 1 else ''}: give {args.stages * chunks}"
            )
    if args.stages is None:
        args.stages = 4
    shape = Shape(
        num_stages=args.stages * chunks,
        accumulation=1 if family.one_micro_batch_windows else args.micro_batches,
        slack=auto_slack.checked(args.slack, family, args.stages * chunks),
        chunks=chunks,
        placement=family.placement,
        activation_limit=args.activation_limit,
    )
    check_shape(family, shape)
    return shape


def _costs(
    args: argparse.Namespace, family: ScheduleFamily, shape: Shape, policy: str
) -> tuple[Costs, tuple[int, ...] | None]:
    """What the options and the profile say, with a value for every stage; and the partition."""
    values: dict[str, Any] = {"forward_s": (MS,), "input_grad_s": (MS,), "weight_grad_s": (MS,)}
    if args.profile is None:
        values = {name: tuple(value / shape.chunks for value in given) for name, given in values.items()}
        base, partition = Costs(**values), None
    else:
        base, partition = _profiled(args, family, shape, policy)
    given: dict[str, Any] = {"noise": _in_range("--noise", args.noise, "noise"), "seed": args.seed}
    for flag, field, unit, shared, *_ in _COSTS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is None:
            continue
        if field in _SINGLE:
            if field == "bandwidth_bytes_per_s" and not value >= LEAST_BANDWIDTH:
                raise ValueError(
                    f"{flag} is {value:g}: give a number above 0, at least {LEAST_BANDWIDTH:g}, or leave it out for no "
                    "limit"
                )
            given[field] = value if value == math.inf else _in_range(flag, value, field, unit) * unit
        else:
            times = [_in_range(flag, one, field, unit) * unit for one in value]
            given[field] = _per_stage(flag, times, shape, shared=shared)
    if args.micro_batch_factors is not None:
        given["micro_batch_factors"] = tuple(
            _in_range("--micro-batch-factors", x, "micro_batch_factors") for x in args.micro_batch_factors
        )
    fields = {name: getattr(base, name) for name in Costs.__dataclass_fields__}
    return Costs(**(fields | given)), partition


def _line_costs(args: argparse.Namespace, shape: Shape) -> Costs | None:
    """What the options and the profile say of a line of as many stages; None where they speak of every piece."""
    given = [getattr(args, flag[2:].replace("-", "_")) for flag, field, *_ in _COSTS if field not in _SINGLE]
    if args.partition is not None or any(len(values) == shape.num_stages for values in given if values is not None):
        return None
    line = Shape(num_stages=shape.ranks, accumulation=shape.accumulation)
    return _costs(args, schedules.get("paci"), line, "bounded")[0]


def _in_range(flag: str, value: float, field: str, unit: float = 1.0) -> float:
    most = most_of(field) / unit
    if not 0 <= value <= most:
        raise ValueError(f"{flag} is {value:g}: give a finite number of at least 0 and at most {most:g}")
    return value


def _per_stage(flag: str, values: Sequence[float], shape: Shape, *, shared: bool) -> tuple[float, ...]:
    """One value for each stage (piece): those of a rank are cut into as many pieces as it has, if they are shared."""
    if len(values) not in (1, shape.ranks, shape.num_stages):
        pieces = f", or {shape.num_stages}, one for each piece" if shape.chunks > 1 else ""
        raise ValueError(f"{flag} has {len(values)} numbers: give 1, or {shape.ranks}, one for each stage{pieces}")
    cut = shape.chunks if shared and len(values) != shape.num_stages else 1
    of_rank = len(values) == shape.ranks < shape.num_stages
    at = [shape.rank_of(stage) if of_rank else stage % len(values) for stage in range(shape.num_stages)]
    return tuple(values[one] / cut for one in at)


def _profiled(
    args: argparse.Namespace, family: ScheduleFamily, shape: Shape, policy: str
) -> tuple[Costs, tuple[int, ...]]:
    from paci_rt import planner
    from paci_rt.planner.candidate import Limits
    from paci_rt.planner.evaluate import Evaluator

    profile = planner.load_profile(args.profile)
    partition = args.partition
    if partition is None:
        if shape.num_stages > profile.middle:
            raise ValueError(
                f"--stages is {shape.ranks}: the profile has only {profile.middle} blocks to cut"
                f"{f' into {shape.num_stages} pieces' if shape.chunks > 1 else ''}; use fewer"
            )
        limits = Limits(memory_bytes=(math.inf,) * shape.ranks, measured=False)
        judge = Evaluator(profile=profile, speeds=(1.0,) * shape.ranks, limits=limits)
        window = min(shape.accumulation, 4 * shape.num_stages)
        one = planner.Candidate(schedule=family.name, policy=policy, accumulation=window, chunks=shape.chunks)
        found = judge.best_cut(one, family) if shape.chunks > 1 else judge.prepare(one, family)
        if found.partition is None:
            raise ValueError(str(found.rejected))
        partition = found.partition
    return planner.stage_costs(profile, partition), partition


def _step_costs(costs: Costs, family: ScheduleFamily, shape: Shape, policy: str) -> StepCosts:
    """What a searched schedule is fitted to."""
    from paci_rt import planner

    spread: dict[str, Any] = {
        name: tuple(costs.per_stage(name, shape.num_stages).tolist())
        for name in ("forward_s", "input_grad_s", "weight_grad_s")
    }
    again = [policies.recomputes(policy, family, shape, shape.rank_of(stage)) for stage in range(shape.num_stages)]
    fitted = planner.step_costs(replace(costs, **spread), again)
    return fitted if any(costs.activation_bytes) else fitted._replace(stash=StepCosts().stash)


def _planned(costs: Costs, family: ScheduleFamily, shape: Shape, policy: str) -> Slack:
    found = auto_slack.planned(costs, family, shape, policy)
    if found is None:
        raise ValueError(
            "--slack auto: nothing says how long messages take; give --comm MS, or --message-bytes with --bandwidth, "
            "or a --profile that knows, or --slack as numbers"
        )
    return found


def _windows(args: argparse.Namespace, family: ScheduleFamily, shape: Shape) -> int:
    """Windows to play."""
    windows: int | None = args.windows
    if family.one_micro_batch_windows and windows is not None:
        return windows * int(args.micro_batches)
    if windows is not None:
        return windows
    if family.flush:
        return 1
    ahead = max(family.in_flight_bound(shape, rank) for rank in range(shape.ranks)) - 1
    enough = 8 + 2 * -(-ahead // shape.accumulation)
    return max(enough, args.micro_batches) if family.one_micro_batch_windows else enough


def _check_size(args: argparse.Namespace, family: ScheduleFamily, shape: Shape, windows: int) -> None:
    """Raise ValueError for a simulation that would take too much time or memory."""
    count = shape.num_stages * windows * (shape.accumulation * (3 if family.split else 2) + 1)
    for what, asked, most in (
        ("paci-rt simulate plays", True, limits.MOST_ACTIONS),
        ("--trace writes", args.trace is not None, MOST_SHOWN),
        ("--grid shows", args.grid, MOST_SHOWN),
        ("--plot draws", args.plot is not None, MOST_DRAWN),
    ):
        if asked and count > most:
            flags = "--windows or --micro-batches" if windows > 1 else "--micro-batches or --stages"
            raise ValueError(f"{what} at most {most:,} actions, and these are {count:,}: give fewer {flags}")
    if args.plot is not None and shape.ranks > MOST_ROWS:
        raise ValueError(f"--plot draws at most {MOST_ROWS} stages, and these are {shape.ranks}: leave it out")


def _write(
    args: argparse.Namespace, found: Simulation, strict: Simulation | None, partition: tuple[int, ...] | None
) -> None:
    if args.plot is not None:
        from paci_rt.report import plots

        lane = plots.simulated_lane(found)
        span_s = found.makespan_s or 1.0
        plots.timeline(
            outputs.ready(args.plot), [lane], span_s=span_s, width_inch=plots.legible_width_inch([lane], span_s)
        )
    if args.trace is not None:
        from paci_rt.trace import write_perfetto

        write_perfetto(outputs.ready(args.trace), found.events)
    result = to_json(found)
    if strict is not None:
        whole = to_json(strict)
        result["without_slack"] = {name: whole[name] for name in PRICE}
    outputs.write_json(args.json, result | ({} if partition is None else {"partition": list(partition)}))
