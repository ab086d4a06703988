"""Tables and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Columns as wide as their widest cell; the first is flush left, the others flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * width for width in widths]
    if markdown:
        rule[1:] = [dashes[:-1] + ":" for dashes in rule[1:]]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def seconds(value: float | None) -> str:
    """``4.21 s``, ``3:05 min``; a dash for None."""
    if value is None:
        return NOTHING
    if value < 120:
        return f"{value:.3g} s" if value < 10 else f"{value:.1f} s"
    return f"{int(value) // 60}:{int(value) % 60:02d} min"


def size(value_bytes: float) -> str:
    """``1.50 MiB``, in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if value_bytes < 1024:
            return f"{value_bytes:.0f} B" if unit == "B" else f"{value_bytes:.4g} {unit}"
        value_bytes /= 1024
    return f"{value_bytes:.4g} GiB"


def share(value: float) -> str:
    """``97.1 %``."""
    return f"{100 * value:.1f} %"


def loss(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return NOTHING if value is None else f"{value:.3f}"
