from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.pool import WorkerPool


class Renewed:
    """Four workers; new ones after a failure in which ranks waited for each other."""

    def __init__(self) -> None:
        self.pool: WorkerPool | None = None

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        self.pool = self.pool or WorkerPool(4)
        try:
            return self.pool.run(fn, 4, *args)
        except BaseException as error:
            if not isinstance(error, AssertionError) or "hangs" in str(error):
                self.close()
            raise

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        self.pool = None


@pytest.fixture(scope="session")
def ranks() -> Iterator[Renewed]:
    """Runs a function on four ranks."""
    pool = Renewed()
    yield pool
    pool.close()
