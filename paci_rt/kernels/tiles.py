"""Tile shapes of the ``wgrad`` kernel."""

from __future__ import annotations

from dataclasses import dataclass

BIAS_COLUMNS = 32
"""Columns that one program sums for the bias' gradient: narrow, so that there are many programs."""

BIAS_WARPS = 4
BIAS_CONSTANTS = {"BIAS_ROWS": 128, "BIAS_COLUMNS": BIAS_COLUMNS}


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
        """Compile-time arguments of the kernel."""
        halves = 2 if self.into > 128 else 1
        return {"ROWS": self.rows, "OUT": self.out, "IN": self.into, "GROUP": 8, "HALVES": halves, **BIAS_CONSTANTS}


TILES = (
    Tile(out=128, into=128, rows=64, warps=8, stages=3),
    Tile(out=128, into=256, rows=64, warps=8, stages=3),
    Tile(out=64, into=128, rows=64, warps=4, stages=4),
)
"""What the measured choice picks from. Small weights want small tiles, so that there are enough programs."""
