"""Takes values out of decoded JSON, and says by key what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paci_rt.schedules import limits
from paci_rt.wording import shown


class JsonReader:
    """Takes values out of one JSON object and complains by key."""

    def __init__(self, data: Any, where: str) -> None:
        self.data, self.where = data, where
        if not isinstance(data, dict):
            raise ValueError(f"{where or 'the file'} is {shown(data, 40)}: give a JSON object")

    def get(self, key: str, wanted: str, accepts: Callable[[Any], Any]) -> Any:
        name = f"{self.where}.{key}" if self.where else key
        if key not in self.data:
            raise ValueError(f"{name} is missing: give {wanted}")
        value = self.data[key]
        if not accepts(value):
            raise ValueError(f"{name} is {shown(value, 40)}: give {wanted}")
        return value

    def check_header(self, words: str, version: int, *, wrote: str, again: str) -> None:
        """Refuse a file that is none of ours.

        Args:
            words: what ``format`` must be. version: what ``version`` must be.
            wrote: the command that writes such files. again: what to do about an old one.

        Raises:
            ValueError: the message names the key and what was found there.
        """
        if self.get("format", f"the words {words!r}", lambda value: isinstance(value, str)) != words:
            raise ValueError(f"format is {shown(self.data['format'], 40)}: give a file that {wrote} wrote")
        if self.get("version", "a number", is_number) != version:
            raise ValueError(
                f"version is {shown(self.data['version'], 40)}, and this program reads version {version}: {again}"
            )

    def objects(self, key: str, each: str, most: int) -> list[JsonReader]:
        """Readers of the objects in the list at ``key``, at least one and at most ``most``; ``each`` says of what.

        Raises:
            ValueError: there is no such list, or something else is in it.
        """
        wanted = f"a list with one entry per {each}"
        found = self.get(key, wanted, lambda value: isinstance(value, list) and value)
        if len(found) > most:
            raise ValueError(f"{key} has {len(found):,} entries: give at most {most:,}")
        return [JsonReader(one, f"{key}[{at}]") for at, one in enumerate(found)]

    def number(self, key: str, *, whole: bool = False) -> Any:
        kind = "a whole number" if whole else "a number"
        most = limits.MOST_SECONDS if key.endswith("_s") else limits.MOST_BYTES
        if key == "state_bytes_per_parameter_byte":
            most = limits.MOST_SECONDS
        wanted = f"{kind} of at least 0 and at most {most:g}"
        value = self.get(key, wanted, lambda value: is_number(value) and 0 <= value <= most)
        if whole and value != int(value):
            raise ValueError(f"{self.where + '.' if self.where else ''}{key} is {value}: give {kind}")
        return int(value) if whole else float(value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
