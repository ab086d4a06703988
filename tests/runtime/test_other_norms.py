"""Norms of other stages that have not come yet."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from paci_rt.runtime.other_norms import OtherNorms
from paci_rt.runtime.safety import KNOWN_WINDOWS


def test_what_is_known_of_a_window_is_taken_as_it_is() -> None:
    norms = OtherNorms(0, 3)
    norms.hear(0, 5, 1.0)
    assert norms.total(5) == 1.0  # nothing has been heard of the others
    norms.hear(1, 5, 2.0)
    norms.hear(2, 5, 4.0)
    assert norms.total(5) == 7.0
    norms.hear(2, 6, 100.0)  # a later stage may be ahead
    assert norms.total(5) == 7.0


def test_what_is_missing_follows_ones_own_norm() -> None:
    norms = OtherNorms(1, 2)
    norms.hear(1, 0, 1.0)
    norms.hear(0, 0, 3.0)
    norms.hear(1, 1, 10.0)
    assert norms.total(1) == pytest.approx(40.0)
    norms.hear(0, 1, 50.0)
    norms.hear(1, 2, 1.0)
    assert norms.total(2) == pytest.approx(1 + 3**0.7 * 5**0.3)


def test_it_matters_not_which_of_both_comes_first_nor_how_often() -> None:
    one, other = OtherNorms(0, 2), OtherNorms(0, 2)
    for window, (own, theirs) in enumerate([(1.0, 2.0), (3.0, 1.0), (2.0, 2.0)]):
        one.hear(0, window, own)
        one.hear(1, window, theirs)
        other.hear(1, window, theirs)
        other.hear(1, window, theirs)
        other.hear(0, window, own)
        other.hear(0, window, own)
    for norms in (one, other):
        norms.hear(0, 3, 1.0)
    assert one.total(3) == other.total(3) != 3.0


@pytest.mark.parametrize(("own", "theirs"), [(0.0, 2.0), (2.0, 0.0), (1e-320, 1e300), (1e300, 1e-320)])
def test_what_has_no_ratio_is_taken_as_it_was_last_heard(own: float, theirs: float) -> None:
    """A frozen stage has no gradient at all."""
    norms = OtherNorms(0, 2)
    norms.hear(0, 0, own)
    norms.hear(1, 0, theirs)
    norms.hear(0, 1, 1.0)
    assert norms.total(1) == 1.0 + theirs


def test_a_stage_without_gradients_of_its_own_takes_what_it_last_heard() -> None:
    norms = OtherNorms(0, 2)
    for window, own in enumerate((1.0, 0.0)):
        norms.hear(0, window, own)
        if window == 0:
            norms.hear(1, window, 5.0)
    assert norms.total(1) == 5.0


def test_after_a_restart_nothing_is_known_and_old_windows_are_forgotten() -> None:
    norms = OtherNorms(0, 2)
    for window in range(10 * KNOWN_WINDOWS):
        norms.hear(0, window, 1.0)
        norms.hear(1, window, 2.0)
    assert max(len(known) for known in norms._squares) == KNOWN_WINDOWS
    norms.restart()
    norms.hear(0, 0, 1.0)
    assert norms.total(0) == 1.0


def test_norms_that_rise_and_fall_together_are_foretold_closer_than_by_the_last_one_heard() -> None:
    draw = random.Random(0)
    norms, last = OtherNorms(0, 2), 1.0
    foretold, heard = [], []
    for window in range(400):
        both = draw.gauss(0, 0.5)
        own, theirs = math.exp(both + draw.gauss(0, 0.2)), math.exp(both + draw.gauss(0, 0.2))
        norms.hear(0, window, own)
        foretold.append(math.log(norms.total(window) / (own + theirs)))
        heard.append(math.log((own + last) / (own + theirs)))
        norms.hear(1, window, theirs)
        last = theirs
    assert statistics.pstdev(foretold[10:]) < 0.6 * statistics.pstdev(heard[10:])
