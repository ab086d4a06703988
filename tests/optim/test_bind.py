"""What binding an optimizer to a stage takes over and gives back: stepping, masters, state, groups, memory."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from paci_rt.errors import OptimizerOwnedError, StageError
from paci_rt.optim import SGD, AdamW, Lion, NAdam
from paci_rt.optim.bind import _placed, bind_optimizer
from support.optimizers import (
    bind,
    make_module,
    momentum_sgd,
    random_windows,
    run_windows,
)
from support.toy import make_muon


def test_masters_follow_weights_that_the_user_loads() -> None:
    module, other = make_module(torch.bfloat16), make_module(torch.bfloat16)
    optimizer = SGD(module.parameters(), lr=1e-4)
    bound = bind(optimizer, module)
    params = list(module.parameters())
    run_windows(bound, params, random_windows(module, 1, steps=2))
    masters = [optimizer.state[param]["master"].clone() for param in params]
    module.load_state_dict({**module.state_dict(), "0.weight": other[0].weight.detach()})
    run_windows(bound, params, [[[torch.zeros_like(param) for param in params]]])
    assert torch.equal(params[0], other[0].weight)
    # A master that happens to round to the loaded weight stays; every other one becomes that weight exactly.
    loaded = torch.where(masters[0].bfloat16() == other[0].weight, masters[0], other[0].weight.float())
    assert torch.equal(optimizer.state[params[0]]["master"], loaded)
    # Masters of weights that did not change keep the bits that the weights cannot show.
    for param, master in zip(params[1:], masters[1:], strict=True):
        assert torch.equal(optimizer.state[param]["master"], master)


@pytest.mark.parametrize("ours", [AdamW, NAdam, Lion, make_muon, momentum_sgd])
def test_parameters_without_gradient_are_skipped(ours: Any) -> None:
    module = make_module()
    params = list(module.parameters())
    optimizer = ours(params)
    bound = bind(optimizer, module)
    run_windows(bound, params, random_windows(module, 1, steps=1))
    before = [param.detach().clone() for param in params]
    state = copy.deepcopy(bound.state_by_name())
    bound.accumulate(params[2], torch.ones_like(params[2]))
    bound.update(1)
    for index, (name, param) in enumerate(module.named_parameters()):
        assert torch.equal(param, before[index]) == (index != 2)
        same = all(torch.equal(value, state[name][key]) for key, value in bound.state_by_name()[name].items())
        assert same == (index != 2)


def test_no_optimizer_leaves_mean_gradients() -> None:
    module = make_module()
    params = list(module.parameters())
    windows = random_windows(module, 3, steps=2)
    bound = bind(None, module, asynchronous=False)
    kept = torch.randn_like(params[0])
    params[0].grad = kept.clone()
    run_windows(bound, params, windows[:1])
    means = [sum(grads[1:], grads[0].clone()) / 3 for grads in zip(*windows[0], strict=True)]
    assert torch.equal(params[0].grad, kept + means[0])
    for param, mean in zip(params[1:], means[1:], strict=True):
        assert torch.equal(param.grad, mean)
    for param in params:
        param.grad = None
    run_windows(bound, params, windows[1:], divisor=1)
    for param, *grads in zip(params, *windows[1], strict=True):
        assert torch.equal(param.grad, grads[0] + grads[1] + grads[2])
    with pytest.raises(ValueError, match="needs an optimizer"):
        bind(None, module)


@pytest.mark.parametrize("cls", [AdamW, Lion, make_muon, torch.optim.AdamW])
def test_backward_of_an_older_forward_runs_on_the_new_weights(cls: Any) -> None:
    module = make_module()
    params = list(module.parameters())
    bound = bind(cls(params, lr=0.1), module)
    x = torch.randn(4, 37, requires_grad=True)
    loss = module(x).square().sum()
    versions = [param._version for param in params]
    run_windows(bound, params, random_windows(module, 1, steps=1))
    assert [param._version for param in params] == versions
    loss.backward()  # stock autograd accepts it
    assert x.grad is not None
    loss = module(x).square().sum()
    with torch.no_grad():
        params[0].add_(1.0)  # and still catches the user's own mistake
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("cls", [AdamW, NAdam, SGD, Lion, make_muon, torch.optim.AdamW, torch.optim.Adagrad])
def test_stepping_oneself_is_refused(cls: Any) -> None:
    module = make_module()
    optimizer = cls(module.parameters())
    bound = bind(optimizer, module)
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(OptimizerOwnedError, match=r"the schedule owns the optimizer step.*lr_scheduler"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(module.parameters(), before, strict=True))
    run_windows(bound, list(module.parameters()), random_windows(module, 1, steps=1))
    with pytest.raises(OptimizerOwnedError):
        optimizer.step()


def test_native_optimizers_do_not_step_unbound_and_torch_ones_do_again() -> None:
    module = make_module()
    with pytest.raises(OptimizerOwnedError, match="cannot step by itself: pass it to a schedule"):
        AdamW(module.parameters()).step()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    bind(optimizer, module).unbind()
    weight = module[0].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, before - 1.0)


def test_state_of_a_torch_optimizer_goes_where_its_parameter_is() -> None:
    """A checkpoint is read on the CPU, whatever the device of the parameters; the meta device stands in for a GPU."""
    param, there = nn.Parameter(torch.empty(3, device="meta")), torch.zeros(3)
    assert _placed("exp_avg", there, param, {}).device.type == "meta"
    assert _placed("step", torch.tensor(4.0), param, {"fused": None, "capturable": False}) == 4.0
    for option in ("fused", "capturable"):
        assert _placed("step", torch.tensor(4.0), param, {option: True}).device.type == "meta"
    assert _placed("momentum_buffer", None, param, {}) is None
    copied = _placed("exp_avg", there, nn.Parameter(torch.empty(3)), {})
    assert torch.equal(copied, there) and copied.data_ptr() != there.data_ptr()


def test_groups_have_their_own_options_and_dtypes_their_own_buffers() -> None:
    module = make_module()
    module[2].to(torch.bfloat16)
    params = dict(module.named_parameters())
    decay = [param for param in params.values() if param.dim() > 1]
    rest = [param for param in params.values() if param.dim() == 1]
    optimizer = SGD([{"params": decay, "weight_decay": 0.5}, {"params": rest, "lr": 0.0}], lr=1.0)
    bound = bind(optimizer, module)
    assert [group.names for group in bound.groups] == [
        ("0.weight",), ("2.weight",), ("0.bias", "1.weight", "1.bias"), ("2.bias",),
    ]  # fmt: skip
    before = {name: param.detach().clone() for name, param in params.items()}
    run_windows(bound, list(params.values()), [[[torch.zeros_like(param) for param in params.values()]]])
    for name, param in params.items():
        assert torch.equal(param, before[name] * 0.5 if param.dim() > 1 else before[name])


@pytest.mark.parametrize(
    ("make", "dtype", "way"),
    [
        (make, dtype, way)
        for make in (AdamW, NAdam, Lion, make_muon, momentum_sgd, SGD, torch.optim.AdamW)
        for dtype in (torch.float32, torch.bfloat16)
        for way in ("by_name", "before_binding", "after_binding")
        # What torch's own load_state_dict does with bf16 parameters is not ours to test.
        if make is not torch.optim.AdamW or dtype is torch.float32 or way == "by_name"
    ],
)
def test_saved_state_continues_bit_for_bit(make: Any, dtype: torch.dtype, way: str) -> None:
    module = make_module(dtype)
    optimizer = make(module.parameters())
    bound = bind(optimizer, module)
    first, second = random_windows(module, 2, steps=3), random_windows(module, 2, steps=3)
    run_windows(bound, list(module.parameters()), first)
    resumed = make_module(dtype)
    resumed.load_state_dict(module.state_dict())
    fresh = make(resumed.parameters())
    if way == "before_binding":
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    bound_fresh = bind(fresh, resumed)
    if way == "after_binding":
        run_windows(bound_fresh, list(resumed.parameters()), random_windows(module, 1, steps=2))
        resumed.load_state_dict(module.state_dict())
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if way == "by_name":
        bound_fresh.load_state_by_name(bound.state_by_name())
    run_windows(bound, list(module.parameters()), second)
    run_windows(bound_fresh, list(resumed.parameters()), second)
    for param, target in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(param, target)
        for key, value in optimizer.state[target].items():
            assert torch.equal(fresh.state[param][key], value)


def test_state_by_name_copies_and_checks() -> None:
    module = make_module()
    bound = bind(AdamW(module.parameters()), module)
    names = [name for name, _ in module.named_parameters()]
    assert bound.state_by_name() == {name: {} for name in names}
    run_windows(bound, list(module.parameters()), random_windows(module, 1, steps=1))
    state = bound.state_by_name()
    assert set(state["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["0.weight"]["exp_avg"].shape == (50, 37)
    shared = bound.state_by_name(copy=False)
    run_windows(bound, list(module.parameters()), random_windows(module, 1, steps=1))
    assert state["0.weight"]["step"].item() == 1
    assert shared["0.weight"]["step"].item() == 2
    with pytest.raises(ValueError, match=r"missing 2\.bias; unexpected other"):
        bound.load_state_by_name({**{name: state[name] for name in names[:-1]}, "other": {}})
    with pytest.raises(ValueError, match=r"'0\.weight' has \['momentum_buffer'\], but AdamW keeps"):
        bound.load_state_by_name({**state, "0.weight": {"momentum_buffer": torch.zeros(50, 37)}})
    with pytest.raises(ValueError, match=r"'exp_avg' of '0\.weight' has shape \(2,\)"):
        bound.load_state_by_name({**state, "0.weight": {**state["0.weight"], "exp_avg": torch.zeros(2)}})
    bound.load_state_by_name({name: {} for name in names})
    assert bound.state_by_name() == {name: {} for name in names}


def test_update_statistics() -> None:
    module = make_module()
    params = list(module.parameters())
    bound = bind(SGD(params, lr=0.0), module)
    windows = random_windows(module, 4, steps=1)
    for micro_batch in windows[0]:
        for param, grad in zip(params, micro_batch, strict=True):
            bound.accumulate(param, grad)
    stats = bound.update(4)
    means = [sum(grads[1:], grads[0].clone()) / 4 for grads in zip(*windows[0], strict=True)]
    expected = math.sqrt(sum(mean.double().square().sum().item() for mean in means))
    # The norm is taken of the sum before the division, which rounds each element of the mean by 2^-24 at most.
    assert stats.grad_norm == pytest.approx(expected, rel=2.0**-23)
    assert stats.nonfinite == 0
    bound.accumulate(params[0], torch.full_like(params[0], math.nan))
    assert bound.update(1).nonfinite == params[0].numel()
    assert bound.update(1).grad_norm == 0.0  # a window in which nothing arrived


@pytest.mark.parametrize("buffers", [1, 2])
def test_memory_to_the_byte(buffers: int) -> None:
    module = nn.Linear(32, 32, bias=False).bfloat16()
    frozen = nn.Parameter(torch.zeros(10), requires_grad=False)
    named = {"w": module.weight, "frozen": frozen}
    bound = bind_optimizer(AdamW([module.weight, frozen]), named, buffers=buffers)
    assert bound.memory == {
        "weights": 1024 * 2 + 40,
        "masters": 1024 * 4,
        "optimizer": 1024 * 8 + 4,
        "accumulators": 1024 * 4 * buffers,
    }
    plain = nn.Linear(32, 32, bias=False)
    bound = bind(torch.optim.SGD(plain.parameters(), momentum=0.9), plain)
    assert bound.memory["optimizer"] == 0
    run_windows(bound, [plain.weight], random_windows(plain, 1, steps=1))
    assert bound.memory["optimizer"] == 1024 * 4


def test_mismatched_parameters_are_named() -> None:
    module, other = make_module(), make_module()
    with pytest.raises(ValueError, match=r"misses trainable parameters of this stage: 2\.weight, 2\.bias"):
        bind(AdamW([*module[0].parameters(), *module[1].parameters()]), module)
    with pytest.raises(ValueError, match=r"not in this stage: group 0 parameter 6 of shape \(50, 37\)"):
        bind(AdamW([*module.parameters(), other[0].weight]), module)
    follower = nn.Parameter(torch.zeros(3))
    bound = bind(AdamW([*module.parameters(), follower]), module, ignored=[follower])
    with pytest.raises(ValueError, match=r"shape \(3,\) is not among the 6"):
        bound.accumulate(follower, torch.zeros(3))
    with pytest.raises(ValueError, match="divisor=0"):
        bound.update(0)


def test_an_optimizer_can_move_to_another_schedule() -> None:
    for cls in (AdamW, torch.optim.AdamW):
        module = make_module()
        optimizer, params = cls(module.parameters()), list(module.parameters())
        first = bind(optimizer, module)
        run_windows(first, params, random_windows(module, 1, steps=1))
        second = bind(optimizer, module)
        run_windows(second, params, random_windows(module, 1, steps=1))
        assert optimizer.state[params[0]]["step"].item() == 2
        with pytest.raises(StageError, match="use only the newest"):
            first.update(1)


class NeedsTwo(torch.optim.SGD):
    def step(self, loss: Any, closure: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError


@pytest.mark.parametrize(("optimizer", "needs"), [(torch.optim.LBFGS, "closure"), (NeedsTwo, "loss")])
def test_an_optimizer_whose_step_needs_something_is_refused(optimizer: Any, needs: str) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"{optimizer.__name__}.step\\(\\) needs a {needs}"):
        bind_optimizer(optimizer(module.parameters(), lr=0.1), dict(module.named_parameters()))
