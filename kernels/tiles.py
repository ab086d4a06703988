"""Tile shapes of the ``wgrad`` kernel."""

from __future__ import annotations

from dataclasses import dataclass

BIAS_COLUMNS = 32
"""Columns that one program sums for the bias' gradient: narrow, so that there are many programs."""

BIAS_WARPS = 8
BIAS_BLOCK_BYTES = 16 << 10
"""Of dY at a time. Five of these are on their way, which is as much shared memory as every target has."""


def bias_constants(itemsize: int) -> dict[str, int]:
    """Compile-time arguments of the bias' sums, for factors of ``itemsize`` bytes an element."""
    return {"BIAS_ROWS": BIAS_BLOCK_BYTES // (BIAS_COLUMNS * itemsize), "BIAS_COLUMNS": BIAS_COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One way to cut dW = dY^T X.

    Attributes:
        out: rows of dW (output features) a program.
        into: columns of dW (input features) a program.
        rows: rows of dY and X taken at a time.
        warps: warps a program.
        stages: tiles on their way from memory at a time.
    """

    out: int
    into: int
    rows: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """``out x into x rows``."""
        return f"{self.out}x{self.into}x{self.rows}"

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernel, for factors of 16 bits."""
        return {"ROWS": self.rows, "OUT": self.out, "IN": self.into, "GROUP": 8, **bias_constants(2)}


TILES = (
    Tile(out=128, into=128, rows=64, warps=8, stages=3),
    Tile(out=128, into=256, rows=64, warps=8, stages=3),
    Tile(out=64, into=128, rows=64, warps=4, stages=4),
)
"""What the measured choice picks from. Small weights want small tiles, so that there are enough programs."""
