"""Variants of look-ahead against plain steps of AdamW: every forward runs where the variant's docstring says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.optim.bind import bind_optimizer
from paci_rt.runtime import assemble
from paci_rt.weights.lookahead import LookAhead
from staleness.variants import SHARED, VARIANTS, Damped, EverySecond, replaced, shares_pass
from support.toy import Run, train_local

BETA1, BETA2, LR, DECAY, EPS = 0.8, 0.95, 0.01, 0.1, 1e-8
SIZE, RESTART = 12, 3
SHAPES = [(2, 4), (5, 4), (3, 1), (7, 2)]  # stages behind, accumulation
# Weights of about 1 in fp32 (6e-8 each), a dozen roundings on the way.
ROUNDING = 1e-6


@dataclass(kw_only=True)
class Moment:
    """What a stage's forward ran at, and what it could know then.

    Attributes:
        ahead: updates that come before its backward.
        version: updates made.
        true, used: flat weights.
        mean, square: AdamW's state.
        grads: of the window in the making. before: of the one before, empty after a restart.
    """

    ahead: int
    version: int
    true: Tensor
    used: Tensor
    mean: Tensor
    square: Tensor
    grads: list[Tensor]
    before: list[Tensor]

    def reached(self, grad: Tensor | None) -> Tensor:
        """Where AdamW comes, in double precision, if it sees ``grad`` at all updates ahead; None leaves it there."""
        weight, m, v = self.true.double(), self.mean.double(), self.square.double()
        if grad is None:
            return weight
        for step in range(self.version + 1, self.version + 1 + self.ahead):
            m, v = BETA1 * m + (1 - BETA1) * grad, BETA2 * v + (1 - BETA2) * grad**2
            root = (v / (1 - BETA2**step)).sqrt() + EPS
            weight = weight * (1 - LR * DECAY) - LR * m / (1 - BETA1**step) / root
        return weight

    @property
    def past(self) -> Tensor | None:
        """Mean of past gradients, as the first moment has it."""
        return self.mean.double() / (1 - BETA1**self.version) if self.version else None


def mean_of(grads: list[Tensor]) -> Tensor:
    return torch.stack(grads).double().mean(dim=0)


def moments(variant: str | None, behind: int, accumulation: int, *, scaled: bool = True) -> list[Moment]:
    """All forwards of a stage under PACI's order, with gradients that do not depend on its weights. The pipeline is
    drained after window RESTART and at the end. Without ``scaled`` an update takes the sum over a window, not the
    mean, and the gradients of the moments are so many times larger."""
    windows, divisor = 2 * RESTART, accumulation if scaled else 1
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(SIZE, generator=generator))
    optimizer = paci_rt.AdamW([param], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    bound = bind_optimizer(optimizer, {"w": param})
    with nullcontext() if variant is None else replaced(variant):
        weights = assemble.AheadWeights(bound, accumulation=accumulation, divisor=divisor, early=behind)
    found: list[Moment] = []
    version, grads, before = 0, list[Tensor](), list[Tensor]()

    def forward(m: int) -> None:
        true = param.detach().clone()
        _, context = weights.for_forward(m // accumulation, version, 0)
        with context:
            used = param.detach().clone()
        assert torch.equal(param, true)
        state = bound.state_by_name()["w"] or dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(SIZE))
        moment = Moment(
            ahead=m // accumulation - version,
            version=version,
            true=true,
            used=used,
            mean=state["exp_avg"],
            square=state["exp_avg_sq"],
            grads=list(grads),
            before=before,
        )
        found.append(moment)

    for start, end in ((0, RESTART), (RESTART, windows)):
        ahead = iter(range(start * accumulation, end * accumulation))
        for m, _ in zip(ahead, range(behind), strict=False):
            forward(m)
        for _ in range((end - start) * accumulation):
            for m in ahead:
                forward(m)
                break
            grad = torch.randn(SIZE, generator=generator)
            grads.append(grad * (accumulation / divisor))
            _, context = weights.for_backward(version, version)
            with context:
                bound.accumulate(param, grad)
            if len(grads) == accumulation:
                weights.begin_update(version)
                bound.update(divisor)
                version, grads, before = version + 1, [], grads
        weights.restart(version)
        before = []
    return found


# ------------------------------------------------------- the gradient that each takes, of the window's accumulation


def plain(at: Moment, accumulation: int) -> Tensor | None:
    if at.grads:
        return mean_of(at.grads)
    return mean_of(at.before) if at.before else at.past


def one_older(at: Moment, accumulation: int) -> Tensor | None:
    if len(at.grads) > 1:
        return mean_of(at.grads[:-1])
    return mean_of(at.before) if at.before else at.past


def half_newest(at: Moment, accumulation: int) -> Tensor | None:
    return (mean_of(at.grads) + at.grads[-1].double()) / 2 if at.grads else plain(at, accumulation)


def blended(at: Moment, accumulation: int) -> Tensor | None:
    if not at.grads or at.past is None:
        return plain(at, accumulation)
    return (sum(at.grads) + (accumulation - len(at.grads)) * at.past) / accumulation


def momentum_first(at: Moment, accumulation: int) -> Tensor | None:
    return mean_of(at.grads) if at.grads else at.past


EXPECTED: dict[str | None, Callable[[Moment, int], Tensor | None]] = {
    None: plain,
    "one older": one_older,
    "half newest": half_newest,
    "blended": blended,
    "momentum first": momentum_first,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", EXPECTED)
@pytest.mark.parametrize("scaled", [True, False])
def test_forwards_run_where_steps_by_that_gradient_come(
    variant: str | None, shape: tuple[int, int], scaled: bool
) -> None:
    found = moments(variant, *shape, scaled=scaled)
    for at in found:
        torch.testing.assert_close(at.used.double(), at.reached(EXPECTED[variant](at, shape[1])), rtol=0, atol=ROUNDING)
    assert sum(at.ahead > 0 for at in found) >= len(found) // 3


@pytest.mark.parametrize("shape", SHAPES)
def test_damped_goes_a_part_of_the_way(shape: tuple[int, int]) -> None:
    for at in moments("damped", *shape):
        true = at.true.double()
        expected = true + 0.7 ** max(0, at.ahead - 1) * (at.reached(plain(at, shape[1])) - true)
        torch.testing.assert_close(at.used.double(), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("variant", "k"), [("every 2nd", 2), ("every 4th", 4)])
def test_every_kth_pass_is_made_and_none_outlives_an_update(variant: str, k: int, shape: tuple[int, int]) -> None:
    made: Moment | None = None
    uses, reused = 0, 0
    for at, now in zip(moments(variant, *shape), moments(None, *shape), strict=True):
        if at.ahead <= 0:
            assert torch.equal(at.used, at.true)
            continue
        if made is None or (at.version, at.ahead) != (made.version, made.ahead) or uses == k:
            made, uses = now, 0
        uses, reused = uses + 1, reused + (made is not now)
        assert torch.equal(at.used, made.used)
    assert (reused > 0) == (shape[1] > 1)  # with windows of one micro-batch every forward follows an update


@pytest.mark.parametrize("variant", [SHARED, *VARIANTS])
def test_every_variant_differs_from_plain_look_ahead_somewhere(variant: str) -> None:
    shape = (3, 4) if variant == SHARED else (5, 4)  # only a stage that knows one gradient of four shares it
    pairs = zip(moments(variant, *shape), moments(None, *shape), strict=True)
    assert max(float((one.used - other.used).abs().max()) for one, other in pairs) > 1e-3


# ------------------------------------------------------------------------------------------------- whole pipelines

PIPELINE = Run(schedule="paci", stages=5, accumulation=3, lookahead=True)


def assert_same_run(variant: str) -> None:
    expected = train_local(PIPELINE)
    with replaced(variant):
        result = train_local(PIPELINE)
    assert result["losses"] == expected["losses"]
    assert all(torch.equal(value, expected["params"][name]) for name, value in result["params"].items())
    assert result["stats"]["lookahead_forwards"] == expected["stats"]["lookahead_forwards"] > 0


def test_making_every_pass_anew_is_making_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EverySecond, "k", 1)
    assert_same_run("every 2nd")


def test_damped_all_the_way_is_not_damped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Damped, "SHARE", 1.0)
    assert_same_run("damped")


def test_a_pass_was_shared_where_its_first_forward_knew_little() -> None:
    shared = {a: [early for early in range(a + 3) if shares_pass(a, early)] for a in (1, 2, 4, 8, 16)}
    assert shared == {1: [], 2: [], 4: [3], 8: [5, 6, 7], 16: [10, 11, 12, 13, 14, 15]}


@pytest.mark.parametrize("shape", [(7, 8), (6, 8), (5, 8)])
def test_shared_weights_ahead_serve_until_four_times_as_much_is_known(shape: tuple[int, int]) -> None:
    made: Moment | None = None
    for at, now in zip(moments(SHARED, *shape), moments(None, *shape), strict=True):
        if at.ahead <= 0 or not at.grads:
            made = None
            continue
        if made is None or at.version != made.version or len(at.grads) >= 4 * len(made.grads):
            made = now
        assert torch.equal(at.used, made.used)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_stand_in_only_where_they_are_asked_to(variant: str) -> None:
    expected = train_local(PIPELINE)
    with replaced(variant):
        result = train_local(PIPELINE)
    assert any(not torch.equal(value, expected["params"][name]) for name, value in result["params"].items())
    assert result["stats"]["lookahead_forwards"] == expected["stats"]["lookahead_forwards"]
    again = train_local(PIPELINE)  # and afterwards pipelines look ahead as ever
    assert again["losses"] == expected["losses"]
    assert make_plain() is LookAhead


def make_plain() -> type[LookAhead]:
    """What a pipeline that is built now looks ahead with."""
    param = nn.Parameter(torch.zeros(2))
    bound = bind_optimizer(paci_rt.AdamW([param], lr=LR), {"w": param})
    weights = assemble.AheadWeights(bound, accumulation=1, divisor=1, early=1)
    return type(weights._look_ahead)  # type: ignore[attr-defined]


def test_an_unknown_variant_is_told() -> None:
    with pytest.raises(ValueError, match="choose from shared, every 2nd"), replaced("sideways"):
        pass
