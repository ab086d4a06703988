"""The linear theory of delayed steps: limits against closed forms, and maps against plain iteration."""

from __future__ import annotations

import math

import numpy as np
import pytest

from staleness.stability import PREDICTORS, StageModel


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_undelayed_momentum_is_stable_up_to_its_textbook_limit(beta: float, predictor: str) -> None:
    model = StageModel(behind=0, accumulation=3, predictor=predictor, beta=beta)
    assert model.largest_step() == pytest.approx(2 * (1 + beta) / (1 - beta), rel=1e-6)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_delay_alone_allows_about_one_over_itself(delay: int) -> None:
    # One micro-batch a window, so that the delay is `behind` updates; the formula is a first-order one.
    model = StageModel(behind=delay, accumulation=1, predictor="none")
    assert model.largest_step() == pytest.approx(1 / delay, rel=0.12)


def iterate(model: StageModel, step: float, windows: int, noise: np.ndarray) -> np.ndarray:
    """Weights after each window, by the definition and not by maps; look-ahead made anew each time."""
    weight, moment, before = 1.0, 0.0, 0.0
    points, found = [1.0] * model.behind, []
    for window in range(windows):
        total = 0.0
        for done in range(model.accumulation):
            w, m = weight, moment
            grad = total / done if done else before
            for _ in range((done + model.behind) // model.accumulation):
                m = model.beta * m + (1 - model.beta) * grad
                w -= step * m
            points.append(w)
            total += points.pop(0) + noise[window, done]
        before = total / model.accumulation
        moment = model.beta * moment + (1 - model.beta) * before
        weight -= step * moment
        found.append(weight)
    return np.array(found)


def test_the_map_of_a_window_is_the_window() -> None:
    model = StageModel(behind=5, accumulation=4, predictor="look-ahead")
    noise = np.random.default_rng(0).normal(size=(6, 4))
    through, added = model.window(2.0)
    state = np.array([1.0, 0.0, 0.0, *[1.0] * 5])
    weights = []
    for window in range(6):
        state = through @ state + added @ noise[window]
        weights.append(state[0])
    np.testing.assert_allclose(weights, iterate(model, 2.0, 6, noise), rtol=1e-12)


def test_spread_is_the_variance_in_the_long_run() -> None:
    model = StageModel(behind=3, accumulation=4, predictor="look-ahead")
    noise = np.random.default_rng(0).normal(size=(20000, 4))
    weights = iterate(model, 3.0, 20000, noise)[1000:]
    # The mean of a correlated series of this length is known to about 3 %.
    assert float(weights.var()) == pytest.approx(model.spread(3.0), rel=0.1)
    assert model.spread(50.0) == math.inf


def test_sharing_helps_where_much_is_early_and_is_left_alone_elsewhere() -> None:
    def limit(behind: int, predictor: str) -> float:
        return StageModel(behind=behind, accumulation=8, predictor=predictor).largest_step()

    assert limit(7, "look-ahead shared") > 1.8 * limit(7, "look-ahead")
    assert limit(4, "look-ahead shared") == limit(4, "look-ahead") > limit(4, "look-ahead once")


def test_an_unknown_predictor_is_told() -> None:
    with pytest.raises(ValueError, match="choose from none"):
        StageModel(behind=1, accumulation=1, predictor="crystal ball")
