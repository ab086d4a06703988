"""PipeDream (arXiv 1806.03377) and PipeDream-2BW (arXiv 2006.09503): PACI's order with kept weight versions.

PipeDream updates after every backward, and a backward uses the weights of its forward. 2BW updates once a window and
keeps two versions: all micro-batches of window ``k`` run at version ``k - 1``, forward and backward.
"""

from __future__ import annotations

from dataclasses import replace

from paci_rt.schedules.paci import ASYNC_1F1B, PACI

PIPEDREAM = replace(ASYNC_1F1B, name="pipedream", policies=("stash",))
PIPEDREAM_2BW = replace(PACI, name="pipedream-2bw", policies=("2bw",))
