"""Command-line options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

from paci_rt.schedules import Slack
from paci_rt.schedules.slack import parse_slack

MS = 1e-3
"""Seconds of a millisecond."""
_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12} | {
    f"{letter}IB": 2.0 ** (10 * power) for power, letter in enumerate("KMGT", 1)
}


# ------------------------------------------------------------------------------------------------------ types of values


def number(text: str) -> float:
    """The type of an option that takes a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def milliseconds(text: str) -> float:
    """The type of an option that takes a time of at least 0 milliseconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of at least 0 milliseconds")
    return value


def size(text: str) -> float:
    """The type of an option that takes bytes: ``8GiB``, ``500MB``, or a plain number."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*?)(?:/s)?\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    try:
        value = float(match[1]) * unit if match is not None and unit is not None else -1.0
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0: write 8GiB, 500MB or a number of bytes")
    return value


def list_of(kind: Callable[[str], Any], what: str) -> Callable[[str], tuple[Any, ...]]:
    """The type of an option that takes several values with commas between them."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {what}") from None

    return parse


integers = list_of(int, "integers such as 3,5")
numbers = list_of(float, "numbers such as 10,10,5")


def names(text: str) -> tuple[str, ...]:
    """The type of an option that takes names with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def target_loss(text: str) -> tuple[float, ...] | None:
    """The type of ``--target-loss``; None is ``auto``."""
    if text == "auto":
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (float("nan"),)
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto nor a positive number of nats per token, or several such as 3.5,3.2"
        )
    return values


def slack_argument(typed: str) -> Slack | str:
    """The type of ``--slack``."""
    try:
        return parse_slack(typed)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _step_costs(text: str) -> Any:
    """The type of ``--step-costs``."""
    from paci_rt.schedules import StepCosts

    try:
        return StepCosts.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# -------------------------------------------------------------------------------------------------------------- options


class ConfigOptions:
    """Adds options named after the fields of ``TrainConfig``. One that is not given stays out of the namespace, so
    that defaults live in one place."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        from paci_rt.train.config import TrainConfig

        self._parser = parser
        self._defaults = {field.name: field.default for field in fields(TrainConfig)}

    def group(self, title: str) -> None:
        self._group = self._parser.add_argument_group(title)

    def add(self, name: str, kind: Any, metavar: str, text: str, *, default: bool = True) -> None:
        """``default``: whether the help text ends with that of the field."""
        if default and self._defaults[name] is not None:
            text += f" (default: {self._defaults[name]})"
        flag = "--" + name.replace("_", "-")
        self._group.add_argument(flag, type=_or_default(kind), metavar=metavar, default=argparse.SUPPRESS, help=text)

    def switch(self, name: str, text: str) -> None:
        """``--name`` and ``--no-name``."""
        action = argparse.BooleanOptionalAction
        self._group.add_argument("--" + name.replace("_", "-"), action=action, default=argparse.SUPPRESS, help=text)


def _or_default(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option that also takes the word ``default``, for as if it had not been given."""

    from paci_rt.train.config_file import DEFAULT

    @wraps(kind, updated=())
    def parse(text: str) -> Any:
        return text if text == DEFAULT else kind(text)

    return parse


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a training configuration that were given, ``default`` for those that are to be taken back."""
    from paci_rt.train.config import TrainConfig

    return {field.name: getattr(args, field.name) for field in fields(TrainConfig) if hasattr(args, field.name)}


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a training configuration that were given a value."""
    from paci_rt.train.config_file import DEFAULT

    return {
        name: value for name, value in given_options(args).items() if not (isinstance(value, str) and value == DEFAULT)
    }


# fmt: off
def add_pipeline(options: ConfigOptions) -> None:
    """Options of the pipeline itself."""
    from paci_rt.schedules.policies import POLICIES

    options.add("stages", int, "P", "pipeline stages, one process each")
    options.add("chunks", int, "V", "pieces of the model in each stage (interleaved and looped schedules, default 2)")
    options.add("accumulation", int, "A", "micro-batches per local update (default: 4; async-1f1b: always 1)")
    options.add("slack", slack_argument, "S|S,S,...,0|auto", "extra warm-up forwards: they hide link latency and cost "
                "memory and drift. One number for all stages but the last, or one per stage, or auto, as many as "
                "--profile shows to be enough; asynchronous schedules only")
    options.add("profile", str, "FILE", "for --slack auto: a file of paci-rt plan --profile FILE --measure-link, which "
                "has the times of stages and messages")
    options.add("policy", str, "NAME", f"which weights forwards and backwards use: {', '.join(POLICIES)} (default: the "
                "schedule's own)")
    options.switch("recompute_blocks", "keep only what goes into each block, and run it again in its backward: less "
                   "memory for a third more work; under paci with --policy recompute")
    options.switch("lookahead", "run early forwards at predicted weights, those that the gradients so far would lead "
                   "to; asynchronous schedules with paci_rt's own optimizers (default: on for paci)")
    options.add("activation_limit", number, "X", "activations that a rank may hold under paci-v, in whole stages of "
                "two pieces each (default: the least at full rate)")
    options.add("step_costs", _step_costs, "F,I,W[,HOP[,STASH]]", "what zb-1p, zb-2p and paci-v are fitted to: times "
                "of F, I, W and a message in any one unit, and the share of the activations that stays after I; F, I "
                "and W may be a:b:c, one per stage (default: F, I and W equal, no hop; for paci-v by the multiply-adds "
                "of every piece)")
    options.add("replicas", int, "N", "pipelines that train together, each on its share of --batch-size; N times P "
                "processes (default: 1)")
    options.switch("zero1", "replicas share the optimizer's state (ZeRO-1)")
    options.add("overlap", int, "M", "micro-batches of the next window that run while replicas add up gradients "
                "(default: half a window under paci and paci-split)")
    options.add("buffers", int, "N", "gradient buffers per stage: with 2, an update runs beside the next window "
                "(default: 1)")
    options.add("partition", integers, "N,N,...", "blocks per stage, for example 3,5; with --chunks per piece, "
                "in the order of the model (default: balanced by cost, with several pieces the sum of a process's)")


def add_training(options: ConfigOptions) -> None:
    """Options of model, data, optimization and processes."""
    from paci_rt.train.config import DTYPES, OPTIMIZERS
    from paci_rt.train.families import FAMILIES, MODELS
    from paci_rt.transport import TRANSPORTS

    options.group("model and data")
    options.add("model", str, "NAME", f"{', '.join(MODELS)} (default: the first of --family)")
    options.add("family", str, "NAME", f"{', '.join(FAMILIES)} (default: gpt2)")
    options.add("layers", int, "N", "blocks; this and the next ones change the named model")
    options.add("heads", int, "N", "attention heads")
    options.add("kv_heads", int, "N", "heads of keys and values, in llama (default: in proportion to --heads)")
    options.add("width", int, "N", "size of the residual stream")
    options.add("ffn_width", int, "N", "width inside the MLP, in llama and encoder (default: in proportion to --width)")
    options.add("vocab_size", int, "N", "number of tokens; in encoder with the mask, the last one")
    options.add("context", int, "N", "longest sequence")
    options.add("rope_base", float, "X", "base of the rotary positions, in llama and encoder")
    options.switch("tied", "the head uses the weight of the token embedding")
    options.add("data", str, "PATH", "a text file or a folder of them (bytes are the tokens), a .bin file of uint16 "
                "tokens, or a folder with train.bin and val.bin (default: the text of Python's standard library)")
    options.add("batch_size", int, "N", "sequences per local update")
    options.add("seq_len", int, "N", "tokens per sequence (default: 128)")
    options.add("dtype", str, "NAME", f"{' or '.join(DTYPES)}; bf16 and fp16 keep fp32 master weights in the "
                "optimizer, fp16 has a dynamic loss scale. Autocast is not used: its copies of every weight would stay "
                "in memory until the backward")
    options.group("optimization")
    options.add("steps", int, "N", "local updates of every stage")
    options.add("optimizer", str, "NAME", f"{', '.join(OPTIMIZERS)}; torch-* are torch's own, the "
                "others paci_rt's fused ones; muon updates the matrices inside blocks, and AdamW the rest")
    options.add("lr", float, "X", "peak learning rate")
    options.add("min_lr", float, "X", "learning rate at the end of the cosine (default: a tenth of --lr)")
    options.add("lr_steps", int, "N", "local updates until the end of the cosine (default: --steps)")
    options.add("warmup_steps", int, "N", "local updates of linear warm-up (default: a twentieth of --lr-steps; "
        "with a second moment at least 2 / (1 - beta2), up to a fifth)")
    options.add("warmup_share", float, "X", "share of --lr-steps that warms up, in place of that")
    options.add("weight_decay", float, "X", "weight decay of parameters with two or more dimensions")
    options.add("beta1", float, "X", "first beta of all optimizers but SGD")
    options.add("beta2", float, "X", "second beta of all optimizers but SGD (default: 0.95, for lion 0.99)")
    options.add("momentum", float, "X", "momentum of SGD and Muon (default: 0.9, for muon 0.95)")
    options.add("clip_grad_norm", number, "X", "largest 2-norm of the whole model's gradient, all stages together: "
                "exact under schedules that flush, by the newest norms that a stage has heard of under the others")
    options.add("on_nonfinite", str, "NAME", "what to do about gradients with NaN or infinite values: raise ends the "
                "run; skip-window drops the window on every stage; skip-local drops it on the stage that has them")
    options.add("skip_spikes", number, "Z", "also skip windows whose gradient norm is Z standard deviations above "
                "those of the last ones")
    options.group("running")
    options.add("seed", int, "N", "seed of weights and batches; equal seeds give equal parameters, bit for bit")
    options.add("eval_interval", int, "N", "local updates between validations (default: a tenth of --steps)")
    options.add("eval_batches", int, "N", "held-back batches per validation")
    options.switch("eval_drained", "empty the pipeline for every validation, so that all stages have the same weights "
                   "in any case, as paci-v always does, instead of running it among the training (exact where the "
                   "accumulation is at least P)")
    options.add("device", str, "NAME", "cpu, cuda (one GPU per process), cuda:N, or auto (cuda if usable, else cpu)")
    options.add("transport", str, "NAME", f"{', '.join(TRANSPORTS)}; local runs all stages in one process; auto is shm "
                "on one host, else gloo")
    options.add("transfer_timeout", float, "SECONDS", "longest wait of a stage for another one; after it the run ends "
                "with an error")
    options.add("grace_s", float, "SECONDS", "what SIGTERM leaves to drain, save into --out and end")
    options.add("threads", int, "N", "compute threads per stage")
    options.add("port", int, "N", "port on 127.0.0.1 where the stages meet; 0: any free port")
