"""Parameters as views of one flat buffer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paci_rt.errors import StageError
from paci_rt.optim.flat import FlatGroup


def make_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_keep_everything_but_their_storage(dtype: torch.dtype) -> None:
    module = make_module(dtype)
    x = torch.randn(4, 5, dtype=dtype)
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    identities = [id(param) for param in module.parameters()]
    expected = module(x)
    group = FlatGroup(list(module.named_parameters()))
    assert [id(param) for param in module.parameters()] == identities
    for name, param in module.named_parameters():
        assert torch.equal(param, before[name])
        assert param.requires_grad
        assert param.is_leaf
        assert param.dtype == dtype
    assert torch.equal(module(x), expected)
    group.check_views()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_is_aligned_padded_with_zeros_and_shared(dtype: torch.dtype) -> None:
    module = make_module(dtype)
    group = FlatGroup(list(module.named_parameters()))
    used = torch.zeros(group.numel, dtype=torch.bool)
    for position, param in enumerate(group.params):
        offset, numel = group.offsets[position], group.numels[position]
        assert param.data_ptr() == group.weight.data_ptr() + offset * dtype.itemsize
        assert param.data_ptr() % 64 == 0
        assert group.index[id(param)] == position
        assert not used[offset : offset + numel].any()
        used[offset : offset + numel] = True
    assert not group.weight[~used].any()
    group.weight.fill_(3.0)
    assert all(bool((param == 3.0).all()) for param in module.parameters())


def test_permuted_parameters_keep_their_values() -> None:
    values = torch.randn(3, 4)
    param = nn.Parameter(values.t())
    assert not param.is_contiguous()
    FlatGroup([("w", param)])
    assert torch.equal(param, values.t())


def test_scalars_and_empty_parameters_fit_in() -> None:
    named = [("scale", nn.Parameter(torch.tensor(2.5))), ("none", nn.Parameter(torch.empty(0, 3)))]
    named.append(("w", nn.Parameter(torch.ones(2))))
    group = FlatGroup(named)
    assert group.numels == (1, 0, 2)
    assert group.params[0].shape == ()
    assert group.params[0].item() == 2.5
    group.check_views()


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64)])
def test_a_moved_parameter_is_named(move) -> None:
    module = make_module()
    group = FlatGroup(list(module.named_parameters()))
    move(module)
    with pytest.raises(StageError, match=r"'0\.weight' no longer lives in the schedule's flat buffer"):
        group.check_views()


def test_loading_in_place_keeps_the_views() -> None:
    module, other = make_module(), make_module()
    group = FlatGroup(list(module.named_parameters()))
    module.load_state_dict(other.state_dict())
    group.check_views()
    assert torch.equal(group.view(group.weight, 0), other[0].weight)


def test_a_second_group_takes_over_and_the_first_notices() -> None:
    module = make_module()
    first = FlatGroup(list(module.named_parameters()))
    second = FlatGroup(list(module.named_parameters()))
    second.check_views()
    with pytest.raises(StageError, match="use only the newest"):
        first.check_views()


def test_refused_groups() -> None:
    fp32, fp8 = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).to(torch.float8_e5m2))
    with pytest.raises(ValueError, match="at least one parameter"):
        FlatGroup([])
    with pytest.raises(ValueError, match="listed twice"):
        FlatGroup([("a", fp32), ("b", fp32)])
    with pytest.raises(ValueError, match=r"'b' has dtype torch\.float8_e5m2: use torch\.float32"):
        FlatGroup([("b", fp8)])
    with pytest.raises(ValueError, match=r"'half' is torch\.float16"):
        FlatGroup([("a", fp32), ("half", nn.Parameter(torch.zeros(2, dtype=torch.float16)))])
    with pytest.raises(ValueError, match="'m' is on meta"):
        FlatGroup([("m", nn.Parameter(torch.zeros(2, device="meta")))])
