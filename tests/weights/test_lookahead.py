from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.action import Op
from paci_rt.clock import Done, HostClock
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.schedules import FAMILIES, Shape, policies
from paci_rt.weights.lookahead import LookAhead
from paci_rt.weights.scratch import ScratchWeights
from support.toy import make_muon

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda params: paci_rt.AdamW(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw, high beta1 share": lambda params: paci_rt.AdamW(params, lr=0.01, betas=(0.3, 0.9)),
    "adamw, maximize": lambda params: paci_rt.AdamW(params, lr=0.01, maximize=True),
    "nadam": lambda params: paci_rt.NAdam(params, lr=0.01, betas=(0.8, 0.95), momentum_decay=0.05, weight_decay=0.1),
    "nadam, maximize": lambda params: paci_rt.NAdam(params, lr=0.01, betas=(0.4, 0.95), maximize=True),
    "lion": lambda params: paci_rt.Lion(params, lr=0.01, weight_decay=0.1),
    "lion, maximize": lambda params: paci_rt.Lion(params, lr=0.01, betas=(0.5, 0.8), maximize=True),
    "muon": lambda params: make_muon(params, weight_decay=0.1),
    "muon, maximize": lambda params: make_muon(params, nesterov=False, momentum=0.8, maximize=True),
    "sgd": lambda params: paci_rt.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "sgd, nesterov": lambda params: paci_rt.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "sgd, dampening": lambda params: paci_rt.SGD(params, lr=0.01, momentum=0.9, dampening=0.5),
}
SHAPES = ((40, 70), (3,), (2500,))  # blocks, tails and a tiny one


def build(kind: str, dtype: torch.dtype, updates: int) -> StageOptimizer:
    """A bound optimizer with ``updates`` updates behind it; equal arguments give equal ones."""
    generator = torch.Generator().manual_seed(1)
    params = {
        str(at): nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for at, shape in enumerate(SHAPES)
    }
    bound = bind_optimizer(OPTIMIZERS[kind](params.values()), params)
    for number in range(updates):
        for param in bound.groups[0].params:
            bound.accumulate(param, gradient(param, 100 + number))
        bound.update(1)
    return bound


def gradient(param: Tensor, seed: int) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).to(param.dtype)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("ahead", [1, 3])
def test_ahead_are_the_bits_of_the_updates_themselves(kind: str, dtype: torch.dtype, updates: int, ahead: int) -> None:
    bound, twin = build(kind, dtype, updates), build(kind, dtype, updates)
    group, count = bound.groups[0], 3
    for seed in range(count):
        for param in group.params:
            bound.accumulate(param, gradient(param, seed))
    for _ in range(ahead):  # the twin takes the steps for real
        for seed in range(count):
            for param in twin.groups[0].params:
                twin.accumulate(param, gradient(param, seed))
        twin.update(count)
    before, state = group.weight.clone(), copy.deepcopy(bound.state_by_name())
    with LookAhead(bound, accumulation=count, divisor=count, shares=False).ahead(ahead, count):
        assert torch.equal(group.weight, twin.groups[0].weight)
        assert not torch.equal(group.weight, before)
    assert torch.equal(group.weight, before)
    for name, entry in bound.state_by_name().items():
        assert all(torch.equal(value, state[name][key]) for key, value in entry.items())
    master = bound.master(0)
    assert (master is None) == (dtype is torch.float32)
    bound.update(count)  # and the real update is not disturbed
    fresh = build(kind, dtype, updates)
    for seed in range(count):
        for param in fresh.groups[0].params:
            fresh.accumulate(param, gradient(param, seed))
    fresh.update(count)
    assert torch.equal(group.weight, fresh.groups[0].weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_a_gradient_momentum_goes_on(kind: str) -> None:
    bound, twin = build(kind, torch.float32, 3), build(kind, torch.float32, 3)
    group = bound.groups[0]
    known = group.params[0]
    bound.accumulate(known, gradient(known, 7))
    options = bound.optimizer.param_groups[0]  # type: ignore[union-attr]
    for position, param in enumerate(twin.groups[0].params):
        if position == 0:
            twin.accumulate(param, gradient(param, 7))
            continue
        state = twin.state_views(0, position)
        if "step" in state:  # the mean of past gradients, as the moment has it
            stand_in = state["exp_avg"] / (1 - options["betas"][0] ** 3)
        elif "exp_avg" in state:  # Lion: the gradient under which its momentum would stay what it is
            stand_in = state["exp_avg"]
        else:  # the gradient under which the buffer would stay what it is; its weight decay is in it already
            stand_in = state["momentum_buffer"] * ((1 - options["momentum"]) / (1 - options["dampening"]))
            stand_in = stand_in - options["weight_decay"] * param.detach()
        twin.accumulate(param, -stand_in if options["maximize"] else stand_in)
    twin.update(1)
    with LookAhead(bound, accumulation=1, divisor=1, shares=False).ahead(1, 1):
        # The stand-in is made in another order of operations: a few units in the last place of fp32.
        torch.testing.assert_close(group.weight, twin.groups[0].weight, rtol=1e-6, atol=1e-7)


def test_a_parameter_that_was_never_updated_stays() -> None:
    bound = build("adamw", torch.float32, 0)
    group = bound.groups[0]
    bound.accumulate(group.params[1], gradient(group.params[1], 0))
    before = [param.detach().clone() for param in group.params]
    with LookAhead(bound, accumulation=1, divisor=1, shares=False).ahead(2, 1):
        assert [torch.equal(param, old) for param, old in zip(group.params, before, strict=True)] == [True, False, True]
    assert all(torch.equal(param, old) for param, old in zip(group.params, before, strict=True))


def test_seconds_are_those_of_the_clock_that_was_given() -> None:
    class Ticks(HostClock):
        """A second from each mark to the next, told when somebody asks."""

        def __init__(self) -> None:
            self.now, self.pending = 0, list[Callable[[], None]]()

        def mark(self) -> int:
            self.now += 1
            return self.now

        def between(self, begin: int, end: int, done: Done) -> None:
            self.pending.append(partial(done, begin, end))

        def settle(self) -> None:
            while self.pending:
                self.pending.pop()()

    bound, clock = build("adamw", torch.float32, 1), Ticks()
    bound.accumulate(bound.groups[0].params[0], gradient(bound.groups[0].params[0], 0))
    look_ahead = LookAhead(bound, accumulation=1, divisor=1, shares=False, clock=clock)
    with look_ahead.ahead(1, 1):
        clock.now += 100  # the forward itself is none of it
    assert look_ahead.seconds == 0
    clock.settle()
    assert look_ahead.seconds == 2


class Shift(nn.Module):
    """Remembers the weight at which every forward ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.at: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.at.append(self.weight.detach().clone())
        return x * self.weight


def make(modules: list[nn.Module], a: int, **options: Any) -> paci_rt.LocalPipeline:
    defaults: dict[str, Any] = {"optimizer": lambda params: paci_rt.SGD([p for _, p in params], lr=0.1, momentum=0.5)}
    return paci_rt.LocalPipeline(
        modules, n_microbatches=a, loss_fn=lambda y, t: (y * t).sum(), **{"lookahead": True, **defaults, **options}
    )


@pytest.mark.parametrize(("stages", "a"), [(3, 4), (4, 3), (4, 1)])
def test_exactly_the_early_forwards_look_ahead(stages: int, a: int) -> None:
    modules: list[nn.Module] = [Shift() for _ in range(stages)]
    pipe = make(modules, a)
    early: list[int] = []
    plain_forward = pipe._executor._run_op[Op.F]

    def watch(runtime: Any, action: Any, feed: Any) -> Any:
        module, weight = modules[action.stage], modules[action.stage].weight.detach().clone()
        result = plain_forward(runtime, action, feed)
        ahead = action.index // a - result
        assert torch.equal(module.weight, weight)  # the backward and the update see the true weights
        something_known = action.index > stages - 1 - action.stage  # a backward has run here
        assert (not torch.equal(module.at[-1], weight)) == (ahead > 0 and something_known)
        early.append(ahead)
        return result

    pipe._executor._run_op[Op.F] = watch  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        # Never a gradient of zero, so that being ahead shows.
        pipe.step(torch.rand(a, 4, generator=generator) + 1, target=torch.rand(a, 4, generator=generator) + 1)
    stats = pipe.stats()
    ahead = sum(1 for value in early if value > 0)
    assert stats["lookahead_forwards"] == ahead > 0 and stats["lookahead_s"] > 0
    # One scratch copy on all stages but the last, also where weights ahead are shared.
    weights = stats["memory"][0]["weights"]
    copies = {stage: memory["versions"] / weights for stage, memory in stats["memory"].items()}
    assert copies == {stage: int(stage < stages - 1) for stage in range(stages)}
    pipe.reset_stats()
    assert pipe.stats()["lookahead_forwards"] == 0
    pipe.close()


def test_bad_combinations_are_told() -> None:
    def modules() -> list[nn.Module]:
        return [Shift(), Shift()]

    with pytest.raises(ValueError, match="1f1b: it flushes"):
        make(modules(), 2, schedule="1f1b")
    with pytest.raises(ValueError, match="under policy 'stash'"):
        make(modules(), 2, policy="stash")
    with pytest.raises(ValueError, match="cannot use Adam"):
        make(modules(), 2, optimizer=lambda params: torch.optim.Adam([p for _, p in params]))
    with pytest.raises(ValueError, match="SGD without momentum"):
        make(modules(), 2, optimizer=lambda params: paci_rt.SGD([p for _, p in params], lr=0.1))


def test_until_a_gradient_comes_the_window_before_has_to_do() -> None:
    bound, twin = build("adamw", torch.float32, 1), build("adamw", torch.float32, 1)
    look_ahead = LookAhead(bound, accumulation=2, divisor=2, shares=False)
    for one in (bound, twin):
        for seed in (0, 1):
            for param in one.groups[0].params:
                one.accumulate(param, gradient(param, seed))
        one.update(2)
    for seed in (0, 1):  # the twin sees the same window once more
        for param in twin.groups[0].params:
            twin.accumulate(param, gradient(param, seed))
    twin.update(2)
    with look_ahead.ahead(1, 0):
        assert torch.equal(bound.groups[0].weight, twin.groups[0].weight)
    look_ahead.restart()  # from here on only momentum is left
    with look_ahead.ahead(1, 0):
        assert not torch.equal(bound.groups[0].weight, twin.groups[0].weight)


@pytest.mark.parametrize("buffers", [1, 2])
def test_sums_of_the_window_before_stay_until_they_are_overwritten(buffers: int) -> None:
    bound = build("sgd", torch.float32, 0)
    accumulator = GradAccumulator(bound.groups[0], buffers=buffers)
    first = [gradient(param, 0) for param in bound.groups[0].params]
    assert not any(accumulator.sums(before=True)[1])
    for position, grad in enumerate(first[:2]):
        accumulator.add(position, grad)
    accumulator.seal()
    accumulator.consume()
    accumulator.release()
    flat, known = accumulator.sums(before=True)
    assert known == (True, True, False)
    assert all(torch.equal(bound.groups[0].view(flat, at), first[at]) for at in (0, 1))
    assert not any(accumulator.sums()[1])
    accumulator.forget()
    assert not any(accumulator.sums(before=True)[1])


def test_unscaled_gradients_look_ahead_as_they_update() -> None:
    # Half of a window of the same gradient says all there is to know: scaled or not, the early forward of the next
    # window then runs where the update brings the weights.
    for scale_grads in (True, False):
        modules: list[nn.Module] = [Shift(), Shift(), Shift()]
        pipe = make(modules, 4, scale_grads=scale_grads)
        for _ in range(3):
            pipe.step(torch.ones(4, 4), target=torch.ones(4, 4))
        pipe.drain()
        first = modules[0]
        assert isinstance(first, Shift)
        assert torch.equal(first.at[4], first.at[5])  # 2 early forwards, by one and by two gradients of a window
        assert torch.equal(first.at[5], first.at[6])  # and the first one after the update that they foresaw
        pipe.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_pass_lasts_until_four_times_as_much_is_known(dtype: torch.dtype) -> None:
    bound, each = build("adamw", dtype, 2), build("adamw", dtype, 2)
    group = bound.groups[0]
    shared = LookAhead(bound, accumulation=5, divisor=5, shares=True)
    alone = LookAhead(each, accumulation=5, divisor=5, shares=False)
    assert shared.nbytes == group.weight.nbytes
    assert alone.nbytes == (group.weight.nbytes if dtype is torch.float32 else 0)  # masters bring the true ones back

    def ahead(look_ahead: LookAhead, one: StageOptimizer, known: int) -> Tensor:
        true = one.groups[0].weight.clone()
        with look_ahead.ahead(1, known):
            used = one.groups[0].weight.clone()
        assert torch.equal(one.groups[0].weight, true)
        return used

    for window in range(2):
        shared_by_known: dict[int, Tensor] = {}
        before = ahead(shared, bound, 0), ahead(alone, each, 0)
        assert torch.equal(*before)  # without a gradient there is nothing to be shared yet
        for known in range(1, 6):
            for one in (bound, each):
                # A parameter that gets a gradient only after the first pass stays where that pass left it.
                for at, param in enumerate(one.groups[0].params):
                    if at != 1 or known > 1:
                        one.accumulate(param, gradient(param, 10 * window + known))
            used, newest = ahead(shared, bound, known), ahead(alone, each, known)
            made_anew = known in (1, 4)
            assert torch.equal(used, newest) == made_anew
            shared_by_known[known] = used
        assert torch.equal(shared_by_known[1], shared_by_known[3])
        assert torch.equal(shared_by_known[4], shared_by_known[5])
        for one, look_ahead in ((bound, shared), (each, alone)):
            look_ahead.window_ends()
            one.update(5)
    assert torch.equal(bound.groups[0].weight, each.groups[0].weight)
    assert (shared.forwards, alone.forwards) == (12, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_weights_that_the_user_changes_stay_changed_and_make_those_ahead_anew(kind: str, dtype: torch.dtype) -> None:
    bound, twin = build(kind, dtype, 2), build(kind, dtype, 2)
    for one in (bound, twin):
        for param in one.groups[0].params:
            one.accumulate(param, gradient(param, 5))
    shared = LookAhead(bound, accumulation=8, divisor=8, shares=True)
    alone = LookAhead(twin, accumulation=8, divisor=8, shares=False)
    with shared.ahead(1, 1):
        first = bound.groups[0].weight.clone()
    with shared.ahead(1, 2):  # the same once more
        assert torch.equal(bound.groups[0].weight, first)
    for one in (bound, twin):
        with torch.no_grad():
            for param in one.groups[0].params:
                param.clamp_(-0.5, 0.5)
    changed = bound.groups[0].weight.clone()
    with shared.ahead(1, 2), alone.ahead(1, 2):
        assert not torch.equal(bound.groups[0].weight, first)
        assert torch.equal(bound.groups[0].weight, twin.groups[0].weight)
    assert torch.equal(bound.groups[0].weight, changed)
    for one in (bound, twin):
        one.update(1)
    assert torch.equal(bound.groups[0].weight, twin.groups[0].weight)


@pytest.mark.parametrize("numel", [1, 65536, 65537, 300_001])
def test_scratch_and_weights_trade_places_to_the_bit(numel: int) -> None:
    sizes = {"a": numel, "b": 7, "c": 3}
    params = {name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}
    params["a"].data[0] = float("nan")
    bound = bind_optimizer(paci_rt.AdamW(params.values(), lr=0.1), params)
    scratch, group = ScratchWeights(bound), bound.groups[0]
    kept = scratch.kept[0]
    assert kept is not None
    kept.copy_(torch.randn(kept.shape))
    for positions in ([0, 1, 2], [0, 2], [1], []):
        weight, other = group.weight.clone(), kept.clone()
        versions = [param._version for param in group.params]
        scratch.trade(0, positions)
        for position in range(3):
            moved = position in positions
            for flat, same, new in ((group.weight, weight, other), (kept, other, weight)):
                expected = group.view(new if moved else same, position)
                assert torch.equal(group.view(flat, position).view(torch.int32), expected.view(torch.int32))
        assert [param._version for param in group.params] == versions


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize(("stages", "a"), [(8, 8), (4, 4), (4, 8), (3, 1)])
def test_copies_are_foreseen(stages: int, a: int, masters: bool) -> None:
    modules: list[nn.Module] = [Shift().to(torch.bfloat16 if masters else torch.float32) for _ in range(stages)]
    pipe = make(modules, a)
    x = torch.ones(a, 4, dtype=torch.bfloat16 if masters else torch.float32)
    pipe.step(x, target=x)
    memory = pipe.stats()["memory"]
    shape = Shape(num_stages=stages, accumulation=a)
    for stage in range(stages):
        copies = policies.copies_held("bounded", FAMILIES["paci"], shape, stage, True, masters=masters)
        assert memory[stage]["versions"] == copies * memory[stage]["weights"]
        assert copies <= 1
    pipe.close()
