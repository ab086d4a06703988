"""Backwards in two halves: bits of the unsplit one, and layers that are left alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.errors import StageError
from paci_rt.optim.stage_optimizer import GradSink
from paci_rt.runtime.linear_layers import find_layers
from support.split_modules import MODULES, WIDTH, batches, loss_fn, modules_of


def plain_training(modules: list[nn.Module], parts: int) -> list[Tensor]:
    """A gradient-accumulation loop without any of this package."""
    params = [param for module in modules for param in module.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.05)
    for x, y in batches():
        for part, target in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            output = modules[1](modules[0](part))
            loss_fn(output, target).backward()
        for param in params:
            if param.grad is not None:
                param.grad /= parts
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in params]


def pipeline(modules: list[nn.Module], schedule: str, parts: int, **options: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=parts,
        loss_fn=loss_fn,
        optimizer=lambda params: torch.optim.SGD([param for _, param in params], lr=0.05),
        **options,
    )


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_gradients_have_the_bits_of_the_unsplit_backward(name: str, schedule: str) -> None:
    torch._dynamo.reset()
    expected = plain_training(modules_of(name), 4)
    modules = modules_of(name)
    pipe = pipeline(modules, schedule, 4)
    inner = [layer.removeprefix("inner.").replace("_orig_mod.", "") for layer in pipe.stages[0].split_layers]
    assert inner == MODULES[name][1]
    for x, y in batches():
        pipe.step(x, target=y)
    pipe.close()
    trained = [param for module in modules for param in module.parameters() if param.requires_grad]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained, expected, strict=True))


def test_long_micro_batches_keep_the_bits_too() -> None:
    """Beyond the BLAS's own block of rows, one pass and two differ: the second is taken then."""
    results = []
    for split in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(8, 8)
        x, y = torch.randn(2 * 1000, 8), torch.randn(2 * 1000, 8)
        if split:
            pipe = paci_rt.LocalPipeline([module], schedule="1f1b", n_microbatches=2, loss_fn=loss_fn, optimizer=None)
            pipe.step(x, target=y)
            results.append(module.weight.grad)
        else:
            for part, target in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
                loss_fn(module(part), target).backward()
            results.append(module.weight.grad / 2)  # type: ignore[operator]
    assert torch.equal(*results)  # type: ignore[arg-type]


def test_bf16_gradients_have_the_bits_of_the_unsplit_backward() -> None:
    torch.manual_seed(0)
    split, whole = nn.Linear(WIDTH, WIDTH).bfloat16(), nn.Linear(WIDTH, WIDTH).bfloat16()
    whole.load_state_dict(split.state_dict())
    x, y = torch.randn(8, WIDTH).bfloat16(), torch.randn(8, WIDTH).bfloat16()
    pipe = paci_rt.LocalPipeline([split], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=None)
    pipe.step(x, target=y)
    loss_fn(whole(x), y).backward()
    assert torch.equal(split.weight.grad, whole.weight.grad) and torch.equal(split.bias.grad, whole.bias.grad)  # type: ignore[arg-type]


def test_the_weight_gradient_makes_no_grad_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(WIDTH, WIDTH)
    pipe = paci_rt.LocalPipeline(
        [module], n_microbatches=1, loss_fn=loss_fn, optimizer=lambda params: paci_rt.AdamW([p for _, p in params])
    )
    seen: list[Tensor] = []
    monkeypatch.setattr(GradSink, "accumulate", lambda sink, param, grad: seen.append(param))
    pipe.step(torch.randn(4, WIDTH), target=torch.randn(4, WIDTH))
    assert not seen and module.weight.grad is None


def test_i_leaves_the_weight_gradient_to_w() -> None:
    stage = paci_rt.PipelineStage(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)), 1, 2)
    sums: dict[int, Tensor] = {}

    class Sums:
        def __init__(self, param: nn.Parameter) -> None:
            self.param = param

        def add(self, index: int, grad: Tensor) -> None:
            sums[id(self.param)] = sums.get(id(self.param), torch.zeros_like(grad)) + grad

        def add_product(self, index: int, left: Tensor, right: Tensor, bias: tuple[Sums, int] | None) -> None:
            self.add(index, left @ right)
            if bias is not None:
                bias[0].add(bias[1], left.sum(1))

    class Sink(GradSink):
        def place(self, param: nn.Parameter) -> tuple[Any, int]:
            return Sums(param), 0

        def flush(self) -> None:
            pass

        def before_layer(self, param: nn.Parameter) -> None:
            pass

        def set_layer_order(self, layers: object) -> None:
            pass

    stage.attach(Sink())
    x = torch.randn(4, WIDTH, requires_grad=True)
    stage.forward(0, (x,), {}, lambda output: output.square().mean())
    message = stage.backward(0, (), split=True)
    linear, norm = stage.submod[0], stage.submod[1]  # type: ignore[index]
    assert message.tensors[0] is not None and set(sums) == {id(norm.weight), id(norm.bias)}
    # Its input, and the gradient of its output: 4 x WIDTH fp32 each.
    assert stage.pending_bytes(0) == 2 * 4 * WIDTH * 4
    stage.weight_gradients(0)
    assert set(sums) == {id(param) for param in stage.parameters()}
    stage.detach()
    x.grad = None
    stage.submod(x).square().mean().backward()
    assert torch.equal(message.tensors[0], x.grad) and torch.equal(sums[id(linear.weight)], linear.weight.grad)


def test_layers_are_given_back() -> None:
    modules = modules_of("linear")
    pipe = pipeline(modules, "zb-h1", 2)
    assert "forward" in modules[0].inner[0].__dict__  # type: ignore[index,union-attr]
    pipe.close()
    assert all("forward" not in part.__dict__ for module in modules for part in module.modules())


def test_copies_and_pickles_of_an_attached_module_compute_as_usual() -> None:
    modules = modules_of("linear")
    pipe = pipeline(modules, "1f1b", 2)
    twin = copy.deepcopy(modules[0])
    buffer = io.BytesIO()
    torch.save(modules[0], buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(2, WIDTH)
    for other in (twin, loaded):
        assert other.inner[0].forward.module is other.inner[0]  # type: ignore[union-attr,index]
        other(x).sum().backward()
        assert other.inner[0].weight.grad is not None  # type: ignore[union-attr,index]
    pipe.close()


def test_a_backward_of_the_users_own_gets_all_gradients() -> None:
    """A gradient penalty differentiates through the layer inside the loss."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.penalty = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            y = self.linear(x).square()
            (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return y + grad.square()

    torch.manual_seed(0)
    split, whole = Penalised(), Penalised()
    whole.load_state_dict(split.state_dict())
    x, y = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    pipe = paci_rt.LocalPipeline([split], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=None)
    pipe.step(x, target=y)
    loss_fn(whole(x), y).backward()
    ours, theirs = split.linear.weight.grad, whole.linear.weight.grad
    assert ours is not None and theirs is not None
    # The two parts of the gradient are summed in another order: a few units in the last place of fp32.
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_layers_with_hooks_on_their_weight_are_left_to_autograd() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    seen: list[Tensor] = []
    module[0].weight.register_hook(seen.append)
    pipe = paci_rt.LocalPipeline([module], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=None)
    assert pipe.stages[0].split_layers == ["1"]
    pipe.step(torch.randn(4, WIDTH), target=torch.randn(4, WIDTH))
    assert len(seen) == 1 and torch.equal(seen[0], module[0].weight.grad)  # type: ignore[arg-type]


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert [name for name, _ in find_layers(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)))] == ["1"]


def test_writing_into_an_input_between_i_and_w_names_the_layer() -> None:
    class Reuses(nn.Module):
        """Copies every micro-batch into the same buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("work", torch.zeros(2, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            self.work.copy_(x.detach())  # type: ignore[operator]
            return self.linear(self.work)  # type: ignore[no-any-return]

    modules = [nn.Linear(WIDTH, WIDTH), Reuses()]
    pipe = pipeline(modules, "zb-h1", 4)
    with pytest.raises(StageError, match=r"'linear' was modified in place between I and W"):
        pipe.step(torch.randn(8, WIDTH), target=torch.randn(8, WIDTH))


def test_autocast_is_left_to_autograd() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x).float()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    split, whole = Cast(), Cast()
    whole.load_state_dict(split.state_dict())
    x, y = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    pipe = paci_rt.LocalPipeline([split], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=None)
    pipe.step(x, target=y)
    loss_fn(whole(x), y).backward()
    assert torch.equal(split.linear.weight.grad, whole.linear.weight.grad)  # type: ignore[arg-type]
