"""The command ``paci-rt``: train, prepare, compare, report, simulate, plan, calibrate, doctor."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from paci_rt.cli import environment
from paci_rt.errors import (
    CheckpointError,
    CheckpointWriteError,
    DataError,
    NonFiniteError,
    PaciError,
    RunStopped,
    ScheduleError,
    StageFailed,
)
from paci_rt.wording import did_you_mean, unknown

BAD_VALUE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
ASKED_FOR = (CheckpointError.__name__, DataError.__name__)
"""Errors about what was asked for, whoever finds them."""
NOT_THE_CODE = (NonFiniteError.__name__, CheckpointWriteError.__name__)
"""Errors of which a traceback says nothing."""
LONGEST = 1200
"""Characters of an error: the middle of what is longer is left out."""

DESCRIPTION = """\
Pipeline-parallel training without bubbles, on stock PyTorch.

  paci-rt train --stages 2 --steps 200              train a small GPT through two processes
  paci-rt prepare --data corpus.jsonl --out tokens  turn text into files of tokens for train --data tokens
  paci-rt eval RUN                                  the loss of a checkpoint
  paci-rt sample RUN --prompt "Once upon"           text from a checkpoint
  paci-rt export RUN --to DIR                       a checkpoint as safetensors, for transformers
  paci-rt compare --schedules 1f1b,paci --out DIR   which schedule reaches a target loss first?
  paci-rt report runs/a runs/b --out report         figures and one page from any set of runs
  paci-rt simulate --schedule zb-h1 --plot zb.png   predict bubbles, memory and drift of a schedule; draw it
  paci-rt plan --stages 4 --memory-limit 2GiB       measure a model; choose a partition and a schedule
  paci-rt calibrate --stages 4 --out overhead.json  what late gradients cost on your model, for plan
  paci-rt doctor                                    check this machine: what works, what is missing, how to fix it
"""


class _Parser(argparse.ArgumentParser):
    """Errors are one line; for a misspelt option or command it names the most similar one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # also -1,0 is a value and no option, as in Python 3.14

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: command"):
            commands = "train, prepare, eval, sample, export, compare, report, simulate, plan, calibrate or doctor"
            message = f"no command given: say {commands}, or --help"
        raise ValueError(message.removeprefix("argument "))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown(str(action.metavar), value, action.choices)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise for arguments that no option takes."""
        first = unknown[0]
        if not first.startswith("-"):
            raise ValueError(f"unexpected argument {first!r}: options start with --")
        hint = did_you_mean(first.split("=")[0], self._option_string_actions)
        raise ValueError(f"unknown option {first}: {hint}see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 failed, 2 a bad value, 130 interrupted, 143 ended by SIGTERM."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return int(args.run(args))
    except CheckpointWriteError as error:
        print(f"paci-rt: error: {_who()}{_in_one_line(error)}", file=sys.stderr)
        return FAILED
    except ValueError as error:  # also the typed ones, which are about what was asked for
        if "TORCHELASTIC_RUN_ID" in os.environ or environment.speaks():  # one of the processes under torchrun for all
            say_once(f"paci-rt: error: {_in_one_line(error)}")
        return BAD_VALUE
    except RunStopped as error:
        say_once(f"paci-rt: {error}")
        return TERMINATED
    except KeyboardInterrupt:
        print("paci-rt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (PaciError, OSError) as error:
        if isinstance(error, StageFailed) and error.cause in ASKED_FOR:
            print(f"paci-rt: error: {error}", file=sys.stderr)  # about what was asked for, though a stage found it
            return BAD_VALUE
        if isinstance(error, StageFailed):
            if error.cause not in NOT_THE_CODE:
                print(error.remote_traceback, end="", file=sys.stderr)
        elif error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"paci-rt: error: {_who()}{_in_one_line(error)}", file=sys.stderr)
        return FAILED
    except Exception as error:
        if who := _who():  # of the tracebacks that follow nobody knows whose they are
            said = f"{type(error).__name__}: {_in_one_line(error)}"
            print(f"paci-rt: error: {who}{said}", file=sys.stderr, flush=True)
        raise


def say_once(line: str) -> None:
    """Print ``line`` on standard error; of the processes that torchrun has started, the first that has it does."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from paci_rt.launch.torchrun import first_to_say

        if not first_to_say(line):
            return
    print(line, file=sys.stderr)


def _who() -> str:
    """Under torchrun, whose lines are mixed, the rank."""
    return f"rank {os.environ['RANK']}: " if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ else ""


def _in_one_line(error: Exception) -> str:
    """Whatever the value that it names; the picture of a schedule that cannot run has more lines."""
    text = str(error)
    if not isinstance(error, ScheduleError):
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command that ``argv`` gives, with its options."""
    from paci_rt import __version__
    from paci_rt.cli import calibrate, compare, doctor, evaluate, export, plan, prepare, report, sample, simulate, train

    parser = _Parser(
        prog="paci-rt",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"paci-rt {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, title="commands")
    for name, summary, command in (
        ("train", "train a language model through a pipeline", train),
        ("prepare", "turn text into files of tokens, to train on", prepare),
        ("eval", "the loss of a checkpoint over held-back text", evaluate),
        ("sample", "text from a checkpoint", sample),
        ("export", "a checkpoint as a folder that transformers loads", export),
        ("compare", "train under several schedules and compare the time to a target loss", compare),
        ("report", "draw figures and a page from runs", report),
        ("simulate", "predict what a schedule does, without training", simulate),
        ("plan", "measure a model; choose a partition and a schedule", plan),
        ("calibrate", "measure what late gradients cost in tokens, on a model cut small", calibrate),
        ("doctor", "check what this machine can do, and how to fix the rest", doctor),
    ):
        sub = commands.add_parser(
            name,
            usage=getattr(command, "USAGE", f"paci-rt {name} [options]"),
            help=summary,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add(sub)
        sub.add_argument("--json", metavar="FILE", help=command.JSON_HELP)
        sub.set_defaults(run=command.run, parser=sub)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    return args
