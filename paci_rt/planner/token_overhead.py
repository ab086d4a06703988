"""How many times the tokens of 1F1B-flush a schedule needs for the same loss: ``f``, as measured, and where it is not.

What late gradients cost is measured by final loss (``paci_rt.planner.iso_loss``) and kept as a table::

    {
      "format": "paci-rt token overhead", "version": 1, "source": "...",
      "rows": [
        {"optimizer": "adamw", "policy": "bounded", "lookahead": true, "delay": 1, "share": 0.4375,
         "f": 1.02, "f_low": 0.99, "f_high": 1.05,                       # null where no run got to flush's loss
         "at": "best", "rate": 0.002, "seeds": 5, "stages": 8, "accumulation": 8, "model": "...", "updates": 200,
         "why": "", "source": "..."},
        ...
      ]
    }

``delay`` is the largest of any forward, in updates, and ``share`` that of forwards that run an update early; one that
is two updates early counts twice, so it is the mean delay too. It is the mean over the stages, of which one with ``w``
forwards ahead has ``w / a``. Schedule, number of stages and placement decide these two, so they are in no row's key.

A row is near where optimizer, policy, look-ahead and delay are the same and the share lies between those of two rows,
or within NEAR of one. A share of 0 needs no row: there flush itself runs, and ``f`` is 1.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from paci_rt.planner.json_reader import JsonReader, is_number
from paci_rt.schedules.policies import POLICIES
from paci_rt.wording import shown

FORMAT, VERSION = "paci-rt token overhead", 1
PACKAGED = Path(__file__).with_suffix(".json")
NEAR = 0.1
"""Shares that differ by no more are near each other."""
MOST_BYTES, MOST_ROWS, MOST_F = 1 << 24, 1 << 14, 1e6
_SAME = 1e-6
_WORDS, _COUNTS = ("at", "model", "why", "source"), ("seeds", "stages", "accumulation", "updates")


@dataclass(frozen=True, kw_only=True)
class OverheadRow:
    """One measured ``f``.

    Attributes:
        optimizer, policy, lookahead, delay, share: of what it was measured; see the top of this file.
        f, f_low, f_high: tokens over those of flush, and its 95 % interval; None where no run got to flush's loss, or
            where the interval has no end.
        at: ``best`` for the method's best learning rate, ``half`` for half of it; empty where it is unknown.
        rate, seeds, stages, accumulation, model, updates, why, source: how it was measured; ``why`` there is no number.

    Example:
        >>> from paci_rt.planner import OverheadRow
        >>> row = OverheadRow(
        ...     optimizer="adamw", lookahead=True, delay=1, share=0.4375, f=1.02, f_low=0.99, f_high=1.05
        ... )
        >>> row.policy
        'bounded'
    """

    optimizer: str
    lookahead: bool
    delay: int
    share: float
    f: float | None
    f_low: float | None = None
    f_high: float | None = None
    policy: str = "bounded"
    at: str = ""
    rate: float | None = None
    seeds: int | None = None
    stages: int | None = None
    accumulation: int | None = None
    model: str = ""
    updates: int | None = None
    why: str = ""
    source: str = ""

    @property
    def kind(self) -> tuple[str, str, bool, int]:
        """All but the share, of what it was measured."""
        return self.optimizer, self.policy, self.lookahead, self.delay


@dataclass(frozen=True, kw_only=True)
class TokenOverhead:
    """What the table says about a schedule.

    Attributes:
        f, low, high: tokens over those of flush and the interval; None where nothing is known, or no run got there.
        known: whether there is a row near, or no forward is early.
        basis: the rows, in words, or why there is none.

    Example:
        >>> from paci_rt.planner import TokenOverhead
        >>> TokenOverhead(f=1.25).factor, TokenOverhead(f=0.98).factor
        (1.25, 1.0)
    """

    f: float | None
    low: float | None = None
    high: float | None = None
    known: bool = True
    basis: str = ""

    @property
    def factor(self) -> float:
        """By which throughput is divided: no delay is taken for a gain, and what is unknown is not guessed at."""
        return 1.0 if self.f is None else max(1.0, self.f)


NONE = TokenOverhead(f=1.0, low=1.0, high=1.0, basis="no forward runs early")


@dataclass(frozen=True, kw_only=True)
class OverheadTable:
    """Measured rows, of the package and of the user.

    Attributes:
        rows: those that count. source: where they come from.

    Example:
        >>> from paci_rt.planner import OverheadRow, OverheadTable
        >>> row = OverheadRow(optimizer="adamw", lookahead=True, delay=1, share=0.4, f=1.21, f_low=1.1, f_high=1.3)
        >>> table = OverheadTable(rows=(row,))
        >>> round(table.of(optimizer="adamw", policy="bounded", lookahead=True, delay=1, share=0.2).f, 3)
        1.1
        >>> table.of(optimizer="lion", policy="bounded", lookahead=True, delay=1, share=0.2).known
        False
    """

    rows: tuple[OverheadRow, ...]
    source: str = ""

    def of(self, *, optimizer: str, policy: str, lookahead: bool, delay: int, share: float) -> TokenOverhead:
        """``f`` of a schedule: of the rows at its share, or on a straight line in log f between those beside it.

        Rows of equal share count alike (the geometric mean of their f), and the interval holds all of theirs.
        """
        if delay == 0:
            return NONE
        what = f"{optimizer}, policy {policy}, {'look-ahead' if lookahead else 'no look-ahead'}, delay {delay}"
        mine = [row for row in self.rows if row.kind == (optimizer, policy, lookahead, delay)]
        if not mine:
            return TokenOverhead(f=None, known=False, basis=f"nothing was measured for {what}")
        points = [_Point.of([row for row in mine if abs(row.share - at) < _SAME]) for at in _shares(mine)]
        if delay == 1:
            points.insert(0, _Point(0.0, 1.0, 1.0, 1.0, ()))
        found = _between(points, share)
        if found is None:
            near = min(points, key=lambda point: abs(point.share - share))
            why = f"nothing was measured near a share of {share:.2f} for {what}: the nearest is {near.share:.2f}"
            return TokenOverhead(f=None, known=False, basis=why)
        return found

    def overridden_by(self, own: OverheadTable) -> OverheadTable:
        """``own``, and of these rows those of kinds that it does not have."""
        kinds = {row.kind for row in own.rows}
        kept = tuple(row for row in self.rows if row.kind not in kinds)
        return OverheadTable(rows=own.rows + kept, source=own.source)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values, without what is not known of a row."""
        rows = []
        for row in self.rows:
            values = asdict(row)
            rows.append(
                {key: value for key, value in values.items() if key in ("f", *_BOUNDS) or value not in (None, "")}
            )
        return {"format": FORMAT, "version": VERSION, "source": self.source, "rows": rows}


_BOUNDS = ("f_low", "f_high")


@dataclass(frozen=True)
class _Point:
    """Rows of one share, put together."""

    share: float
    f: float | None
    low: float | None
    high: float | None
    rows: tuple[OverheadRow, ...]

    @classmethod
    def of(cls, rows: Sequence[OverheadRow]) -> _Point:
        values = [row.f for row in rows if row.f is not None]
        if len(values) < len(rows):
            return cls(rows[0].share, None, None, None, tuple(rows))
        f = math.exp(sum(map(math.log, values)) / len(values))
        low, high = [row.f_low for row in rows], [row.f_high for row in rows]
        return cls(
            rows[0].share,
            f,
            None if None in low else min(one for one in low if one is not None),
            None if None in high else max(one for one in high if one is not None),
            tuple(rows),
        )

    @property
    def words(self) -> str:
        if not self.rows:
            return "none early"
        first = self.rows[0]
        parts = [f"share {self.share:.2f}"]
        parts += [f"P={first.stages} a={first.accumulation}"] if first.stages and first.accumulation else []
        parts += [first.model] if first.model else []
        return " ".join(parts)


def _shares(rows: Sequence[OverheadRow]) -> list[float]:
    found: list[float] = []
    for share in sorted(row.share for row in rows):
        if not found or share - found[-1] >= _SAME:
            found.append(share)
    return found


def _between(points: Sequence[_Point], share: float) -> TokenOverhead | None:
    for point in points:
        if abs(point.share - share) < _SAME:
            return _told([point], [1.0], share)
    for before, after in itertools.pairwise(points):
        if before.share < share < after.share:
            weight = (share - before.share) / (after.share - before.share)
            return _told([before, after], [1 - weight, weight], share)
    nearest = min(points, key=lambda point: abs(point.share - share))
    if not nearest.rows or abs(nearest.share - share) > NEAR:
        return None
    return _told([nearest], [share / nearest.share], share)  # log f in proportion to the share


def _told(points: Sequence[_Point], weights: Sequence[float], share: float) -> TokenOverhead:
    basis = "measured at " + " and ".join(point.words for point in points)
    if len(points) > 1 or abs(points[0].share - share) >= _SAME:
        basis += f", read at share {share:.2f}"

    def mixed(values: Sequence[float | None]) -> float | None:
        if None in values:
            return None
        terms = zip(values, weights, strict=True)
        return math.exp(sum(weight * math.log(value) for value, weight in terms if value is not None))

    lost = [row for point in points if point.f is None for row in point.rows if row.f is None]
    if lost:
        basis += f": {lost[0].why or 'no run got to the loss of flush'}"
    f, low, high = (mixed([getattr(point, name) for point in points]) for name in ("f", "low", "high"))
    return TokenOverhead(f=f, low=low, high=high, basis=basis)


# ---------------------------------------------------------------------------------------------------------------- files


@cache
def packaged() -> OverheadTable:
    """The table that comes with paci_rt."""
    return load_overheads(PACKAGED)


def load_overheads(path: str | Path) -> OverheadTable:
    """Read a table from its file.

    Args:
        path: of a file that ``paci-rt calibrate`` wrote.

    Raises:
        ValueError: the file cannot be read or is no such table; one line that names the file, the key and what was
            found.

    Example:
        >>> from paci_rt.planner import load_overheads
        >>> load_overheads("none.json")
        Traceback (most recent call last):
        ValueError: token overhead none.json cannot be read (No such file or directory): name one of paci-rt calibrate
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        if file.exists() and file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"token overhead {path} cannot be read ({error.strerror}): name one of paci-rt calibrate"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"token overhead {path} is not JSON ({str(error)[:200]}): name a file of paci-rt calibrate"
        ) from None
    try:
        return parse_overheads(data)
    except ValueError as error:
        raise ValueError(f"token overhead {path}: {error}") from None


def parse_overheads(data: Any) -> OverheadTable:
    """The table that a decoded file holds.

    Raises:
        ValueError: the message names the key and what was found there.

    Example:
        >>> from paci_rt.planner import parse_overheads
        >>> parse_overheads({"format": "paci-rt token overhead", "version": 1})
        Traceback (most recent call last):
        ValueError: rows is missing: give a list with one entry per measurement
    """
    reader = JsonReader(data, "")
    reader.check_header(FORMAT, VERSION, wrote="paci-rt calibrate", again="calibrate again")
    rows = reader.objects("rows", "measurement", MOST_ROWS)
    source = data.get("source", "")
    if not isinstance(source, str):
        raise ValueError(f"source is {shown(source, 40)}: give words")
    return OverheadTable(rows=tuple(map(_parse_row, rows)), source=source)


def _parse_row(reader: JsonReader) -> OverheadRow:
    known = {one.name for one in fields(OverheadRow)}
    unknown = sorted(set(reader.data) - known, key=str)
    if unknown:
        raise ValueError(
            f"{reader.where} has {shown(unknown[0], 40)}, which is unknown: a row has {', '.join(sorted(known))}"
        )

    def factor(key: str, least: float) -> Any:
        wanted = f"a number from {least:g} to {MOST_F:g}, or null where there is none"
        return reader.get(key, wanted, lambda value: value is None or (is_number(value) and least <= value <= MOST_F))

    def count(key: str, least: int) -> Any:
        wanted = f"a whole number of at least {least}"
        return reader.get(key, wanted, lambda value: type(value) is int and least <= value <= 1 << 53)

    values: dict[str, Any] = {
        "optimizer": reader.get("optimizer", "a name such as adamw", lambda value: isinstance(value, str) and value),
        "policy": reader.get("policy", "one of " + ", ".join(POLICIES), lambda value: value in POLICIES),
        "lookahead": reader.get("lookahead", "true or false", lambda value: isinstance(value, bool)),
        "delay": count("delay", 1),
        "share": reader.get("share", "a number above 0", lambda value: is_number(value) and 0 < value <= MOST_F),
        **{key: factor(key, 1 / MOST_F) for key in ("f", *_BOUNDS)},
    }
    for key in set(_COUNTS) & set(reader.data):
        values[key] = count(key, 1)
    for key in set(_WORDS) & set(reader.data):
        values[key] = reader.get(key, "words", lambda value: isinstance(value, str))
    if "rate" in reader.data:
        values["rate"] = reader.get("rate", "a number above 0", lambda value: is_number(value) and value > 0)
    return _consistent(OverheadRow(**values), reader.where)


def _consistent(row: OverheadRow, where: str) -> OverheadRow:
    """``row``, whose interval holds its f and whose share can be.

    Raises:
        ValueError: it cannot be so.
    """
    if row.share > row.delay:
        raise ValueError(f"{where}.share is {row.share:g}: a mean delay is at most delay, {row.delay}")
    for name, value, wrong in (
        ("f_low", row.f_low, row.f is None or (row.f_low or 0) > row.f),
        ("f_high", row.f_high, row.f is None or (row.f_high or MOST_F) < row.f),
    ):
        if value is not None and wrong:
            side = "at most" if name == "f_low" else "at least"
            f = "null" if row.f is None else f"{row.f:g}"
            raise ValueError(f"{where}.{name} is {value:g}, and f is {f}: the interval holds f, so give {side} that")
    return row
