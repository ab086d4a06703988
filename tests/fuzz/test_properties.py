"""Every call works, and is right where an oracle knows, or raises a documented error: a few cases of each target.

``PACI_RT_FUZZ_SECONDS=3600 pytest tests/fuzz`` runs for so long, ``PACI_RT_FUZZ_SEED`` begins elsewhere; so does
``python tools/fuzz.py --seconds 3600 --json FILE``.
"""

from __future__ import annotations

import os

import pytest

import fuzz
from fuzz_support import Target

SECONDS = float(os.environ.get("PACI_RT_FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("PACI_RT_FUZZ_SEED", "2026"))
FEW = 150


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.name)
def test_every_case_ends_as_documented(target: Target) -> None:
    share = SECONDS / len(fuzz.TARGETS)
    cases = None if SECONDS else max(10, fuzz.cases_of(target, FEW))
    found = fuzz.run([target], seconds=share, first_seed=SEED, cases=cases)
    print(f"PACI_RT_FUZZ_SEED={found['seeds'][0]}: {found['cases']} cases of {target.name}")
    assert found["failures"] == [], found["failures"][0]["text"]
    assert found["cases"] >= 10


def test_the_property_notices() -> None:
    """A target that breaks it in each way that there is."""
    ways = {
        "an error that Python raised": lambda _: fuzz.fuzz_support.attempt("x", lambda: {}["key"]),
        "a TypeError of nobody's": lambda _: fuzz.fuzz_support.attempt("x", lambda: len(3)),  # type: ignore[arg-type]
        "a wrong result": lambda _: fuzz.fuzz_support.holds(False, "x"),
        "no end": lambda _: fuzz.fuzz_support.attempt("x", _endless, seconds=0.2),
    }
    for name, check in ways.items():
        target = Target(name, fuzz.fuzz_schedules.names, check)
        assert len(fuzz.run([target], seconds=1, first_seed=1, cases=1)["failures"]) == 1, name


def _endless() -> None:
    while True:
        pass
