from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.deadlines import deadline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("quickstart.py", "counted by stage: {0: {0: 303, 1: 897}"),
        ("swap_from_torch.py", "equal torch's bit for bit: True"),
    ],
)
@pytest.mark.slow
def test_examples_run_and_print_what_they_promise(script: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)], capture_output=True, text=True, timeout=deadline(120)
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
