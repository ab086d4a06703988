"""``paci-rt plan``: profile a model, then choose partition, schedule, accumulation and slack for given limits."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from paci_rt import planner
from paci_rt.cli import outputs
from paci_rt.cli.options import list_of, milliseconds, names, size, slack_argument
from paci_rt.planner.choose import MEASURED
from paci_rt.planner.profile import BlockProfile, Profile, load_profile

DESCRIPTION = """\
Measure a model block by block. Then choose how to cut it into stages, how many micro-batches make an update, how much
slack to use and which schedule to run, for the shortest time to a loss within the limits: the highest predicted
throughput over token overhead. Throughput is what the simulator says, with one device per stage. Token overhead is what
late gradients cost, by a table of measurements; paci-rt calibrate measures your own. At the end, the paci-rt train
command of the plan is printed.

--rows is the number of sequences in a micro-batch; --batch-size is the number in an update.
"""

JSON_HELP = (
    "write the plan: partition accumulation slack predicted schedule policy chunks step_costs without_slack runners_up "
    "stages command profile"
)

DEFAULT_ROWS, DEFAULT_REPEATS = 2, 10

SETTINGS = ("model", "dtype", "rows", "seq_len", "threads")
"""What a profile is of: options that must agree with those of a file that is read."""


def _delay_limit(text: str) -> int | str | None:
    if text in ("none", MEASURED):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither none nor a number of updates") from None


# fmt: off
def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt plan``."""
    from paci_rt.schedules import AUTO, FAMILIES
    from paci_rt.schedules.policies import POLICIES
    from paci_rt.train.config import DTYPES
    from paci_rt.train.families import MODELS
    from paci_rt.transport import TRANSPORTS

    integers = list_of(int, "integers such as 8,16")

    def option(group: Any, flag: str, kind: Any, metavar: str, text: str, default: Any = None) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)

    group = parser.add_argument_group("model")
    option(group, "--model", str, "NAME", f"{', '.join(MODELS)} (default: gpt-tiny)")
    option(group, "--rows", int, "N", f"sequences per micro-batch (default: {DEFAULT_ROWS})")
    option(group, "--seq-len", int, "N", "tokens per sequence (default: 128)")
    option(group, "--dtype", str, "NAME", f"{' or '.join(DTYPES)} (default: fp32)")
    option(group, "--threads", int, "N", "compute threads per stage (default: 1)")
    option(group, "--profile", str, "FILE", "read the measurement from FILE; if there is none, measure and write it")
    option(group, "--repeats", int, "N", f"micro-batches to time (default: {DEFAULT_REPEATS})", DEFAULT_REPEATS)
    group = parser.add_argument_group("what to choose from")
    option(group, "--stages", int, "P", "pipeline stages, one device each (default: 2)", 2)
    option(group, "--batch-size", integers, "N,N,...", "sequences per update, to choose from; multiples of --rows "
           " (default: --rows times 1, 2, 4 ... up to twice the stages)")
    option(group, "--schedules", names, "NAME,...", f"schedules to choose from: {', '.join(FAMILIES)} (default: all)")
    option(group, "--policies", names, "NAME,...", f"policies to choose from: {', '.join(POLICIES)} "
           "(default: all that a schedule takes)")
    group.add_argument("--lookahead", action=argparse.BooleanOptionalAction, help="early forwards use predicted "
                       "weights (default: as the schedule; paci does)")
    option(group, "--slack", slack_argument, "S|S,S,...,0|auto", "extra warm-up forwards, for schedules that take "
           "slack: one number for all stages but the last, or one per stage (default: auto, as many as pay off)", AUTO)
    option(group, "--chunks", integers, "V,V,...", "stages per device, for schedules that take chunks (default: 2)",
           (2,))
    option(group, "--optimizer", str, "NAME", "of the run, for its token overhead; memory is counted for adamw "
           "(default: adamw)", "adamw")
    option(group, "--token-overhead", str, "FILE", "what late gradients cost, measured by paci-rt calibrate; it stands "
           "in place of the package's own measurements of the same kind")
    group = parser.add_argument_group("limits and devices")
    option(group, "--memory-limit", list_of(size, "sizes"), "SIZE[,SIZE...]", "memory of every device, or of each in "
           "order, such as 8GiB")
    option(group, "--drift-limit", int, "N", "most updates between a micro-batch's forward and its backward")
    option(group, "--delay-limit", _delay_limit, "N", "most updates by which a gradient comes late, or none "
           "for no limit; schedules whose token overhead is unknown run too, then (default: measured, those near "
           "which token overhead was measured)",
           MEASURED)
    option(group, "--device-speeds", list_of(float, "numbers such as 1,1,0.5"), "X,X,...", "speed of each device "
           "in order; the profiled device has speed 1 (default: all 1)")
    option(group, "--hop-ms", milliseconds, "MS", "latency of messages between stages (default: the profile's, or 0)")
    option(group, "--bandwidth", size, "SIZE", "bytes per second between stages, such as 10GB (default: the "
           "profile's, or no limit)")
    group.add_argument("--measure-link", action="store_true", help="measure latency and bandwidth between two "
                       "processes on this machine, over --transport")
    option(group, "--transport", str, "NAME", f"how the stages reach each other: {', '.join(TRANSPORTS)} "
           "(default: auto)", "auto")


def run(args: argparse.Namespace) -> int:
    """``paci-rt plan``."""
    from paci_rt.cli import plan_report

    outputs.check_file("--json", args.json)
    _check_transport(args)
    args.overheads = _overheads(args)
    stored = args.profile is not None and Path(args.profile).exists()
    if stored:
        profile = _stored(args)
    else:
        outputs.check_file("--profile", args.profile)
        profile = _measured(args)
    profile = _with_link(args, profile)
    found = _plan(args, profile)
    source = f"measured here over {args.repeats} micro-batch{'es' if args.repeats > 1 else ''}"
    if stored:
        source = f"read from {args.profile}, nothing was measured"
    elif args.profile is not None:
        source += f", and written to {args.profile}"
        outputs.write_json(args.profile, profile.to_json())
    command = plan_report.train_command(profile, found.chosen, optimizer=args.optimizer)
    if command is not None and args.transport != "auto":
        command += f" --transport {args.transport}"
    outputs.write_json(args.json, plan_report.to_json(profile, found, command))
    print(plan_report.report(profile, found, source=source, command=command))
    return 0


def _check_transport(args: argparse.Namespace) -> None:
    from paci_rt.transport import check_transport

    check_transport(args.transport, "--transport")
    if args.measure_link and args.transport == "local":
        raise ValueError(
            "--measure-link measures between two processes, and --transport local has one: leave one of them out"
        )


def _overheads(args: argparse.Namespace) -> planner.OverheadTable | None:
    """The user's table, after a check of the optimizer that is looked up there."""
    from paci_rt.train.config import OPTIMIZERS
    from paci_rt.train.option_checks import check_known

    check_known("--optimizer", args.optimizer, OPTIMIZERS)
    _lookahead(args)
    if args.token_overhead is None:
        return None
    table = planner.load_overheads(args.token_overhead)
    for at, row in enumerate(table.rows):
        if row.optimizer not in OPTIMIZERS or row.optimizer.startswith("torch-"):
            known = ", ".join(name for name in OPTIMIZERS if not name.startswith("torch-"))
            raise ValueError(
                f"token overhead {args.token_overhead}: rows[{at}].optimizer is {row.optimizer!r}: no plan would use "
                f"that row; give one of {known}"
            )
    return table


def _plan(args: argparse.Namespace, profile: Profile) -> planner.Plan:
    return planner.plan(
        profile,
        stages=args.stages,
        accumulations=_accumulations(args.batch_size, int(profile.profiled["rows"]), args.stages),
        memory_limit_bytes=args.memory_limit,
        drift_limit=args.drift_limit,
        delay_limit=args.delay_limit,
        lookahead=_lookahead(args),
        device_speeds=args.device_speeds,
        schedules=args.schedules,
        policies=args.policies,
        slack=args.slack,
        chunks=args.chunks,
        optimizer=args.optimizer.removeprefix("torch-"),
        overheads=args.overheads,
    )


def _lookahead(args: argparse.Namespace) -> bool | None:
    """What was asked for; torch's optimizers do not tell where they are going."""
    foreign = args.optimizer.startswith("torch-")
    if foreign and args.lookahead:
        raise ValueError(
            f"--lookahead with --optimizer {args.optimizer}: only paci_rt's own optimizers tell where they are going; "
            f"use --optimizer {args.optimizer.removeprefix('torch-')}"
        )
    return False if foreign else args.lookahead


def _accumulations(batch_sizes: tuple[int, ...] | None, rows: int, stages: int) -> list[int]:
    """Micro-batches an update, from sequences an update."""
    if batch_sizes is None:
        return [2**power for power in range(max(1, stages).bit_length() + 1)]
    for batch in batch_sizes:
        if batch < 1 or batch % rows:
            near = max(1, round(batch / rows)) * rows
            raise ValueError(
                f"--batch-size {batch} cannot be cut into micro-batches of {rows}; use a multiple of --rows, such as "
                f"{near}"
            )
    return [batch // rows for batch in batch_sizes]


def _stored(args: argparse.Namespace) -> Profile:
    """The profile in the file, which must be of what the options say."""
    from paci_rt.train.families import MODELS

    profile = load_profile(args.profile)
    found = profile.profiled
    for name in ("rows", "seq_len", "threads"):
        if not isinstance(found.get(name), int) or isinstance(found[name], bool) or found[name] < 1:
            raise ValueError(f"profile {args.profile}: profiled.{name} is {found.get(name)!r}: give an integer above 0")
    for name in SETTINGS:
        asked = getattr(args, name)
        if asked is not None and asked != found.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is {asked}, but {args.profile} was measured with {found.get(name)}: leave "
                "the option out, or name another --profile file to measure again"
            )
    model = MODELS.get(str(found.get("model")))
    if model is not None and model.layers != profile.middle:
        raise ValueError(
            f"profile {args.profile}: blocks has {profile.middle} with role middle, but {model.name} has {model.layers}"
        )
    return profile


def _measured(args: argparse.Namespace) -> Profile:
    """Measure the model, after all checks that need no measurement."""
    from paci_rt.train.config import TrainConfig
    from paci_rt.train.gpt_blocks import profile_gpt

    chosen = {name: getattr(args, name) for name in SETTINGS if name != "rows" and getattr(args, name) is not None}
    config = TrainConfig(**chosen, stages=1)  # says what is wrong with model, dtype, seq_len and threads
    rows = DEFAULT_ROWS if args.rows is None else args.rows
    for name, value in (("--rows", rows), ("--repeats", args.repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give an integer of at least 1")
    block = BlockProfile(
        name="any",
        role="middle",
        forward_s=1.0,
        input_grad_s=1.0,
        weight_grad_s=1.0,
        parameter_bytes=0,
        activation_bytes=0,
        stash_bytes=0,
        boundary_bytes=0,
    )
    _plan(args, Profile(blocks=(block,) * config.shape.layers, profiled={"rows": rows}))
    return profile_gpt(
        config.shape,
        rows=rows,
        seq_len=config.seq_len,
        dtype=config.dtype,
        threads=config.threads,
        repeats=args.repeats,
    )


def _with_link(args: argparse.Namespace, profile: Profile) -> Profile:
    """The profile with the latency and the bandwidth that were asked for."""
    if args.measure_link:
        from paci_rt.profiling.link import SMALL_BYTES, measure_link

        largest = max(block.boundary_bytes for block in profile.blocks)
        link = measure_link(max(largest, 4 * SMALL_BYTES), transport=args.transport)
        profile = replace(profile, hop_s=link.hop_s, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s)
    if args.hop_ms is not None:
        profile = replace(profile, hop_s=args.hop_ms / 1e3)
    if args.bandwidth is not None:
        profile = replace(profile, bandwidth_bytes_per_s=args.bandwidth)
    return profile
