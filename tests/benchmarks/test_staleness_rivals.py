"""Rivals of look-ahead: their optimizers against plain references, and their rules for learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from staleness.rivals import (
    RIVALS,
    PlainMuon,
    RivalOptions,
    RotatedAdamW,
    Steps,
    delay_scaled_rate,
    orthogonal,
    param_groups,
    pipemare_rate,
)

Named = list[tuple[str, nn.Parameter]]
OPTIONS = RivalOptions(
    lr=1e-2,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    is_hidden_matrix=lambda name, param: name.startswith("h.") and param.dim() == 2,
)
SHAPES = {"embed": (7, 5), "h.0": (6, 6), "h.1": (9, 4), "bias": (5,)}


def make_named(seed: int = 0) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def train(named: Named, optimizer: torch.optim.Optimizer, grads: Callable[[int, Tensor], Tensor], steps: int) -> None:
    for step in range(steps):
        for _, param in named:
            param.grad = grads(step, param)
        optimizer.step()


def random_grads(step: int, param: Tensor) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * step + param.numel()))


def assert_same(ours: Named, theirs: Named, *, atol: float) -> None:
    for (name, mine), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --------------------------------------------------------------------------------------------------------- rivals


def test_parameters_fall_into_three_groups() -> None:
    named = make_named()
    groups = param_groups(named, OPTIONS)
    names = {id(param): name for name, param in named}
    found = [([names[id(p)] for p in group["params"]], group["weight_decay"], group["hidden"]) for group in groups]
    assert found == [(["h.0", "h.1"], 0.1, True), (["embed"], 0.1, False), (["bias"], 0.0, False)]
    assert len(param_groups(named[1:3], OPTIONS)) == 1  # no empty groups


def test_steps_are_those_of_adamw() -> None:
    ours, theirs = make_named(), make_named()
    reference = torch.optim.AdamW(
        [{**group, "params": group["params"]} for group in param_groups(theirs, OPTIONS)], lr=1e-2, betas=(0.9, 0.95)
    )
    train(ours, Steps(ours, OPTIONS), random_grads, 20)
    train(theirs, reference, random_grads, 20)
    # Each of 20 steps rounds a weight below 4 by at most 2.4e-7, and steps of 0.01 by a few 1e-9.
    assert_same(ours, theirs, atol=5e-6)
    assert all(
        float((mine - start).detach().abs().max()) > 0.05
        for (_, mine), (_, start) in zip(ours, make_named(), strict=True)
    )


def test_steps_skip_parameters_without_a_gradient() -> None:
    named = make_named()
    optimizer = Steps(named, OPTIONS)
    named[0][1].grad = torch.ones(7, 5)
    optimizer.step()
    changed = {name for (name, param), (_, old) in zip(named, make_named(), strict=True) if not torch.equal(param, old)}
    assert changed == {"embed"}


class Gradient(Steps):
    """Plain gradient descent, so that steps can be told from weights."""

    def direction(self, param: Tensor, state: dict[str, Any], *, hidden: bool) -> Tensor:
        assert param.grad is not None
        return param.grad.clone()


def test_error_feedback_adds_the_last_difference() -> None:
    param = nn.Parameter(torch.zeros(3, 3))
    options = RivalOptions(lr=0.5, weight_decay=0.0, betas=(0.9, 0.95), is_hidden_matrix=lambda *_: False)
    optimizer = Gradient([("w", param)], options, feed_back=True)
    moved, before = [], param.detach().clone()
    for value in (1.0, 3.0, 3.0, -2.0):
        param.grad = torch.full((3, 3), value)
        optimizer.step()
        moved.append(float((before - param.detach())[0, 0]) / 0.5)
        before = param.detach().clone()
    assert moved == [1.0, 3.0 + 2.0, 3.0, -2.0 - 5.0]  # u + (u - last u); small integers and halves are exact


@pytest.mark.parametrize("name", ["error-feedback-adamw", "error-feedback-muon"])
def test_error_feedback_changes_steps_only_where_they_change(name: str) -> None:
    plain = {"error-feedback-adamw": Steps, "error-feedback-muon": PlainMuon}[name]

    def constant(step: int, param: Tensor) -> Tensor:
        return random_grads(0, param)

    for grads, same in ((constant, True), (random_grads, False)):
        ours, theirs = make_named(), make_named()
        train(ours, RIVALS[name](ours, OPTIONS), grads, 6)
        train(theirs, plain(theirs, OPTIONS), grads, 6)
        gap = max(
            float((mine - other).detach().abs().max()) for (_, mine), (_, other) in zip(ours, theirs, strict=True)
        )
        # Adam's step for constant gradients is their sign each time; Muon's their orthogonal factor. Rounding of
        # nearly equal directions of size 1 is fed back at a rate of 0.01.
        assert (gap < 1e-6) if same else (gap > 1e-3)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if shape[0] == shape[1]:
        matrix += 8 * torch.eye(16)  # a random square matrix may be all but singular
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = s / s.norm()
    for _ in range(5):  # the same polynomial, on singular values alone
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    result = orthogonal(matrix)
    # Five steps of products of at most 40 fp32 terms of size 1: an error of 5 * 40 * 6e-8, times slopes up to 3.4.
    torch.testing.assert_close(result.double(), u @ torch.diag(expected) @ v, rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25  # where Muon's authors say that they end up


def test_muon_steps_have_the_size_of_adamws() -> None:
    named = make_named()
    before = [param.detach().clone() for _, param in named]
    train(named, PlainMuon(named, RivalOptions(**{**vars(OPTIONS), "weight_decay": 0.0})), random_grads, 1)
    for (name, param), old in zip(named, before, strict=True):
        step = (param.detach() - old) / 0.01
        rows_and_columns = step.shape
        if OPTIONS.is_hidden_matrix(name, param):
            # Singular values of 0.65 to 1.25 make a root mean square of that over sqrt(max side), times the factor.
            assert 0.13 < float(step.square().mean().sqrt()) < 0.25, rows_and_columns
        else:
            torch.testing.assert_close(step.abs(), torch.ones_like(step), rtol=0, atol=1e-4)  # Adam's first step


def test_rotated_adamw_is_adamw_where_the_basis_is_that_of_the_matrix() -> None:
    """Diagonal gradients have diagonal products, so the eigenbasis is a permutation: Adam does not mind."""

    def diagonal(step: int, param: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.diag((torch.arange(6) + 1.0) * (1 + 0.05 * torch.randn(6, generator=generator)))

    options = RivalOptions(**{**vars(OPTIONS), "weight_decay": 0.0})
    ours, theirs = make_named()[1:2], make_named()[1:2]
    train(ours, RotatedAdamW(ours, options), diagonal, 1)
    assert_same(ours, theirs, atol=0)  # the first gradient makes the basis and no step
    rotated = RotatedAdamW(ours, options)
    train(ours, rotated, diagonal, 26)  # the basis is refreshed twice
    train(theirs, Steps(theirs, options), lambda step, param: diagonal(step + 1, param), 25)
    # As for plain steps: 25 roundings of a weight below 4; the permutations are exact but for units of the last place.
    assert_same(ours, theirs, atol=1e-5)


def test_rotated_adamw_turns_with_its_gradients() -> None:
    """In the basis of any two orthogonal matrices the steps are those for the gradients turned into that basis."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q for _ in range(2))
    options = RivalOptions(**{**vars(OPTIONS), "weight_decay": 0.0})

    def grads(step: int, param: Tensor) -> Tensor:
        small = 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        return torch.diag(torch.arange(6) + 1.0) + small

    plain, turned = [("h.0", nn.Parameter(torch.zeros(6, 6)))], [("h.0", nn.Parameter(torch.zeros(6, 6)))]
    train(plain, RotatedAdamW(plain, options), grads, 15)
    train(turned, RotatedAdamW(turned, options), lambda step, p: left @ grads(step, p) @ right.T, 15)
    # 15 steps of 0.01; directions of size 1 differ by fp32 rounding, amplified where a moment is small: 1e-3 at most.
    torch.testing.assert_close(turned[0][1].detach(), left @ plain[0][1].detach() @ right.T, rtol=0, atol=15e-5)
    adam = [("h.0", nn.Parameter(torch.zeros(6, 6)))]
    train(adam, Steps(adam, options), grads, 15)
    assert float((adam[0][1] - plain[0][1]).detach().abs().max()) > 0.02  # and not what Adam does


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains_in_a_pipeline(name: str) -> None:
    modules = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="paci",
        n_microbatches=2,
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda params: RIVALS[name]([("h." + key, param) for key, param in params], OPTIONS),
    )
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    losses: list[Tensor] = []
    means = []
    for _ in range(40):
        pipe.step(x, target=0.5 * x.flip(1).tanh(), losses=losses)
        means += [float(torch.stack(losses).mean())] if losses else []
    pipe.close()
    assert means[-1] < 0.7 * means[0]


def test_pipemare_rate_rises_from_the_delay_to_one() -> None:
    rate = pipemare_rate(4.0, warmup_updates=10)
    assert rate(0) == 0.25 and rate(5) == pytest.approx(4.0**-0.5) and rate(10) == rate(99) == 1.0
    assert pipemare_rate(0.3, warmup_updates=10)(0) == 1.0  # a delay below one update counts as one


def test_delay_scaled_rate() -> None:
    assert [delay_scaled_rate(delay)(7) for delay in (0.0, 1.0, 3.0)] == [1.0, 0.5, 0.25]
