"""A training configuration as a TOML file: one key per option of ``TrainConfig``, no tables.

    model = "gpt2-medium"
    stages = 8
    partition = [3, 3, 3, 3, 3, 3, 3, 3]

``"default"`` as a value takes back what a recipe says. A file that a run saved has all values, and in ``derived`` the
names of those that followed from the others: they are found anew once the command line changes anything.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from paci_rt import schedules
from paci_rt.files import replacing
from paci_rt.train.config import TrainConfig
from paci_rt.wording import did_you_mean, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "config.toml"
"""Of the file that a run saves in ``--out``."""
DEFAULT = "default"
"""The value, in a file and on the command line, of an option that is as if it had not been given."""
RECIPE, DERIVED = "recipe", "derived"
"""Keys of a file that are no options."""
NOT_HERE = frozenset({"trace"})
"""Options of ``TrainConfig`` that follow from others of the command line."""
COMMAND_LINE_ONLY = frozenset({"config", "json", "save_trace", "help", "trace"})
MOST_BYTES = 1 << 20
_EXAMPLES = {
    "str": ("a string", '"text"'),
    "int": ("an integer", "8"),
    "float": ("a finite number", "0.1"),
    "bool": ("true or false", "true"),
    "tuple[int, ...]": ("a list of integers", "[4, 4]"),
    "slack": ("an integer, a list of them or auto", '2 or [3, 2, 1, 0] or "auto"'),
    "schedules.StepCosts": ("a string of times", '"10,10,5"'),
}
_KINDS = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "a table"}


def names() -> list[str]:
    """The options that a file may have."""
    return [one.name for one in fields(TrainConfig) if one.name not in NOT_HERE]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options of ``TrainConfig`` by name, as the file has them; with ``recipe`` and ``derived`` where it has those.

    Raises:
        ValueError: no such file, one that is no TOML, an option that there is not, or a value of another type.
    """
    text = _text(path)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one; so is an integer of too many digits
        raise ValueError(_not_toml(path, text, error)) from None
    known = names()
    return {name: _value(path, name, value, known) for name, value in table.items()}


def _text(path: str | os.PathLike[str]) -> str:
    file = Path(path)
    try:
        if file.is_dir():
            raise ValueError(f"--config {path} is a folder: name a file, such as {file / NAME}")
        if not file.is_file():
            what = "is no plain file" if file.exists() else "does not exist"
            raise ValueError(f"--config {path} {what}: give a TOML file with options such as steps = 200")
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"--config {path} has {size:,} bytes, too many for options: give a TOML file")
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror}): give a file that you may read") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _not_toml(path: str | os.PathLike[str], text: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or "it nests too deeply"
    found = re.search(r"\(at line (\d+)", said)
    lines = text.splitlines()
    line = ""
    if "(at end of document)" in said and lines:
        line = lines[-1].strip()
    elif found is not None and int(found[1]) <= len(lines):
        line = lines[int(found[1]) - 1].strip()
    key = re.match(r"([A-Za-z0-9_-]+)\s*=", line)
    if "overwrite" in said.lower() and key is not None:
        name, again = shown(key[1])[1:-1], shown(line)
        return f"--config {path}: {name} stands there twice, the second time as {again}: leave one of them"
    where = f", in {shown(line)}" if line else ""
    return f'--config {path} is not TOML: {said}{where}; write name = value, with texts as "text"'


def _value(path: str | os.PathLike[str], name: str, value: Any, known: list[str]) -> Any:
    """The value that ``TrainConfig`` takes for what the file has."""
    at = f"--config {path}: {shown(name)[1:-1]}"
    if isinstance(value, dict):
        keys = ", ".join(shown(key)[1:-1] for key in list(value)[:4]) or "nothing"
        raise ValueError(f"{at} is a table with {keys}: tables mean nothing here, write all options at the top level")
    if name == RECIPE:
        kind = "str"
    elif name == DERIVED:
        fine = isinstance(value, list) and all(one in known for one in value)
        if not fine:
            raise ValueError(f"{at} is {shown(value)}: leave it as the run saved it, or leave it out")
        return value
    elif name in COMMAND_LINE_ONLY:
        flag = "--save-trace" if name == "trace" else "--" + name.replace("_", "-")
        raise ValueError(f"{at} is for the command line alone: leave it out of the file, and give {flag}")
    elif name not in known:
        hint = did_you_mean(name[:40], known)
        raise ValueError(f"{at} = {shown(value)} is no option: {hint}see paci-rt train --help")
    else:
        kind = _kind(name)
    if value == DEFAULT:
        return value
    taken = _taken(name, kind, value)
    if taken is None:
        what, example = _EXAMPLES[kind]
        is_a = _KINDS.get(type(value), f"a {type(value).__name__}")
        said = str(value).lower() if isinstance(value, bool) else shown(value)
        raise ValueError(f"{at} is {said}, {is_a}: write {what}, such as {name} = {example}")
    return taken


def _kind(name: str) -> str:
    if name == "slack":
        return name
    kind = next(str(one.type) for one in fields(TrainConfig) if one.name == name)
    return kind.removesuffix(" | None")


def _taken(name: str, kind: str, value: Any) -> Any:
    """``value`` as ``TrainConfig`` has it; None where it is of another type."""
    if kind in ("str", "bool", "int"):
        return value if type(value).__name__ == kind else None
    if kind == "float":
        return float(value) if type(value) in (int, float) and abs(value) < 1e308 else None
    if kind == "slack" and (type(value) is int or value == schedules.AUTO):
        return value
    if kind in ("slack", "tuple[int, ...]"):
        fine = isinstance(value, list) and value and all(type(one) is int for one in value)
        return tuple(value) if fine else None
    assert kind == "schedules.StepCosts", name
    try:
        return schedules.StepCosts.parse(value) if isinstance(value, str) else None
    except ValueError:
        return None


def text_of(config: TrainConfig, head: str = "") -> str:
    """The file of a configuration; :func:`read` gives the same one.

    Args:
        head: a comment for its first lines.

    Raises:
        ValueError: a path in it is no Unicode text.
    """
    lines = [f"# {line}" for line in head.splitlines()]
    for one in fields(config):
        value = getattr(config, one.name)
        if value is not None and one.name not in NOT_HERE:
            lines.append(f"{one.name} = {_toml(one.name, value)}")
    if config.derived:
        lines += ["", "# These follow from the others, and are found anew where the command line changes any option."]
        lines.append(f"{DERIVED} = {_toml(DERIVED, list(config.derived))}")
    return "\n".join(lines) + "\n"


def _toml(name: str, value: Any) -> str:
    if isinstance(value, schedules.StepCosts):
        value = value.text(17)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(name, one) for one in value) + "]"
    text = os.fspath(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag} {shown(text)} is no Unicode text, which {NAME} in --out needs: rename it") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def save(config: TrainConfig, folder: str | os.PathLike[str]) -> Path:
    """Write ``config.toml`` into ``folder``, whole or not at all; returns its path.

    Raises:
        OSError: the system refuses; a file that was there is as before.
    """
    path = Path(folder, NAME)
    use = "Options of a run, resolved. The same again: paci-rt train --config FILE"
    with replacing(path) as stream:
        stream.write(text_of(config, use).encode())
    return path
