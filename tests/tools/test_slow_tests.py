from __future__ import annotations

import re
from pathlib import Path

import pytest

import slow_tests

ROOT = Path(__file__).resolve().parents[2]


def test_the_longest_are_chosen_and_every_function_keeps_a_case() -> None:
    log = [
        "3.00s call     tests/a.py::one[x]",
        "0.50s setup    tests/a.py::one[x]",
        "2.00s call     tests/a.py::one[a b]",
        "0.40s call     tests/a.py::one[y]",
        "0.30s call     tests/a.py::two",
        "1.50s call     tests/a.py::three",
        "no duration",
    ]
    seconds = slow_tests.durations(log)
    assert seconds["tests/a.py::one[x]"] == 3.5 and len(seconds) == 5
    assert slow_tests.choose(seconds, 100.0, 1.0) == []
    assert slow_tests.choose(seconds, 4.3, 1.0) == ["tests/a.py::one[x]"]
    assert slow_tests.choose(seconds, 0.8, 1.0) == ["tests/a.py::one[a b]", "tests/a.py::one[x]", "tests/a.py::three"]


@pytest.mark.parametrize("mark", slow_tests.TABLES)
def test_the_tests_of_the_tables_exist(mark: str) -> None:
    lines = (slow_tests.TESTS / f"{mark}.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        file, _, name = line.partition("::")
        function = name.partition("[")[0]
        assert (ROOT / file).exists(), f"{file} is gone: run tools/slow_tests.py"
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"def {function}\(", text), f"{line} is gone: run tools/slow_tests.py"
