"""Cases of a parametrised test that only the whole suite runs."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case with the mark ``slow``."""
    return pytest.param(*values, marks=pytest.mark.slow)
