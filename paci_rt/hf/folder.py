"""A folder of transformers that goes from one whole model to the next in one step.

New tensors are written under names that nothing names yet. What makes them the model is one rename: of the index, or of
the only file. A crash before it leaves the old model, a crash after it the new one. Where the configuration changes
too, ``config.json`` goes first and comes last, so that between them there is no model and transformers says so.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from paci_rt.files import reason, replacing, sync_folder
from paci_rt.hf.load import CONFIG, INDEX, WHOLE

_SHARD = re.compile(r"model-\d{5}-of-\d{5}(-[0-9a-f]{8})?\.safetensors")
_CUT_OFF = re.compile(r"\.(model[-.].*|adapter_model-.*|config-.*)\.part")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], name: str | None, kind: str = "model") -> str:
    """Write a file of tensors that no index names yet; returns what it is called.

    Args:
        name: what it shall be called, if nothing is. None leaves it to :func:`switch`.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    from safetensors.torch import save_file

    part = folder / f".{kind}-{secrets.token_hex(8)}.part"
    try:
        try:
            save_file(dict(tensors), part, metadata={"format": "pt"})
        except OSError:
            raise
        except Exception as error:  # the library's own kind, for what the system refuses
            raise OSError(str(error).splitlines()[0]) from error
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        if name is None:
            return part.name
        if (folder / name).exists():
            name = f"{name.removesuffix('.safetensors')}-{secrets.token_hex(4)}.safetensors"
        os.rename(part, folder / name)
    except BaseException:
        remove(folder, [part.name])
        raise
    sync_folder(folder)
    return name


def switch(
    folder: Path,
    files: Mapping[str, tuple[list[str], int]],
    configs: Iterable[Any],
    *,
    whole: str = WHOLE,
    config_file: str = CONFIG,
) -> None:
    """Make files that :func:`write_tensors` wrote the model of a folder, and remove those of the one before.

    Args:
        files: for each the tensors in it, and their bytes. One is the whole model.
        configs: what has a ``save_pretrained`` of its own: the configuration first.
        whole, config_file: names of the only file of a model, and of its configuration.

    Raises:
        OSError: the system refuses; the folder has the old model, or no ``config.json``.
    """
    before = _named(folder) if whole == WHOLE else set()
    with tempfile.TemporaryDirectory(prefix=".config-", suffix=".part", dir=folder) as place:
        for one in configs:
            one.save_pretrained(place)
        own = sorted(Path(place).iterdir(), key=lambda path: path.name == config_file)
        changes = _content(folder / config_file) != _content(Path(place, config_file))
        if changes:
            (folder / config_file).unlink(missing_ok=True)
        mode = 0o666 & ~_umask()
        for path in own[:-1]:
            path.chmod(mode)
            os.replace(path, folder / path.name)
        if len(files) == 1:
            (name,) = files
            (folder / name).chmod(mode)
            os.replace(folder / name, folder / whole)
            kept = {whole}
            if whole == WHOLE:
                (folder / INDEX).unlink(missing_ok=True)
        else:
            _write_index(folder, files)
            (folder / WHOLE).unlink(missing_ok=True)  # which transformers would prefer
            kept = set(files)
        sync_folder(folder)
        own[-1].chmod(mode)
        os.replace(own[-1], folder / config_file)
    sync_folder(folder)
    for name in (*before, *os.listdir(folder)):
        stale = name in before or _CUT_OFF.fullmatch(name) or (whole == WHOLE and _SHARD.fullmatch(name))
        if stale and name not in kept:
            remove(folder, [name])


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, as far as the system allows."""
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()


def unwritten(folder: Path, error: OSError) -> str:
    """What to say where the system refuses."""
    return f"cannot write the model to {folder}: {reason(error)}; the one that was there is intact"


def _write_index(folder: Path, files: Mapping[str, tuple[list[str], int]]) -> None:
    index = {
        "metadata": {"total_size": sum(size for _, size in files.values())},
        "weight_map": {name: file for file, (names, _) in files.items() for name in names},
    }
    with replacing(folder / INDEX) as stream:
        stream.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def _named(folder: Path) -> set[str]:
    """Files in this folder that its index names."""
    try:
        found = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return {name for name in found if name == Path(name).name and name.endswith(".safetensors")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _content(path: Path) -> Any:
    """A configuration, without the version of the library that wrote it; None where there is none."""
    try:
        found = json.loads(path.read_text())
        found.pop("transformers_version", None)
        return found
    except (OSError, ValueError, AttributeError):
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
