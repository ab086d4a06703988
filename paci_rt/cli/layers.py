"""The options of ``paci-rt train`` in four layers: the command line, over a file, over a recipe, over the defaults."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from paci_rt.cli.options import given_options
from paci_rt.train import config_file
from paci_rt.train.config import TrainConfig
from paci_rt.train.recipes import recipe
from paci_rt.wording import shown


def add(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and ``--recipe``."""
    from paci_rt.train.recipes import RECIPES

    group = parser.add_argument_group("where options come from, beside this command line, which goes first")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file with options as name = value, such as batch_size = 128; a run saves its own in "
        f"DIR/{config_file.NAME} of --out DIR",
    )
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"{', '.join(RECIPES)}: what neither the command line nor the file says; any option can be taken "
        "back by the word default, as in --clip-grad-norm default",
    )


def resolved(args: argparse.Namespace, *, beneath: dict[str, Any], more: dict[str, Any]) -> TrainConfig:
    """The configuration that the options make.

    Args:
        beneath: defaults where nothing else says anything. more: options that the command line gives in another way.

    Raises:
        ValueError: a bad value; where it is not of the command line, the message says where it is.
    """
    typed = given_options(args) | more
    stored = {} if args.config is None else config_file.read(args.config)
    derived = stored.pop(config_file.DERIVED, ())
    _check_derived(args.config, stored, derived, typed)
    if typed:
        stored = {name: value for name, value in stored.items() if name not in derived}
    named = stored.pop(config_file.RECIPE, None) if args.recipe is None else args.recipe
    stored.pop(config_file.RECIPE, None)
    of_recipe = {} if named in (None, config_file.DEFAULT) else _recipe(named, args)
    layers = ((f"--recipe {named}", of_recipe), (f"--config {args.config}", stored), ("", typed))
    options, source = dict(beneath), dict.fromkeys(beneath, "")
    for place, layer in layers:
        options |= layer
        source |= dict.fromkeys(layer, place)
    given = {name: value for name, value in options.items() if not _is_default(value)}
    try:
        return TrainConfig(**given)
    except ValueError as error:
        raise ValueError(f"{_blamed(str(error), given, source)}{error}") from None


def _check_derived(path: str, stored: dict[str, Any], derived: Collection[str], typed: Collection[str]) -> None:
    """Raise ValueError for a file of a run that was changed by hand in what followed from the rest, or in what it
    followed from: one of the two would be lost without a word."""
    rest = {name: value for name, value in stored.items() if name not in derived and name != config_file.RECIPE}
    try:
        anew = TrainConfig(**{name: value for name, value in rest.items() if not _is_default(value)})
    except ValueError:
        return  # of another machine, or said again with the whole
    for name in derived:
        value, follows = stored.get(name), getattr(anew, name)
        if value is None or _is_default(value) or name in typed or value == follows:
            continue
        raise ValueError(
            f"--config {path}: {name} is {shown(value)}, but {shown(follows)} follows from the other options, as its "
            f"place in derived promises: take its name out of derived to keep it, or its line out to have it follow"
        )


def _recipe(name: str, args: argparse.Namespace) -> dict[str, Any]:
    try:
        return recipe(name)
    except ValueError as error:
        where = "" if args.recipe is not None else f"--config {args.config}: "
        raise ValueError(f"{where}{error}") from None


def _is_default(value: Any) -> bool:
    return isinstance(value, str) and value == config_file.DEFAULT


def _blamed(message: str, given: dict[str, Any], source: dict[str, str]) -> str:
    """``FILE (stages, batch_size): `` in front of a message about options that stand there; empty where they are all of
    the command line."""
    about = [one.name for one in fields(TrainConfig) if one.name in given and _says(message, one.name, given[one.name])]
    places = dict.fromkeys(source[name] for name in about if source[name])
    where = [f"{place} ({', '.join(name for name in about if source[name] == place)})" for place in places]
    return f"{', '.join(where)}: " if where else ""


def _says(message: str, name: str, value: Any) -> bool:
    """Whether a message is about an option: has its flag, or where it has none, name and value or a text's value."""
    flags = re.findall(r"--([a-z0-9-]+)", message)
    if flags:
        return name.replace("_", "-") in flags
    there = re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", message) is not None
    return there and (isinstance(value, str) or name.replace("_", " ") in message)
