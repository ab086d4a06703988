"""Hooks on parameters and modules, registered before and after the schedule was made, torch beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook

import paci_rt
from support.changing import STEPS, Change, adamw, batch, loss_fn, make_stages, pipelined, plain
from support.plain import same

Register = Callable[[list[nn.Module], Callable[..., None]], None]


def on_parameter(stages: Any, note: Any) -> None:
    """Of a split layer's weight, a split layer's bias and a layer norm."""

    def double(grad: Tensor) -> Tensor:
        note(grad)
        return grad * 2

    for param in (stages[0][0].weight, stages[1][2].bias, stages[0][2].weight):
        param.register_hook(double)


def after_accumulation(stages: Any, note: Any) -> None:
    """Halves what has been summed so far, at every micro-batch."""

    def halve(param: Tensor) -> None:
        note(param.grad)
        assert param.grad is not None
        param.grad.mul_(0.5)

    for param in (stages[0][0].weight, stages[1][2].bias, stages[0][2].weight):
        param.register_post_accumulate_grad_hook(halve)


def on_node(stages: Any, note: Any) -> None:
    """As data-parallel wrappers do it."""
    for param in (stages[0][0].weight, stages[1][2].bias, stages[0][2].weight):
        node = get_gradient_edge(param).node
        node.register_hook(lambda *_, param=param: note(param.grad))
        stages[0].kept = [*getattr(stages[0], "kept", []), node]


def on_several(stages: Any, note: Any) -> None:
    register_multi_grad_hook(
        [stages[1][0].weight, stages[1][2].weight], lambda grads: note(*(grad for grad in grads if grad is not None))
    )


def both_kinds(stages: Any, note: Any) -> None:
    on_parameter(stages, note)
    after_accumulation(stages, note)


def clears(stages: Any, note: Any) -> None:
    """Takes the gradient away: an optimizer inside the backward does so."""

    def clear(param: Tensor) -> None:
        note(param.grad)
        param.grad = None

    stages[0][0].weight.register_post_accumulate_grad_hook(clear)
    stages[0][2].weight.register_post_accumulate_grad_hook(clear)


def full_backward(stages: Any, note: Any) -> None:
    def double(module: nn.Module, grads_in: Any, grads_out: Any) -> Any:
        note(*(grad for grad in (*grads_in, *grads_out) if grad is not None))
        return tuple(None if grad is None else grad * 2 for grad in grads_in)

    stages[1][0].register_full_backward_hook(double)
    stages[0][2].register_full_backward_hook(double)


def backward_pre(stages: Any, note: Any) -> None:
    def double(module: nn.Module, grads_out: Any) -> Any:
        note(*grads_out)
        return tuple(grad * 2 for grad in grads_out)

    stages[1][0].register_full_backward_pre_hook(double)
    stages[1].register_full_backward_pre_hook(double)


def forwards(stages: Any, note: Any) -> None:
    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        note(output.detach())
        return output * 1.5

    stages[0][0].register_forward_hook(scale)
    stages[1][2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


REGISTERS = [
    on_parameter,
    after_accumulation,
    on_node,
    on_several,
    both_kinds,
    clears,
    full_backward,
    backward_pre,
    forwards,
]


def noting(register: Register, at_step: int) -> tuple[Change, list[Tensor]]:
    noted: list[Tensor] = []

    def note(*tensors: Tensor) -> None:
        noted.extend(tensor.detach().clone() for tensor in tensors)

    def change(step: int, stages: Any, optimizers: Any) -> None:
        if step == at_step:
            register(stages, note)

    return change, noted


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("at_step", [-1, 0, 2], ids=["before", "at once", "late"])
@pytest.mark.parametrize("register", REGISTERS, ids=lambda register: register.__name__)
def test_hooks_see_and_change_what_they_do_in_torch(register: Register, at_step: int, schedule: str) -> None:
    change, seen = noting(register, at_step)
    there, expected = noting(register, at_step)
    same(
        pipelined(change, schedule, before=lambda stages: change(-1, stages, [])),
        plain(there, before=lambda stages: there(-1, stages, [])),
    )
    assert seen and len(seen) == len(expected)
    # Stages take turns in another order than the uncut model, each stage for itself in the same.
    for tensor in expected:
        assert any(tensor.shape == other.shape and torch.equal(tensor, other) for other in seen)


def test_a_hook_that_comes_in_the_middle_of_a_window_sees_its_sum() -> None:
    """Registered by the loss of the third micro-batch of four."""

    def train(run: Callable[[list[nn.Module], Callable[[Tensor, Tensor], Tensor]], None]) -> Any:
        stages, seen, count = make_stages(), [], 0

        def loss(output: Tensor, target: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if count == 3:
                for param in (stages[1][2].weight, stages[0][2].bias):  # type: ignore[index]
                    param.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
            return loss_fn(output, target)

        run(stages, loss)
        grads = {f"{at}.{name}": p.grad for at, s in enumerate(stages) for name, p in s.named_parameters()}
        return grads, seen

    x, y = batch(0)

    def ours(stages: list[nn.Module], loss: Any) -> None:
        pipe = paci_rt.LocalPipeline(
            stages, schedule="1f1b", n_microbatches=4, loss_fn=loss, optimizer=None, scale_grads=False
        )
        pipe.step(x, target=y)

    def torch_alone(stages: list[nn.Module], loss: Any) -> None:
        for x_part, y_part in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            loss(stages[1](stages[0](x_part)), y_part).backward()

    (grads, seen), (expected_grads, expected) = train(ours), train(torch_alone)
    same(grads, expected_grads)
    last = [tensor for tensor in expected if tensor.dim() == 2]
    assert [tensor.tolist() for tensor in seen if tensor.dim() == 2] == [tensor.tolist() for tensor in last]
    assert torch.equal(seen[-1], expected[-1]) and len(last) == 2


def test_hooks_may_go_again() -> None:
    def halving(step: int, stages: Any, optimizers: Any) -> None:
        if step == 1:

            def halve(param: Tensor) -> None:
                param.grad.mul_(0.5)  # type: ignore[union-attr]

            stages[0].handles = [
                stages[0][0].weight.register_post_accumulate_grad_hook(halve),
                stages[0][2].weight.register_hook(lambda grad: grad * 3),
            ]
        if step == 3:
            for handle in stages[0].handles:
                handle.remove()

    same(pipelined(halving), plain(halving))


@pytest.mark.parametrize("policy", ["bounded", "stash", "recompute"])
def test_under_paci_a_hook_that_only_looks_changes_nothing(policy: str) -> None:
    """It comes while micro-batches are in flight whose layers were split."""
    looked: list[Tensor] = []

    def look(step: int, stages: Any, optimizers: Any) -> None:
        if step == 2:
            for stage in stages:
                for param in stage.parameters():
                    param.register_post_accumulate_grad_hook(lambda param: looked.append(param.grad.clone()))
                    param.register_hook(lambda grad: looked.append(grad.clone()))

    # Of AdamW with fp32 parameters, whose sums have the same bits in .grad and in the accumulator.
    with_hooks = pipelined(look, "paci", policy=policy)
    same(with_hooks, pipelined(lambda *_: None, "paci", policy=policy))
    assert len(looked) >= (STEPS - 2) * 4 * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", [lambda stage: stage, lambda stage: stage[0], lambda stage: stage[2]])
def test_hooks_on_nodes_of_autograd_are_refused(place: Any, when: str) -> None:
    stages = make_stages()

    def register() -> None:
        place(stages[1]).register_backward_hook(lambda *_: None)

    def make() -> Any:
        return paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=2, loss_fn=loss_fn, optimizer=adamw)

    match = r"of stage 1 has a hook of register_backward_hook\(\).*use register_full_backward_hook"
    if when == "before":
        register()
        with pytest.raises(paci_rt.StageError, match=match):
            make()
        return
    pipe = make()
    register()
    x, y = batch(0)
    with pytest.raises(paci_rt.StageError, match=match):
        pipe.step(x, target=y)


def test_a_hook_that_drops_a_sum_is_named() -> None:
    stages = make_stages()
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=4, loss_fn=loss_fn, optimizer=adamw)
    count = 0

    def every_second(param: Tensor) -> None:
        nonlocal count
        count += 1
        if count % 2 == 0:
            param.grad = None

    stages[0][0].weight.register_post_accumulate_grad_hook(every_second)  # type: ignore[index]
    x, y = batch(0)
    with pytest.raises(paci_rt.StageError, match=r"set the gradient of parameter '0\.weight' to None"):
        pipe.step(x, target=y)


def test_a_layer_may_be_called_with_its_input_by_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x)  # type: ignore[no-any-return]

    module = ByName()
    pipe = paci_rt.LocalPipeline([module], schedule="1f1b", n_microbatches=1, loss_fn=loss_fn)
    x = torch.randn(2, 4)
    pipe.step(x, target=x)
    ours = module.linear.weight.grad
    pipe.close()
    module.zero_grad()
    loss_fn(module(x), x).backward()
    assert ours is not None and torch.equal(ours, module.linear.weight.grad)  # type: ignore[arg-type]


def test_a_wrapper_around_a_split_layer_stays() -> None:
    """As accelerate puts one around ``forward``."""
    stages = make_stages()
    pipe = paci_rt.LocalPipeline(stages, schedule="1f1b", n_microbatches=1, loss_fn=loss_fn, optimizer=adamw)
    layer: Any = stages[0][0]  # type: ignore[index]
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)
    pipe.close()
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("make", [paci_rt.AdamW, paci_rt.SGD, torch.optim.AdamW])
def test_hooks_after_the_optimizers_step_see_the_new_weights(make: Any) -> None:
    """As a moving average of the weights is kept."""
    module = nn.Linear(4, 4)
    optimizer = make(module.parameters(), lr=0.1)
    seen: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(module.weight.detach().clone()))
    pipe = paci_rt.LocalPipeline([module], n_microbatches=2, loss_fn=loss_fn, optimizer=[optimizer])
    for step in range(3):
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
        assert len(seen) == step + 1 and torch.equal(seen[-1], module.weight)


@pytest.mark.parametrize("make", [paci_rt.AdamW, paci_rt.SGD, paci_rt.Lion])
def test_hooks_before_the_step_of_our_optimizers_are_refused(make: Any) -> None:
    optimizer = make(nn.Linear(4, 4).parameters(), lr=0.1)
    with pytest.raises(paci_rt.OptimizerOwnedError, match="register_step_post_hook"):
        optimizer.register_step_pre_hook(lambda *_: None)
