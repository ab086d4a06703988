from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from paci_rt.train.data import Corpus
from paci_rt.train.prefetch import Prefetch


def test_steps_come_in_order_and_ahead_of_time() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with Prefetch(make, range(3, 30), ahead=4) as windows:
        for step in range(3, 30):
            assert windows.take(step) == step * step
            time.sleep(0.001)
            assert len(made) <= step - 3 + 1 + 5
        assert made == list(range(3, 30))
    assert not [one for one in threading.enumerate() if one.name == "prefetch"]


def test_a_stall_is_counted_and_a_quick_source_makes_none() -> None:
    with Prefetch(lambda step: time.sleep(0.02), range(6)) as slow:
        for step in range(6):
            slow.take(step)
    assert 0.08 < slow.stall_s < 0.5
    with Prefetch(lambda step: step, range(6)) as quick:
        for step in range(6):
            quick.take(step)
            time.sleep(0.01)
    assert quick.stall_s < 0.02


def test_an_error_is_raised_where_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("token 300")
        return step

    with Prefetch(make, range(10)) as windows:
        assert [windows.take(0), windows.take(1)] == [0, 1]
        with pytest.raises(ValueError, match="token 300"):
            windows.take(2)


def test_leaving_ends_the_thread_while_it_waits() -> None:
    with Prefetch(lambda step: step, range(10**9)) as windows:
        windows.take(0)
    assert not [one for one in threading.enumerate() if one.name == "prefetch"]


def test_rows_of_a_window_are_those_of_the_whole_window() -> None:
    tokens = np.arange(5000, dtype=np.uint16)
    corpus = Corpus(name="numbers", train=tokens, val=tokens, vocab_size=5000)
    for step in (0, 1, 77):
        whole, targets = corpus.batch(step, 12, 9, seed=5)
        parts = [corpus.batch(step, 12, 9, 5, rows=slice(at, at + 4)) for at in (0, 4, 8)]
        assert torch.equal(torch.cat([x for x, _ in parts]), whole)
        assert torch.equal(torch.cat([y for _, y in parts]), targets)
        assert torch.equal(corpus.batch(step, 12, 9, 5, rows=slice(1, None, 3))[0], whole[1::3])
