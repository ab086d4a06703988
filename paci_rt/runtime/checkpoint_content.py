"""What a part of a checkpoint must hold: every level of it is looked at before anybody uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from paci_rt.errors import CheckpointError
from paci_rt.runtime.checkpoint_index import KINDS


class ContentChecker:
    """Looks at the content of one file.

    Args:
        path: for messages.
        entry: what the index says of it.
        version: of the checkpoint's format.
    """

    def __init__(self, path: object, entry: Mapping[str, Any], version: int) -> None:
        self._path, self._entry, self._version = path, entry, version

    def check(self, content: Any) -> dict[str, Any]:
        """``content`` itself, once all of it is what it must be.

        Raises:
            CheckpointError: it is not.
        """
        if not isinstance(content, dict):
            self._wrong("content", content, "a dict")
        for kind in KINDS if self._version > 1 else KINDS[:1]:
            self._named(kind, content.get(kind))
        self._dict("optimizer", content.get("optimizer"))
        for name, state in content["optimizer"].items():
            if name not in content["params"]:
                self._wrong("optimizer", name, "the name of one of its parameters")
            if not isinstance(state, dict):
                self._wrong(f"optimizer[{name!r}]", state, "a dict")
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self._tensor(f"optimizer[{name!r}][{key!r}]", value)
        if self._version > 1:
            self._records(content.get("optimizers"))
            self._places(content)
        elif content.get("lr_scheduler") is not None:
            self._dict("lr_scheduler", content["lr_scheduler"])
        if self._entry.get("generators") is not None and not isinstance(content.get("generators"), dict):
            self._wrong("generators", content.get("generators"), "a dict")
        return content

    def _places(self, content: dict[str, Any]) -> None:
        """Each parameter is in one group, and none that has state is in no group."""
        places = [name for record in content["optimizers"] for group in record["groups"] for name in group["params"]]
        twice = sorted(name for name, count in Counter(places).items() if count > 1)
        if twice:
            self._wrong("optimizers", twice[0], "in one parameter group")
        lost = sorted({name for name, state in content["optimizer"].items() if state} - set(places))
        if lost:
            self._wrong("optimizers", lost[0], "in any parameter group")

    def _named(self, kind: str, values: Any) -> None:
        self._dict(kind, values)
        if values.keys() != set(self._entry[kind]):
            odd = sorted(values.keys() ^ set(self._entry[kind]))
            raise CheckpointError(
                f"{self._path} is not the file that the index means: {kind} {odd[0]!r} is in one only"
            )
        if kind != "extra_state":
            for name, value in values.items():
                self._tensor(f"{kind}[{name!r}]", value)

    def _records(self, records: Any) -> None:
        if not isinstance(records, list):
            self._wrong("optimizers", records, "a list")
        for at, record in enumerate(records):
            where = f"optimizers[{at}]"
            self._dict(where, record)
            if type(record.get("stage")) is not int:
                self._wrong(f"{where}.stage", record.get("stage"), "an integer")
            if not isinstance(record.get("optimizer"), str):
                self._wrong(f"{where}.optimizer", record.get("optimizer"), "a name")
            if not isinstance(record.get("other_state"), dict):
                self._wrong(f"{where}.other_state", record.get("other_state"), "a dict")
            if not isinstance(record.get("groups"), list):
                self._wrong(f"{where}.groups", record.get("groups"), "a list")
            for number, group in enumerate(record["groups"]):
                self._group(f"{where}.groups[{number}]", group)
            scheduler = record.get("lr_scheduler", "nothing")
            if scheduler is not None:
                self._dict(f"{where}.lr_scheduler", scheduler)
                if not isinstance(scheduler.get("class"), str):
                    self._wrong(f"{where}.lr_scheduler.class", scheduler.get("class"), "a name")
                if not isinstance(scheduler.get("state"), dict):
                    self._wrong(f"{where}.lr_scheduler.state", scheduler.get("state"), "a dict")

    def _group(self, where: str, group: Any) -> None:
        self._dict(where, group)
        names = group.get("params")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._wrong(f"{where}.params", names, "a list of names")
        self._dict(f"{where}.options", group.get("options"))

    def _dict(self, where: str, value: Any) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self._wrong(where, value, "a dict by name")

    def _tensor(self, where: str, value: Any) -> None:
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized:
            self._wrong(where, value, "a plain tensor")

    def _wrong(self, where: str, value: Any, wanted: str) -> NoReturn:
        said = f"{value!r:.40}" if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
        raise CheckpointError(f"{self._path} is damaged: {where} is {' '.join(said.split())}, not {wanted}")
