"""The command ``paci-rt``: train, compare, simulate, plan, doctor."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from paci_rt.errors import PaciError, StageFailed
from paci_rt.train import outputs

BAD_VALUE, FAILED, INTERRUPTED = 2, 1, 130

DESCRIPTION = """\
Pipeline-parallel training without bubbles, on stock PyTorch.

  paci-rt train --stages 2 --steps 200              train a small GPT through two processes
  paci-rt compare --schedules 1f1b,paci --out DIR   which schedule reaches a loss first?
  paci-rt simulate --schedule zb-h1 --plot zb.png   what would a schedule do? bubbles, memory, drift, a picture
  paci-rt plan --stages 4 --memory-limit 2GiB       measure a model, choose how to cut it and which schedule to run
  paci-rt doctor                                    what was built, what is usable, what to do about the rest
"""

TRAIN_DESCRIPTION = """\
Train a GPT through a pipeline. Every stage is a process of its own, started here (or by torchrun:
torchrun --nproc-per-node 2 -m paci_rt train ...).

The batch size counts sequences per local update, and a window of --accumulation micro-batches is cut from it, so runs
with different schedules and accumulations see the same tokens per update.
"""

COMPARE_DESCRIPTION = """\
Time to accuracy: train the same model on the same data under several schedules, one run after another, and tell which
reached the target loss first. With --out, the folder gets report.md, loss_vs_tokens.png, loss_vs_time.png,
timeline.png and one trace-SCHEDULE.json a schedule, which opens at ui.perfetto.dev.
"""

DOCTOR_DESCRIPTION = """\
Show what was built, what was found and what is usable, and what to do about what is not. Ends with exit code 0 if this
machine can train. Looks at GPUs without starting one up.
"""

JSON_HELP = {
    "train": "write the result: schedule stages accumulation steps tokens train_loss val_loss wall_s tokens_per_s "
    "utilization max_drift drift_bound peak_memory_bytes params_sha256, and the curves",
    "compare": "write the result: runs[] (each with the keys of train --json, time_to_target_s and tokens_to_target), "
    "target_loss, and speedup_vs: {A: {B: how many times as fast as A schedule B reached the target}}",
    "doctor": "write the findings: native torch gloo shm cuda nccl triton gpus cores memory_bytes advice usable ...",
}


class _Parser(argparse.ArgumentParser):
    """Errors are one line; misspelt options and commands come with the nearest that exists."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: command"):
            message = "no command given: say train, compare, simulate, plan or doctor, or --help"
        raise ValueError(message.removeprefix("argument "))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            raise ValueError(
                f"unknown {action.metavar} {value!r}: {_nearest(value, known)}choose from {', '.join(known)}"
            )

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Complain about arguments that nobody understood."""
        first = unknown[0]
        if not first.startswith("-"):
            raise ValueError(f"unexpected argument {first!r}: options start with --")
        raise ValueError(
            f"unknown option {first}: {_nearest(first, self._option_string_actions)}see {self.prog} --help"
        )


def _nearest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word.split("=")[0], list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}? " if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 failed, 2 a bad value, 130 interrupted."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        return int(args.run(args))
    except ValueError as error:  # also the typed ones, which are about what was asked for
        if os.environ.get("RANK", "0") == "0":  # one of the processes under torchrun speaks for all
            print(f"paci-rt: error: {error}", file=sys.stderr)
        return BAD_VALUE
    except KeyboardInterrupt:
        print("paci-rt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (PaciError, OSError) as error:
        if isinstance(error, StageFailed):
            print(error.remote_traceback, end="", file=sys.stderr)
        elif error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"paci-rt: error: {error}", file=sys.stderr)
        return FAILED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from paci_rt import __version__, cli_plan, cli_simulate

    parser = _Parser(
        prog="paci-rt",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"paci-rt {__version__}")
    json_help = {**JSON_HELP, "simulate": cli_simulate.JSON_HELP, "plan": cli_plan.JSON_HELP}
    commands = parser.add_subparsers(metavar="command", required=True, title="commands")
    for name, summary, describe, add, run in (
        ("train", "train a GPT through a pipeline", TRAIN_DESCRIPTION, _add_train, _train),
        ("compare", "time to accuracy of several schedules", COMPARE_DESCRIPTION, _add_compare, _compare),
        ("simulate", "what a schedule would do", cli_simulate.DESCRIPTION, cli_simulate.add, cli_simulate.run),
        ("plan", "how to cut a model, and which schedule to run", cli_plan.DESCRIPTION, cli_plan.add, cli_plan.run),
        ("doctor", "what is usable here, and how to get the rest", DOCTOR_DESCRIPTION, _add_doctor, _doctor),
    ):
        sub = commands.add_parser(
            name,
            usage=f"paci-rt {name} [options]",
            help=summary,
            description=describe,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add(sub)
        sub.add_argument("--json", metavar="FILE", help=json_help[name])
        sub.set_defaults(run=run, parser=sub)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    return args


# ----------------------------------------------------------------------------------------------------------- options


class _Options:
    """Adds options named after the fields of ``TrainConfig``. One that is not given stays out of the namespace, so
    that defaults live in one place."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        from paci_rt.train.config import TrainConfig

        self._parser = parser
        self._defaults = {field.name: field.default for field in fields(TrainConfig)}

    def group(self, title: str) -> None:
        self._group = self._parser.add_argument_group(title)

    def add(self, name: str, kind: Any, metavar: str, text: str) -> None:
        default = self._defaults[name]
        if default is not None:
            text += f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        self._group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)

    def switch(self, name: str, text: str) -> None:
        """``--name`` and ``--no-name``."""
        action = argparse.BooleanOptionalAction
        self._group.add_argument(f"--{name}", action=action, default=argparse.SUPPRESS, help=text)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers such as 3,5") from None


def _step_costs(text: str) -> Any:
    from paci_rt.schedules import StepCosts

    try:
        return StepCosts.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _target(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a positive number of nats per token")
    return value


# fmt: off
def _add_pipeline(options: _Options) -> None:
    from paci_rt.policies import POLICIES
    from paci_rt.train import slack

    options.add("stages", int, "P", "pipeline stages, one process each")
    options.add("chunks", int, "V", "pieces of the model in each stage (interleaved-1f1b only; default there: 2)")
    options.add("accumulation", int, "A", "micro-batches per local update (default: 4; async-1f1b: always 1)")
    options.add("slack", slack.argument, "S|S,S,...,0|auto", "more warm-up forwards, which hide link latency and cost "
                "activations and drift: on every stage but the last, or one number a stage, or what --profile shows to "
                "be enough; asynchronous schedules only")
    options.add("profile", str, "FILE", "for --slack auto: how long stages and messages take, as written by paci-rt "
                "plan --profile FILE --measure-link")
    options.add("policy", str, "NAME", f"which weights forwards and backwards use: {', '.join(POLICIES)} (default: the "
                "schedule's own)")
    options.switch("lookahead", "run forwards that come before an update of theirs at the weights that the gradients "
                   "seen so far would make; asynchronous schedules with paci_rt's own optimizers (default: paci does)")
    options.add("step_costs", _step_costs, "F,I,W[,HOP[,STASH]]", "times of a micro-batch, in any unit, and the share "
                "of its activations that stays after I, which zb-1p and zb-2p are fitted to; F, I and W may be a:b:c, "
                "one a stage (default: F, I and W equal, no hop)")
    options.add("buffers", int, "N", "gradient buffers a stage: 1 updates in line, 2 double-buffers (default: 1)")
    options.add("partition", _integers, "N,N,...", "blocks by stage, for example 3,5; with --chunks by piece, "
                "stage 0's first one first, then stage 1's first one (default: balanced by cost)")


def _add_training(options: _Options) -> None:
    from paci_rt.train.config import DTYPES, OPTIMIZERS
    from paci_rt.train.gpt import MODELS
    from paci_rt.transport import TRANSPORTS

    options.group("model and data")
    options.add("model", str, "NAME", ", ".join(MODELS))
    options.add("data", str, "PATH", "a text file or a folder of them (bytes are the tokens), a .bin file of "
                "uint16 tokens, or a folder with train.bin and val.bin (default: the text of Python's library)")
    options.add("batch_size", int, "N", "sequences per local update")
    options.add("seq_len", int, "N", "tokens per sequence (default: 128)")
    options.add("dtype", str, "NAME", f"{' or '.join(DTYPES)}; bf16 keeps fp32 masters in the optimizer. There is "
                "no autocast: it copies every weight in each forward and holds the copies until the backward")
    options.group("optimization")
    options.add("steps", int, "N", "local updates of every stage")
    options.add("optimizer", str, "NAME", f"{', '.join(OPTIMIZERS)}; torch's own and paci_rt's "
                "fused ones; muon is for the matrices inside blocks, with AdamW for the rest")
    options.add("lr", float, "X", "peak learning rate")
    options.add("min_lr", float, "X", "where the cosine ends (default: a tenth of --lr)")
    options.add("lr_steps", int, "N", "where the cosine ends, in local updates (default: --steps)")
    options.add("warmup_steps", int, "N", "local updates of linear warm-up (default: a twentieth of --lr-steps)")
    options.add("weight_decay", float, "X", "decay of parameters with two or more dimensions")
    options.add("beta1", float, "X", "first beta of all optimizers but SGD")
    options.add("beta2", float, "X", "second beta of all optimizers but SGD (default: 0.95, for lion 0.99)")
    options.add("momentum", float, "X", "momentum of SGD and Muon (default: 0.9, for muon 0.95)")
    options.group("running")
    options.add("seed", int, "N", "of weights and batches; equal seeds give equal parameters, bit for bit")
    options.add("eval_interval", int, "N", "local updates between validations (default: a tenth of --steps)")
    options.add("eval_batches", int, "N", "held-back batches per validation")
    options.add("device", str, "NAME", "cpu, cuda (one GPU a process), cuda:N, or auto, cuda where it can be used")
    options.add("transport", str, "NAME", f"{', '.join(TRANSPORTS)}; local runs all stages in one process, auto is shm "
                "between processes of one host, else gloo")
    options.add("transfer_timeout", float, "SECONDS", "how long a stage waits for another one before the run ends with "
                "an error that says for what")
    options.add("threads", int, "N", "threads a stage computes on")
    options.add("port", int, "N", "port on 127.0.0.1 where the stages meet; 0 takes a free one")

# fmt: on


def _add_train(parser: argparse.ArgumentParser) -> None:
    from paci_rt.schedules import FAMILIES

    options = _Options(parser)
    options.group("pipeline")
    options.add("schedule", str, "NAME", ", ".join(FAMILIES))
    _add_pipeline(options)
    _add_training(options)
    options.group("results")
    options.add("out", str, "DIR", "save a checkpoint here at the end")
    options.add("save_interval", int, "N", "also every N local updates; 0: only at the end")
    options.add("resume", str, "DIR", "go on from such a checkpoint, with any number of stages and any schedule")
    parser.add_argument("--save-trace", metavar="FILE", help="write the executed actions, for ui.perfetto.dev")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    from paci_rt.schedules import FAMILIES

    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--schedules",
        type=_names,
        default=("paci", "1f1b"),
        metavar="NAME,NAME,...",
        help=f"from {', '.join(FAMILIES)} (default: paci,1f1b)",
    )
    group.add_argument(
        "--target-loss",
        type=_target,
        default=None,
        metavar="X|auto",
        help="validation loss to reach, nats per token; auto: the highest of the final ones (default: auto)",
    )
    group.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs per schedule, from --seed on (default: 1)"
    )
    group.add_argument("--out", metavar="DIR", help="folder for the report, the plots and the traces")
    options = _Options(parser)
    options.group("pipeline")
    _add_pipeline(options)
    _add_training(options)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="leave out the two processes that try gloo")


def _config_options(args: argparse.Namespace) -> dict[str, Any]:
    from paci_rt.train.config import TrainConfig

    return {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}


# ---------------------------------------------------------------------------------------------------------- commands


def _train(args: argparse.Namespace) -> int:
    from paci_rt import launch
    from paci_rt.trace import write_perfetto
    from paci_rt.train.config import TrainConfig
    from paci_rt.train.progress import Progress
    from paci_rt.train.session import check_torchrun, execute, report_text

    options = {**_config_options(args), "trace": args.save_trace is not None}
    if launch.under_torchrun():
        options.setdefault("stages", int(os.environ["WORLD_SIZE"]))
    config = TrainConfig(**options)
    if launch.under_torchrun():
        check_torchrun(config)
    outputs.check_file("--json", args.json)
    outputs.check_file("--save-trace", args.save_trace)
    outputs.check_folder("--out", config.out)
    with Progress(config.schedule) as progress:
        result = execute(config, on_report=progress)
    if result is None:
        return 0
    if args.save_trace is not None:
        write_perfetto(outputs.ready(args.save_trace), result.events)
    outputs.write_json(args.json, result.to_json())
    print(report_text(result))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from paci_rt import launch
    from paci_rt.train import compare, plots
    from paci_rt.train.config import TrainConfig
    from paci_rt.train.progress import Progress
    from paci_rt.train.results import RunResult
    from paci_rt.train.session import execute

    if launch.under_torchrun():
        raise ValueError("compare starts the stages of every run itself: start it without torchrun")
    folder = args.out
    options = {**_config_options(args), "out": None, "trace": folder is not None}
    configs = compare.plan(args.schedules, args.seeds, options)
    outputs.check_file("--json", args.json)
    outputs.check_folder("--out", folder)
    if folder is not None:
        plots.require_matplotlib()

    def run(config: TrainConfig, label: str) -> RunResult:
        with Progress(label) as progress:
            result = execute(config, on_report=progress)
        assert result is not None
        return result

    comparison = compare.compare(configs, target_loss=args.target_loss, execute=run)
    written = compare.write_report(folder, comparison) if folder is not None else []
    outputs.write_json(args.json, comparison.to_json())
    print(f"\n{compare.summary_table(comparison)}\n\n{compare.verdict(comparison)}")
    if written:
        print(f"\n{written[0]} has the whole report, with {', '.join(path.name for path in written[1:])} beside it.")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from paci_rt.train import doctor

    outputs.check_file("--json", args.json)
    findings = doctor.examine(try_gloo=not args.quick)
    outputs.write_json(args.json, findings)
    print(doctor.report_text(findings))
    return 0 if findings["usable"] else FAILED
