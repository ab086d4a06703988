"""Muon against torch's at full precision, its two kinds of groups, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.optim.muon import orthogonalized
from paci_rt.weights.lookahead import LookAhead
from paci_rt.weights.predict import Predictor
from support.optimizers import STEPS, bind, distance, random_windows, run_torch, run_windows
from support.toy import make_muon

needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
# Of an orthogonalised matrix: fp32 products round each singular value by a few units in the last place of the largest,
# and an iteration multiplies the error of a small one by 3.44 at most, 5 of them by 485. Four units each.
DIRECTION_BOUND = 4 * 485 * 2.0**-24


class Matrices(nn.Module):
    """Square, wide and tall."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(columns, rows, bias=False) for rows, columns in ((24, 24), (20, 70), (70, 20))
        )


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Newton-Schulz iteration casts to bf16; here the cast is a copy in the matrix's own dtype."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())


@needs_torchs
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1e-2, "momentum": 0.6, "weight_decay": 0.3, "ns_steps": 3},
        {"lr": 1e-2, "nesterov": False, "weight_decay": 0.0, "ns_coefficients": (2.0, -1.5, 0.5)},
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_matrices_match_torch_in_double(options: dict[str, Any], micro_batches: int) -> None:
    module = Matrices()
    reference = copy.deepcopy(module).double()
    params = list(module.parameters())
    windows = random_windows(module, micro_batches)
    optimizer = paci_rt.Muon([{"params": params, "use_muon": True}], **options)
    peer = torch.optim.Muon(reference.parameters(), adjust_lr_fn="match_rms_adamw", **options)
    run_windows(bind(optimizer, module), params, windows)
    before = [param.detach().clone() for param in reference.parameters()]
    run_torch(peer, list(reference.parameters()), windows)
    lr = optimizer.param_groups[0]["lr"]
    for param, target, old in zip(params, reference.parameters(), before, strict=True):
        # A step moves a weight by up to lr * 0.2 sqrt(max) in each direction, within the bound, and rounds it as AdamW.
        step = lr * 0.2 * max(param.shape) ** 0.5 * min(param.shape) ** 0.5 * 1.2
        bound = STEPS * (16 * 2.0**-24 + DIRECTION_BOUND * step / float(target.detach().norm()))
        assert not torch.equal(old, target)
        assert distance(param, target) <= bound
        assert set(optimizer.state[param]) == set(peer.state[target]) == {"momentum_buffer"}
        buffer = optimizer.state[param]["momentum_buffer"]
        assert distance(buffer, peer.state[target]["momentum_buffer"]) <= 16 * STEPS * 2.0**-24


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    for turned, u, v in ((orthogonalized(matrix, 5), left, right), (orthogonalized(matrix.T, 5), right.T, left.T)):
        values = torch.diagonal(u.T @ turned @ v.T)
        assert values.min() > 0.68 and values.max() < 1.14
        assert (u.T @ turned @ v.T - torch.diag(values)).norm() < 1e-4 * values.norm()
    assert torch.equal(orthogonalized(torch.zeros(3, 4), 5), torch.zeros(3, 4))


def test_steps_are_as_large_as_those_of_adamw() -> None:
    weight = nn.Parameter(torch.zeros(128, 512))
    module = nn.ParameterList([weight])
    bound = bind(paci_rt.Muon([{"params": [weight], "use_muon": True}], lr=1.0), module)
    run_windows(bound, [weight], random_windows(module, 1, steps=1))
    assert 0.15 < weight.detach().square().mean().sqrt() < 0.25  # AdamW's are 0.2 to 0.4 of its rate in training


def test_all_others_are_adamw_to_the_bit() -> None:
    module = nn.Sequential(nn.Linear(37, 50), nn.LayerNorm(50), nn.Linear(50, 11))
    twin = copy.deepcopy(module)
    windows = random_windows(module, 3)
    params, peers = list(module.parameters()), list(twin.parameters())
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
    ours = make_muon(params, **options)
    run_windows(bind(ours, module), params, windows)
    run_windows(bind(paci_rt.AdamW(peers, **options), twin), peers, windows)
    for param, peer in zip(params, peers, strict=True):
        assert torch.equal(param, peer) == (param.dim() != 2)
        assert set(ours.state[param]) == (
            {"momentum_buffer"} if param.dim() == 2 else {"exp_avg", "exp_avg_sq", "step"}
        )


@needs_torchs
@pytest.mark.usefixtures("full_precision")
def test_state_of_torchs_muon_loads() -> None:
    module, reference = Matrices(), Matrices()
    reference.load_state_dict(module.state_dict())
    params, peers = list(module.parameters()), list(reference.parameters())
    peer = torch.optim.Muon(peers, lr=3e-3, momentum=0.7, eps=1e-6, adjust_lr_fn="match_rms_adamw")
    windows = random_windows(module, 1, steps=2)
    run_torch(peer, peers, windows[:1])
    module.load_state_dict(reference.state_dict())
    optimizer = paci_rt.Muon([{"params": params, "use_muon": True}], betas=(0.5, 0.5))
    optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["ns_eps"]) == (3e-3, 0.7, 1e-6)
    assert (group["use_muon"], group["eps"], group["betas"]) == (True, 1e-8, (0.5, 0.5))
    run_windows(bind(optimizer, module), params, windows[1:])
    run_torch(peer, peers, windows[1:])
    for param, target in zip(params, peers, strict=True):
        # Both in fp32: the bound of a direction, for a step of 0.3 % of the weights' own size.
        assert distance(param, target) <= 16 * 2.0**-24 + DIRECTION_BOUND * 1e-1


def test_states_that_mean_something_else_are_refused() -> None:
    weight, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    ours = make_muon([weight, bias])
    swapped = ours.state_dict()
    for group in swapped["param_groups"]:
        group["use_muon"] = not group["use_muon"]
    with pytest.raises(ValueError, match=r"use_muon is False in the state .*the groups that were saved"):
        ours.load_state_dict(swapped)
    if hasattr(torch.optim, "Muon"):
        only = paci_rt.Muon([{"params": [weight], "use_muon": True}])
        with pytest.raises(ValueError, match="adjust_lr_fn='match_rms_adamw'; set that"):
            only.load_state_dict(torch.optim.Muon([weight]).state_dict())
    with pytest.raises(ValueError, match="parameter groups"):
        ours.load_state_dict(paci_rt.Muon([{"params": [bias], "use_muon": False}]).state_dict())


def ready(updates: int) -> tuple[Any, list[Tensor]]:
    """A bound Muon over two matrices and a vector; the second matrix and the vector have had ``updates`` updates."""
    generator = torch.Generator().manual_seed(3)
    named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in
             (("a", (6, 9)), ("b", (9, 5)), ("c", (7,)))}  # fmt: skip
    module = nn.ParameterDict(named)
    bound = bind(make_muon(named.values(), lr=0.1), module)
    for _ in range(updates):
        for name in "bc":
            bound.accumulate(named[name], torch.randn(named[name].shape, generator=generator))
        bound.update(1)
    return bound, [param for group in bound.groups for param in group.params]


@pytest.mark.parametrize("ahead", [1, 3])
def test_look_ahead_takes_all_groups_and_momentum_stands_in(ahead: int) -> None:
    (bound, params), (twin, peers) = ready(2), ready(2)
    bound.accumulate(params[2], torch.ones(7))
    momentum = twin.state_views(0, 1)["momentum_buffer"].clone()
    for _ in range(ahead):
        twin.accumulate(peers[1], momentum)
        twin.accumulate(peers[2], torch.ones(7))
        twin.update(1)
    before = [param.detach().clone() for param in params]
    versions = [param._version for param in params]
    with LookAhead(bound, accumulation=1, divisor=1, shares=False).ahead(ahead, 1):
        assert torch.equal(params[0], before[0])  # never updated, and nothing known
        assert torch.equal(params[1], peers[1]) and not torch.equal(params[1], before[1])
        assert torch.equal(params[2], peers[2])
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert [param._version for param in params] == versions
    assert torch.equal(bound.state_views(0, 1)["momentum_buffer"], momentum)


def test_prediction_names_what_it_can_foresee() -> None:
    for make in (paci_rt.NAdam, paci_rt.Lion, make_muon):
        module = Matrices()
        optimizer = make(list(module.parameters()))
        with pytest.raises(ValueError, match=f"steps of {type(optimizer).__name__}: use AdamW, Adam, or SGD"):
            Predictor(bind(optimizer, module))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(3, 3), (4,)], {}, r"parameter 1 of group 0 has shape \(4,\), .*use_muon=False"),
        ([(2, 3, 3)], {}, r"parameter 0 of group 0 has shape \(2, 3, 3\)"),
        ([(3, 3)], {"momentum": 1.0}, r"momentum=1.0: must lie in \[0, 1\)"),
        ([(3, 3)], {"ns_steps": 0}, "ns_steps=0"),
        ([(3, 3)], {"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients=\(1.0, 2.0\)"),
        ([(3, 3)], {"ns_eps": 0.0}, "ns_eps=0.0"),
        ([(3, 3)], {"eps": -1.0}, "eps=-1.0"),
        ([(3, 3)], {"lr": -1.0}, "lr=-1.0"),
        ([(3, 3)], {"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_bad_options_name_the_remedy(shapes: Any, options: dict[str, Any], message: str) -> None:
    group = {"params": [nn.Parameter(torch.zeros(shape)) for shape in shapes], "use_muon": True}
    with pytest.raises(ValueError, match=message) as caught:
        paci_rt.Muon([group], **options)
    assert "\n" not in str(caught.value)


def test_groups_say_which_they_are() -> None:
    weight, bias = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"group 0 of Muon does not say.*use_muon=True for 2-D"):
        paci_rt.Muon([weight])
    optimizer = paci_rt.Muon([{"params": [weight], "use_muon": True}])
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 has shape \(3,\)"):
        optimizer.add_param_group({"params": [bias], "use_muon": True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bias], "use_muon": False})
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
