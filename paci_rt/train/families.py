"""The families of models that the trainer has, every named model, and how options change a model's shape."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from paci_rt.schedules import limits
from paci_rt.train import encoder, gpt, llama
from paci_rt.train.model import ModelShape
from paci_rt.train.option_checks import check_switch
from paci_rt.wording import shown, unknown

FAMILIES: dict[str, Mapping[str, ModelShape]] = {"gpt2": gpt.MODELS, "llama": llama.MODELS, "encoder": encoder.MODELS}
"""Models by family; the first is the family's default."""
MODELS: Mapping[str, ModelShape] = ChainMap(encoder.MODELS, llama.MODELS, gpt.MODELS)  # type: ignore[arg-type]
"""All models, by name; a chain of maps runs from its end, so those of GPT-2 come first."""
MOST = {
    "layers": 4096,
    "heads": 4096,
    "kv_heads": 4096,
    "width": 1 << 20,
    "ffn_width": 1 << 22,
    "vocab_size": 1 << 24,
    "context": 1 << 24,
}
"""Options that are integers of a shape, and the largest of each."""
SHAPE_OPTIONS = (*MOST, "rope_base", "tied")
"""Options that change a named model; None leaves what it has."""


def model_of(family: str | None, model: str | None) -> str:
    """The model that a family and a model name stand for, of which either may be left out.

    Raises:
        ValueError: there is no such family or model, or one is not of the other.
    """
    for flag, value in (("--family", family), ("--model", model)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{flag} is {shown(value)}: give a name")
    if family is not None and family not in FAMILIES:
        raise unknown("--family", family, FAMILIES)
    if model is None:
        return next(iter(FAMILIES[family or "gpt2"]))
    if model not in MODELS:
        raise unknown("--model", model, MODELS)
    if family is not None and model not in FAMILIES[family]:
        raise ValueError(
            f"--model {model} is of the family {MODELS[model].family}, not --family {family}: leave one of them out, "
            f"or choose from {', '.join(FAMILIES[family])}"
        )
    return model


def shape_of(model: str, options: Mapping[str, Any]) -> ModelShape:
    """A named model's shape, changed by options of :data:`SHAPE_OPTIONS`; those that are None change nothing.

    Heads of keys and the MLP's width keep their proportion to the heads and the width, unless they are given too.

    Raises:
        ValueError: a model of this family has no such option, or the shape is impossible.
    """
    base = MODELS[model]
    given: dict[str, Any] = {name: options[name] for name in SHAPE_OPTIONS if options.get(name) is not None}
    if not given:
        return base
    has = {one.name for one in fields(base)}
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if name not in has:
            with_it = [family for family, models in FAMILIES.items() if hasattr(next(iter(models.values())), name)]
            raise ValueError(
                f"{flag} is {shown(value)}, and models of the family {base.family} have none: leave it out, or choose "
                f"--family {' or '.join(with_it)}"
            )
        if name in MOST:
            limits.check_integer(flag, value, 1, MOST[name])
        elif name == "tied":
            check_switch(flag, value)
        elif name == "rope_base" and not (limits.is_number(value, 1e12) and value >= 1):
            raise ValueError(f"{flag} is {shown(value)}: give a number of at least 1 and at most 1e12")
    label = f"{model} with {', '.join(f'{name}={value}' for name, value in given.items())}"
    try:
        return replace(base, **{"name": label, **_in_proportion(base, given), **given})
    except ValueError as error:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{error}; change {flags}") from None


def _in_proportion(base: ModelShape, given: Mapping[str, Any]) -> dict[str, int]:
    """What follows from the given options, of those that are not given."""
    found = {}
    if "width" in given and "ffn_width" not in given and hasattr(base, "ffn_width"):
        found["ffn_width"] = max(1, base.ffn_width * given["width"] // base.width)
    if "heads" in given and "kv_heads" not in given and hasattr(base, "kv_heads"):
        found["kv_heads"] = max(1, given["heads"] * base.kv_heads // base.heads)
    return found


def difference(one: ModelShape, other: ModelShape) -> str | None:
    """The first option of a shape in which two differ, the names aside; None where they are one model."""
    if one.family != other.family:
        return "family"
    names = [field.name for field in fields(one) if field.name != "name"]
    return next((name for name in names if getattr(one, name) != getattr(other, name)), None)
