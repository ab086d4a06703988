"""Optimizers over flat groups, against torch's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.optim import SGD, AdamW, Lion, Muon, NAdam
from paci_rt.optim.verdict import Verdict
from support.optimizers import (
    STEPS,
    bind,
    distance,
    make_module,
    random_windows,
    run_torch,
    run_windows,
    torch_nadam,
)
from support.toy import make_muon

ADAMW_OPTIONS = [
    {},
    {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
    {"lr": 1e-2, "betas": (0.3, 0.5), "weight_decay": 0.0, "maximize": True},
    {"betas": (0.0, 0.9)},
]
SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.03, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.03, "momentum": 0.9},
    {"lr": 0.03, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"lr": 0.03, "momentum": 0.8, "nesterov": True},
]
NADAM_OPTIONS = [*ADAMW_OPTIONS, {"lr": 1e-2, "betas": (0.99, 0.95), "momentum_decay": 0.1, "weight_decay": 0.1}]


CASES = [
    *((AdamW, torch.optim.AdamW, options) for options in ADAMW_OPTIONS),
    *((NAdam, torch_nadam, options) for options in NADAM_OPTIONS),
    *((SGD, torch.optim.SGD, options) for options in SGD_OPTIONS),
]
LOW_PRECISION = [
    (AdamW, {"lr": 1e-2}),
    (NAdam, {"lr": 1e-2}),
    (SGD, {"lr": 0.05, "momentum": 0.9}),
    (Lion, {"lr": 1e-3}),
    (make_muon, {"lr": 1e-2}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
@pytest.mark.parametrize("micro_batches", [1, 3, 4])
def test_fp32_matches_torch_in_double(ours: type, theirs: type, options: dict[str, Any], micro_batches: int) -> None:
    module = make_module()
    reference = copy.deepcopy(module).double()
    windows = random_windows(module, micro_batches)
    optimizer, peer = ours(module.parameters(), **options), theirs(reference.parameters(), **options)
    run_windows(bind(optimizer, module), list(module.parameters()), windows)
    run_torch(peer, list(reference.parameters()), windows)
    # Each step rounds the weight twice, in the decay and in the update, by at most 2^-24 of its size; the sums and the
    # update itself, which are rounded some ten times, can be as large as the weight: 16 units of rounding a step.
    bound = 16 * STEPS * 2.0**-24
    for param, target in zip(module.parameters(), reference.parameters(), strict=True):
        assert distance(param, target) <= bound
        for key, value in peer.state[target].items():
            if isinstance(value, Tensor) and value.norm() > 0:
                assert distance(optimizer.state[param][key], value) <= bound


@pytest.mark.parametrize(("ours", "options"), LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_follow_fp32_masters(ours: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    module = make_module(dtype)
    full = copy.deepcopy(module).float()
    windows = random_windows(module, 4)
    optimizer, peer = ours(module.parameters(), **options), ours(full.parameters(), **options)
    run_windows(bind(optimizer, module), list(module.parameters()), windows)
    run_windows(bind(peer, full), list(full.parameters()), windows)
    for param, target in zip(module.parameters(), full.parameters(), strict=True):
        assert torch.equal(optimizer.state[param]["master"], target)
        assert torch.equal(param, target.to(dtype))


@pytest.mark.parametrize(("ours", "options"), LOW_PRECISION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", [4.0, 6.0])
def test_sums_that_are_clipped_on_the_way_have_the_bits_of_sums_clipped_before(
    ours: Any, options: dict[str, Any], dtype: torch.dtype, divisor: float
) -> None:
    factor = 0.37
    module = make_module(dtype)
    twin = copy.deepcopy(module)
    ours_bound, twin_bound = (bind(ours(one.parameters(), **options), one) for one in (module, twin))
    for micro_batches in random_windows(module, 1, steps=3):
        for bound, one in ((ours_bound, module), (twin_bound, twin)):
            for grads in micro_batches:
                for param, grad in zip(one.parameters(), grads, strict=True):
                    bound.accumulate(param, grad)
        ours_bound.update(divisor, decide=lambda _: Verdict(factor))
        twin_bound.seal_window()
        for _, _, total in twin_bound.sealed_sums():
            total.mul_(factor)
        twin_bound.update(divisor)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    for name, state in ours_bound.state_by_name().items():
        for key, value in twin_bound.state_by_name()[name].items():
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), (name, key)


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (NAdam, torch_nadam)])
def test_step_counts_are_kept_for_each_parameter(ours: type, theirs: Any) -> None:
    module, reference = make_module(), make_module()
    reference.load_state_dict(module.state_dict())
    params, peers = list(module.parameters()), list(reference.parameters())
    optimizer, peer = ours(params, lr=1e-2), theirs(peers, lr=1e-2)
    bound = bind(optimizer, module)
    for step in range(6):
        for index, param in enumerate(params):
            peers[index].grad = None
            if step % (index % 3 + 1) == 0:
                grad = torch.randn_like(param)
                bound.accumulate(param, grad)
                peers[index].grad = grad.clone()
        bound.update(1)
        peer.step()
    for param, target in zip(params, peers, strict=True):
        assert optimizer.state[param]["step"].item() == peer.state[target]["step"].item()
        assert distance(param, target) <= 6 * 16 * 2.0**-24


TORCH_OPTIMIZERS = [
    (torch.optim.AdamW, {"lr": 1e-3}),
    (torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    (torch.optim.Adam, {"lr": 1e-3, "foreach": True, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.Rprop, {}),
]


@pytest.mark.parametrize(("cls", "options"), TORCH_OPTIMIZERS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_any_torch_optimizer_equals_a_plain_loop(cls: type, options: dict[str, Any], micro_batches: int) -> None:
    module = make_module()
    reference = copy.deepcopy(module)
    windows = random_windows(module, micro_batches, steps=4)
    optimizer, peer = cls(module.parameters(), **options), cls(reference.parameters(), **options)
    run_windows(bind(optimizer, module, buffers=2), list(module.parameters()), windows)
    run_torch(peer, list(reference.parameters()), windows)
    for param, target in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(param, target)
        assert param.grad is None


def test_torch_optimizer_with_low_precision_parameters() -> None:
    module = make_module(torch.bfloat16)
    reference = copy.deepcopy(module)
    windows = random_windows(module, 3, steps=3)
    params, peers = list(module.parameters()), list(reference.parameters())
    run_windows(bind(torch.optim.SGD(params, lr=0.1), module), params, windows)
    peer = torch.optim.SGD(peers, lr=0.1)
    for window in windows:
        for param, *grads in zip(peers, *window, strict=True):
            total = grads[0].float() + grads[1] + grads[2]  # sums stay in fp32; only the mean is rounded
            param.grad = (total / 3).bfloat16()
        peer.step()
    assert all(torch.equal(param, target) for param, target in zip(params, peers, strict=True))


@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW])
def test_learning_rate_schedulers_work_without_a_warning(cls: type) -> None:
    module, reference = make_module(), make_module()
    reference.load_state_dict(module.state_dict())
    params, peers = list(module.parameters()), list(reference.parameters())
    optimizer, peer = cls(params, lr=1e-2), torch.optim.AdamW(peers, lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, peer)]
    bound = bind(optimizer, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for window in random_windows(module, 1, steps=3):
            run_windows(bound, params, [window])
            run_torch(peer, peers, [window])
            for scheduler in schedulers:
                scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.125
    for param, target in zip(params, peers, strict=True):
        assert distance(param, target) <= 3 * 16 * 2.0**-24


@pytest.mark.parametrize(("ours", "theirs"), [(AdamW, torch.optim.AdamW), (NAdam, torch_nadam)])
def test_state_of_torchs_optimizer_loads(ours: type, theirs: Any) -> None:
    module, reference = make_module(), make_module()
    reference.load_state_dict(module.state_dict())
    peer = theirs(reference.parameters(), lr=5e-3)
    windows = random_windows(module, 1, steps=2)
    run_torch(peer, list(reference.parameters()), windows[:1])
    module.load_state_dict(reference.state_dict())
    optimizer = ours(module.parameters())
    optimizer.load_state_dict(peer.state_dict())
    run_windows(bind(optimizer, module), list(module.parameters()), windows[1:])
    run_torch(peer, list(reference.parameters()), windows[1:])
    for param, target in zip(module.parameters(), reference.parameters(), strict=True):
        assert optimizer.state[param]["step"].item() == 2
        assert distance(param, target) <= 2 * 16 * 2.0**-24


def test_nadam_refuses_a_state_with_coupled_weight_decay() -> None:
    params = [nn.Parameter(torch.ones(3))]
    ours = NAdam(params)
    with pytest.raises(ValueError, match=r"load one with decoupled_weight_decay=True or weight_decay=0"):
        ours.load_state_dict(torch.optim.NAdam(params, weight_decay=0.1).state_dict())
    ours.load_state_dict(torch.optim.NAdam(params, lr=0.5).state_dict())
    assert ours.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW(p, lr=-1.0), "lr=-1.0"),
        (lambda p: AdamW(p, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda p: AdamW(p, eps=-1e-8), "eps=-1e-08"),
        (lambda p: AdamW(p, weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda p: NAdam(p, momentum_decay=-1.0), "momentum_decay=-1.0"),
        (lambda p: NAdam(p, betas=(1.0, 0.9)), r"betas=\(1.0, 0.9\)"),
        (lambda p: Lion(p, lr=-1.0), "lr=-1.0"),
        (lambda p: Lion(p, betas=(0.9, -0.1)), r"betas=\(0.9, -0.1\)"),
        (lambda p: SGD(p, lr=-1.0), "lr=-1.0"),
        (lambda p: SGD(p, momentum=-0.5), "momentum=-0.5"),
        (lambda p: SGD(p, weight_decay=-0.5), "weight_decay=-0.5"),
        (lambda p: SGD(p, nesterov=True), "nesterov=True needs momentum"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(1))])


def test_native_optimizers_are_public() -> None:
    for cls in (AdamW, NAdam, SGD, Lion, Muon):
        assert getattr(paci_rt, cls.__name__) is cls
