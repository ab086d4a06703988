"""Random calls over the whole native core: no child process ends by a signal, and none hangs."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz_native_values as values
from paci_rt import _C
from support.deadlines import deadline

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz_native.py"
SECONDS = float(os.environ.get("PACI_RT_FUZZ_SECONDS", "0"))


def test_random_calls_end_without_a_signal() -> None:
    seed = int(os.environ.get("PACI_RT_FUZZ_SEED", "20"))
    amount = ["--calls", "10000000", "--seconds", str(SECONDS)] if SECONDS else ["--calls", "200"]
    run = subprocess.run(
        [sys.executable, str(TOOL), "--seed", str(seed), *amount],
        capture_output=True,
        text=True,
        timeout=deadline(SECONDS + 120),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.stdout, run.stderr
    found = json.loads(run.stdout)
    print(found)
    assert found["bad"] == [], found
    assert found["calls"] >= 200
    assert found["outcomes"]["returned"] >= found["calls"] // 10  # not all of them stop at a wrong type


@pytest.mark.parametrize("scope", [_C, _C._testing], ids=["core", "testing"])
def test_the_calls_cover_everything_that_the_core_has(scope: object) -> None:
    known = {(call.owner, call.name) for call in values.all_calls()}
    missing = []
    for name, member in vars(scope).items():
        if name.startswith("_"):
            continue
        if inspect.isclass(member):
            public = (one for one in vars(member) if not one.startswith("_") or one == "__cuda_stream__")
            owners = [base.__name__ for base in member.__mro__]
            missing += [
                (name, one)
                for one in public
                if one not in values.LEFT_OUT and not any((owner, one) in known for owner in owners)
            ]
        elif callable(member) and ("", name) not in known:
            missing.append(("", name))
    assert missing == []
