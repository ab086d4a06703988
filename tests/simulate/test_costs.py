"""Costs that cannot be, and what does not fit together."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from support.simulated import UNIT, run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forward_s": (-1.0,)}, "forward_s is -1.0: give a finite number of at least 0"),
        ({"forward_s": (1.0, math.nan)}, "forward_s of stage 1 is nan"),
        ({"weight_grad_s": (math.inf,)}, "weight_grad_s is inf"),
        ({"input_grad_s": ()}, "input_grad_s is (): give a tuple"),
        ({"input_grad_s": 3.0}, "input_grad_s is 3.0: give a tuple"),
        ({"update_s": ("1",)}, "update_s is '1'"),
        ({"hop_s": -0.5}, "hop_s is -0.5"),
        ({"hop_s": math.inf}, "hop_s is inf"),
        ({"bandwidth_bytes_per_s": 0.0}, "bandwidth_bytes_per_s is 0.0: give a number above 0"),
        ({"noise": math.nan}, "noise is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_costs_are_named(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(UNIT, **options)


def test_what_does_not_fit_together_is_named():
    for field in ("forward_s", "weight_bytes"):
        with pytest.raises(ValueError, match=f"{field} has 3 values for 4 stages"):
            run("1f1b", 4, 4, replace(UNIT, **{field: (1.0, 1.0, 1.0)}))
    with pytest.raises(ValueError, match="windows is 0"):
        run("1f1b", 4, 4, windows=0)
    with pytest.raises(ValueError, match="slack is 1: 1f1b takes no slack"):
        run("1f1b", 4, 4, slack=1)
    with pytest.raises(ValueError, match="chunks is 2: zb-h1 takes no chunks"):
        run("zb-h1", 4, 4, chunks=2)
    with pytest.raises(ValueError, match="accumulation is 4: pipedream updates after every micro-batch"):
        run("pipedream", 4, 4)
    with pytest.raises(ValueError, match="accumulation is 3: interleaved-1f1b"):
        run("interleaved-1f1b", 4, 3, chunks=2)
    with pytest.raises(ValueError, match="at least 7 micro-batches per window"):
        run("pipedream-2bw", 8, 4)
    with pytest.raises(ValueError, match="unknown policy 'stach': did you mean 'stash'"):
        run("paci", 4, 4, policy="stach")
