"""Linear calls that are no modules: bits of the unsplit backward, W apart from I, and calls that are left alone."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.pipelining import SplitPoint, pipeline

import paci_rt
from support.functional_modules import FUNCTIONAL, Calls, matrix
from support.split_modules import MODULES, ROWS, WIDTH, Anchor, batches, loss_fn

Options = dict[str, Any]


def plain_training(modules: list[nn.Module], parts: int) -> list[Tensor]:
    """A gradient-accumulation loop without any of this package."""
    params = [param for module in modules for param in module.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.05)
    for x, y in batches():
        for part, target in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            for module in modules:
                part = module(part)
            loss_fn(part, target).backward()
        for param in params:
            if param.grad is not None:
                param.grad /= parts
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in params]


def local(modules: list[nn.Module], schedule: str = "zb-h1", **options: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=4,
        loss_fn=loss_fn,
        optimizer=lambda params: torch.optim.SGD([param for _, param in params], lr=0.05),
        **options,
    )


def two(make: Any) -> list[nn.Module]:
    torch.manual_seed(7)
    return [Anchor(make()), Anchor(make())]


def weights_split(pipe: paci_rt.LocalPipeline) -> list[str]:
    return [name.removeprefix("inner").removeprefix(".") for name in pipe.stages[0].split_layers]


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_gradients_have_the_bits_of_the_unsplit_backward(name: str, schedule: str) -> None:
    make, expected = FUNCTIONAL[name]
    plain = plain_training(two(make), 4)
    modules = two(make)
    pipe = local(modules, schedule)
    for x, y in batches():
        pipe.step(x, target=y)
    assert weights_split(pipe) == expected
    pipe.close()
    trained = [param for module in modules for param in module.parameters() if param.requires_grad]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, plain, strict=True))


def traced(modules: list[nn.Module]) -> list[nn.Module]:
    """Stages of torch's frontend."""
    whole = nn.Sequential(*modules)
    pipe = pipeline(whole, mb_args=(torch.randn(ROWS // 4, 5, WIDTH),), split_spec={"1": SplitPoint.BEGINNING})
    return [pipe.get_stage_module(at) for at in range(2)]


EXPORTED = {
    "linear": ["0", "2"],
    "no bias": ["0"],
    "conv1d": ["0", "2"],
    "used three times": ["linear"],
    "attention": ["attention.in_proj_weight", "attention.out_proj"],
    "tied to an embedding": ["embedding"],
}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_traced_stages_are_split(name: str, schedule: str) -> None:
    plain = traced(two(MODULES[name][0]))
    expected = plain_training(plain, 4)
    modules = traced(two(MODULES[name][0]))
    pipe = local(modules, schedule)
    found = [one.split("inner.")[-1] for one in pipe.stages[0].split_layers]
    assert sorted(found) in (sorted(EXPORTED[name]), ["head"]) and found
    for x, y in batches():
        pipe.step(x, target=y)
    pipe.close()
    trained = [param for module in modules for param in module.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, expected, strict=True))


class Symbolic(nn.Module):
    """For ``torch.fx``: layers stay modules, functions are nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(WIDTH, WIDTH), matrix()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.layer(x)), self.weight) @ self.weight


def test_symbolically_traced_modules_are_split() -> None:
    def make() -> list[nn.Module]:
        torch.manual_seed(5)
        return [fx.symbolic_trace(Symbolic()) for _ in range(2)]

    expected = plain_training(make(), 4)
    modules = make()
    pipe = local(modules)
    assert pipe.stages[0].split_layers == ["layer", "weight"]
    for x, y in batches():
        pipe.step(x, target=y)
    pipe.close()
    trained = [param for module in modules for param in module.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, expected, strict=True))


@pytest.mark.parametrize("kind", ["traced", "by hand"])
def test_w_has_work_of_its_own(kind: str) -> None:
    """Between I and W the input of the call and the gradient of its output are kept, and W empties that."""
    modules = traced(two(MODULES["linear"][0])) if kind == "traced" else two(FUNCTIONAL["F.linear"][0])
    pipe = local(modules, buffers=1)
    (x, y), stage = batches()[0], pipe.stages[0]
    sizes: list[int] = []
    inner = stage.weight_gradients
    stage.weight_gradients = lambda m: (sizes.append(stage.pending_bytes(m)), inner(m))[1]  # type: ignore[method-assign,func-returns-value]
    pipe.step(x, target=y)
    assert len(sizes) == 4 and min(sizes) >= 2 * 4 * (ROWS // 4) * 5 * WIDTH
    pipe.close()


@pytest.mark.parametrize("kind", ["traced", "by hand"])
def test_modules_are_given_back_and_copies_compute_as_usual(kind: str) -> None:
    modules = traced(two(MODULES["linear"][0])) if kind == "traced" else two(FUNCTIONAL["nested"][0])
    before = [type(part).forward for module in modules for part in module.modules()]
    pipe = local(modules)
    pipe.step(*batches()[0][:1], target=batches()[0][1])
    twin = copy.deepcopy(modules[0])
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected = modules[0](x)
    assert torch.equal(twin(x), expected)
    twin(x).sum().backward()
    assert (
        twin.inner.layer.weight.grad is not None
        if kind == "by hand"
        else twin.get_parameter("0.scale").grad is not None
    )  # type: ignore[union-attr]
    pipe.close()
    after = [type(part).forward for module in modules for part in module.modules()]
    assert before == after
    assert not any("forward" in part.__dict__ for module in modules for part in module.modules())


def test_pickles_of_an_attached_hand_written_module_compute_as_usual() -> None:
    torch.manual_seed(0)
    module = LowRankOnly()
    pipe = local([module, nn.Linear(WIDTH, WIDTH)])
    loaded = pickle.load(io.BytesIO(pickle.dumps(module)))
    x = torch.randn(2, WIDTH)
    assert torch.equal(loaded(x), module(x))
    pipe.close()


class LowRankOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_compiled_function_within_a_scope_is_left_to_autograd() -> None:
    torch._dynamo.reset()

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = matrix(), matrix()
            self.run = torch.compile(lambda x: torch.tanh(F.linear(x, self.one)), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.run(x), self.two)

    expected = plain_training(two(Compiled), 4)
    modules = two(Compiled)
    pipe = local(modules)
    for x, y in batches():
        pipe.step(x, target=y)
    pipe.close()
    trained = [param for module in modules for param in module.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, expected, strict=True))


def test_a_scope_without_calls_is_looked_at_once() -> None:
    looked: list[str] = []

    def how(self: Any, x: Tensor) -> Tensor:
        if torch.overrides._get_current_function_mode() is not None:
            looked.append("by the mode")
        return x * self.one.sum(0)

    pipe = local([Calls(how), nn.Linear(WIDTH, WIDTH)])
    for x, y in batches():
        pipe.step(x, target=y)
    assert looked == ["by the mode"]
    pipe.close()


def test_evaluation_and_other_uses_run_as_before() -> None:
    torch.manual_seed(0)
    module = FUNCTIONAL["F.linear"][0]()
    x, y = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    expected = torch.cat([module(part) for part in x.tensor_split(4)])  # a product of other rows may round otherwise
    pipe = local([module])
    assert torch.equal(pipe.eval(x, target=y), expected)
    module(x).sum().backward()  # not the schedule's: gradients go where they always go
    assert module.one.grad is not None
    pipe.close()
