"""Which weights forwards and backwards see under each policy, told by tagging every version with a constant."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.schedules import FAMILIES, Shape, policies
from support.marks import slow

STEP = 0.125  # every update adds this to every weight, exactly


class Tagging(torch.optim.Optimizer):
    """Every update moves every weight up by STEP, so a weight's value tells its version."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(STEP)


class Watch(torch.autograd.Function):
    """Passes its input on and writes down what the weight is, now and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, alias: Tensor, log: list[tuple[str, float]]) -> Tensor:
        ctx.save_for_backward(weight, alias)
        ctx.log = log
        log.append(("F", float(weight[0])))
        return x + 0 * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, alias = ctx.saved_tensors
        assert torch.equal(weight, alias.view_as(weight))  # a parameter and a view of it agree
        ctx.log.append(("B", float(weight[0])))
        return grad, torch.zeros_like(weight), None, None


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.log: list[tuple[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return Watch.apply(x, self.weight, self.weight.view(2, 2), self.log)  # type: ignore[no-any-return]


def versions_seen(
    policy: str | None, schedule: str, stages: int, a: int, steps: int, **options: Any
) -> tuple[Any, Any]:
    """For each stage the versions that its forwards and its backwards saw, by micro-batch; and the statistics."""
    modules = [Stage() for _ in range(stages)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=a,
        loss_fn=lambda output, target: output.sum() * 0,
        optimizer=lambda params: Tagging([param for _, param in params]),
        policy=policy,
        **options,
    )
    for _ in range(steps):
        pipe.step(torch.zeros(a, 4), target=torch.zeros(a))
    pipe.drain()
    stats = pipe.stats()
    pipe.close()
    seen = []
    for module in modules:
        seen.append({op: [round(value / STEP) for kind, value in module.log if kind == op] for op in "FB"})
    return seen, stats


def current_versions(stages: int, a: int, micro_batches: int, stage: int) -> tuple[list[int], list[int]]:
    """PACI's own: with w = P-1-i forwards ahead, m's forward follows m-w backwards, its backward m of them."""
    ahead = stages - 1 - stage
    return [max(0, m - ahead) // a for m in range(micro_batches)], [m // a for m in range(micro_batches)]


@pytest.mark.parametrize(("stages", "a"), list(itertools.product((1, 2, 4), (1, 2, 3, 5))))
def test_bounded_uses_what_is_there(stages: int, a: int) -> None:
    seen, stats = versions_seen("bounded", "paci", stages, a, 4)
    for stage in range(stages):
        forward, backward = current_versions(stages, a, 4 * a, stage)
        assert seen[stage] == {"F": forward, "B": backward}
        assert stats["memory"][stage]["versions"] == 0


@pytest.mark.parametrize(("stages", "a"), list(itertools.product((1, 2, 4), (1, 2, 3, 5))))
def test_stash_runs_the_backward_at_the_forwards_version(stages: int, a: int) -> None:
    seen, stats = versions_seen("stash", "paci", stages, a, 4)
    for stage in range(stages):
        forward, _ = current_versions(stages, a, 4 * a, stage)
        assert seen[stage] == {"F": forward, "B": forward}
        held = policies.versions_held("stash", FAMILIES["paci"], Shape(num_stages=stages, accumulation=a), stage)
        assert held <= stages - stage
        assert stats["memory"][stage]["versions"] == (held - 1) * stats["memory"][stage]["weights"]
        assert stats["drift"][stage] == {0: 4 * a}
        delays = [window - version for window, version in zip((m // a for m in range(4 * a)), forward, strict=True)]
        assert stats["delay"][stage] == {delay: delays.count(delay) for delay in sorted(set(delays))}


@pytest.mark.parametrize(("stages", "a"), [(1, 1), (1, 3), (2, 1), (2, 4), (4, 3), (4, 5)])
def test_2bw_runs_window_k_at_version_k_minus_1(stages: int, a: int) -> None:
    seen, stats = versions_seen(None, "pipedream-2bw", stages, a, 5)
    expected = [max(0, m // a - 1) for m in range(5 * a)]
    for stage in range(stages):
        assert seen[stage] == {"F": expected, "B": expected}
        assert stats["memory"][stage]["versions"] == stats["memory"][stage]["weights"]  # one copy
        assert stats["drift"][stage] == {0: 5 * a}
        assert stats["delay"][stage] == {0: a, 1: 4 * a}


def test_pipedream_is_stashing_after_every_backward() -> None:
    seen, stats = versions_seen(None, "pipedream", 4, 2, 6)
    for stage in range(4):
        forward, _ = current_versions(4, 1, 12, stage)
        assert seen[stage] == {"F": forward, "B": forward}
        assert stats["memory"][stage]["versions"] == (3 - stage) * stats["memory"][stage]["weights"]
    assert (stats["max_drift"], stats["drift_bound"], stats["max_delay"]) == (0, 0, 3)


@pytest.mark.parametrize("policy", ["stash", "2bw"])
def test_versions_start_anew_after_a_drain(policy: str) -> None:
    modules = [Stage() for _ in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="paci",
        n_microbatches=2,
        loss_fn=lambda output, target: output.sum() * 0,
        optimizer=lambda params: Tagging([param for _, param in params]),
        policy=policy,
    )
    x, y = torch.zeros(2, 4), torch.zeros(2)
    pipe.step(x, target=y)
    pipe.step(x, target=y)
    state = pipe.state_dict()  # drains: version 2 everywhere
    for module in modules:
        assert module.weight.tolist() == [2 * STEP] * 4
        module.log.clear()
    pipe.load_state_dict(state)
    pipe.step(x, target=y)
    pipe.drain()
    for module in modules:
        assert {round(value / STEP) for _, value in module.log} == {2}
        assert module.weight.tolist() == [3 * STEP] * 4
    pipe.close()


class Quadratic(nn.Module):
    """Its own weight is its loss's only variable; remembers the weight at which every forward ran."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0, dtype=dtype))
        self.at: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.at.append(self.weight.detach().clone())
        return x + self.weight


OPTIMIZERS = {
    "paci AdamW": lambda params: paci_rt.AdamW(params, lr=0.1, betas=(0.8, 0.9), weight_decay=0.0),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.8, 0.9), weight_decay=0.0),
    "paci SGD": lambda params: paci_rt.SGD(params, lr=0.1, momentum=0.8),
    "torch SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_prediction_is_the_formula_and_leaves_no_trace(kind: str) -> None:
    stages, a, steps = 3, 1, 6
    modules = [Quadratic(torch.float32) for _ in range(stages)]
    optimizers = [OPTIMIZERS[kind](list(module.parameters())) for module in modules]
    predicted: dict[int, list[tuple[int, Tensor]]] = {stage: [] for stage in range(stages)}
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="paci",
        n_microbatches=a,
        loss_fn=lambda output, target: (output * target).sum(),
        optimizer=optimizers,
        policy="predict",
    )
    executor = pipe._executor
    plain_forward = executor._run_op[paci_rt.action.Op.F]

    def watch(runtime: Any, action: Any, feed: Any) -> Any:
        """What the formula gives from the state that the optimizer has before the forward."""
        stage, param = action.stage, modules[action.stage].weight
        ahead = action.index - runtime.audit.version
        state, group = optimizers[stage].state.get(param, {}), optimizers[stage].param_groups[0]
        expected = param.detach().clone()
        if ahead and state:
            if "momentum_buffer" in state:
                expected -= ahead * group["lr"] * state["momentum_buffer"]
            else:
                beta1, beta2 = group["betas"]
                mean = state["exp_avg"] / (1 - beta1 ** float(state["step"]))
                square = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
                expected -= ahead * group["lr"] * mean / (square.sqrt() + group["eps"])
        predicted[stage].append((ahead, expected))
        before = param.detach().clone()
        result = plain_forward(runtime, action, feed)
        assert torch.equal(param, before)  # the backward and the update see the true weights
        return result

    executor._run_op[paci_rt.action.Op.F] = watch
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pipe.step(torch.zeros(1, 3), target=torch.randn(1, 3, generator=generator))
    pipe.drain()
    for stage in range(stages):
        assert max(ahead for ahead, _ in predicted[stage]) == stages - 1 - stage
        for (_, expected), at in zip(predicted[stage], modules[stage].at, strict=True):
            torch.testing.assert_close(at, expected, rtol=1e-6, atol=1e-7)  # fp32, another order of operations
    assert any(ahead and not torch.equal(at, torch.full((3,), 2.0)) for ahead, at in predicted[0])
    memory = pipe.stats()["memory"]
    last = len(memory) - 1  # has no early forwards, hence nothing to keep aside
    assert {stage: of["versions"] for stage, of in memory.items()} == {
        stage: of["weights"] if stage < last else 0 for stage, of in memory.items()
    }
    pipe.close()


def test_prediction_needs_no_scratch_where_there_are_masters() -> None:
    modules = [Quadratic(torch.bfloat16) for _ in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules,
        n_microbatches=1,
        loss_fn=lambda output, target: (output * target).sum(),
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=0.1),
        policy="predict",
    )
    for _ in range(4):
        pipe.step(torch.zeros(1, 3).bfloat16(), target=torch.ones(1, 3).bfloat16())
        masters = [bound.master(0).bfloat16()[:3] for bound in pipe._optimizers]  # type: ignore[union-attr]
        assert all(torch.equal(module.weight, master) for module, master in zip(modules, masters, strict=True))
    assert all(memory["versions"] == 0 for memory in pipe.stats()["memory"].values())
    assert not torch.equal(modules[0].at[-1], modules[0].at[-2])
    pipe.close()


def test_prediction_refuses_an_optimizer_that_it_cannot_foresee() -> None:
    def pipe(make: Any) -> None:
        paci_rt.LocalPipeline(
            [Stage(), Stage()], n_microbatches=1, loss_fn=lambda y, t: y.sum(), optimizer=make, policy="predict"
        )

    with pytest.raises(ValueError, match="cannot foresee the steps of Tagging"):
        pipe(lambda params: Tagging([param for _, param in params]))
    with pytest.raises(ValueError, match="SGD without momentum"):
        pipe(lambda params: paci_rt.SGD([param for _, param in params], lr=0.1))


def test_policies_are_checked_against_the_schedule() -> None:
    def resolve(name: str, policy: str | None, stages: int = 4, a: int = 4, slack: int = 0) -> str:
        shape = Shape(num_stages=stages, accumulation=a, slack=slack)
        return policies.resolve(FAMILIES[name], shape, policy)

    assert resolve("paci", None) == "bounded" and resolve("pipedream", None) == "stash"
    with pytest.raises(ValueError, match=r"unknown policy 'stach'.*'stash'"):
        resolve("paci", "stach")
    with pytest.raises(ValueError, match=r"'stash' under 1f1b: its weights stand still"):
        resolve("1f1b", "stash")
    with pytest.raises(ValueError, match=r"'bounded' under pipedream"):
        resolve("pipedream", "bounded")
    with pytest.raises(ValueError, match=r"accumulation is 2: .*at least 3"):
        resolve("pipedream-2bw", None, a=2)
    with pytest.raises(ValueError, match=r"accumulation is 4: .*at least 5"):
        resolve("paci", "2bw", slack=2)


class Dropping(nn.Module):
    """Random numbers and two linear layers; counts its forwards."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.3)
        self.forwards = [0]  # what a second run does to it stays

    def forward(self, x: Tensor) -> Tensor:
        self.forwards[0] += 1
        return self.two(self.drop(torch.relu(self.one(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "zb-h2"])
def test_recomputation_repeats_the_forward_to_the_bit(schedule: str) -> None:
    """In a flush schedule the weights are the same, so everything is: dropout's random numbers too."""
    finals, stats = [], []
    for policy in ("bounded", "recompute"):
        torch.manual_seed(1)
        modules = [Dropping() for _ in range(3)]
        pipe = paci_rt.LocalPipeline(
            modules,
            schedule=schedule,
            n_microbatches=4,
            loss_fn=nn.functional.mse_loss,
            optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=0.01),
            policy=policy,
        )
        torch.manual_seed(2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x, y = torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)
            pipe.step(x, target=y)
        finals.append([param.detach().clone() for module in modules for param in module.parameters()])
        stats.append(pipe.stats())
        pipe.close()
        twice = [module.forwards[0] > 3 * 4 for module in modules]
        holds_one = stats[-1]["peak_in_flight"][2] == 1
        assert twice == [False] * 3 if policy == "bounded" else twice == [True, True, not holds_one]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*finals, strict=True))
    kept, anew = (one["memory"][0]["activations"] for one in stats)
    assert anew < kept


def test_recomputation_under_paci_uses_the_weights_of_the_backward() -> None:
    modules = [Quadratic(torch.float32) for _ in range(3)]
    pipe = paci_rt.LocalPipeline(
        modules,
        n_microbatches=1,
        loss_fn=lambda output, target: (output * target).sum(),
        optimizer=lambda params: Tagging([param for _, param in params]),
        policy="recompute",
    )
    for _ in range(5):
        pipe.step(torch.zeros(1, 3), target=torch.ones(1, 3))
    pipe.drain()
    # Stage 0: F0 F1 F2 | B0 (anew at version 0) U F3 | B1 (anew at version 1) U ...
    versions = [round((float(at[0]) - 2.0) / STEP) for at in modules[0].at]
    assert versions == [0, 0, 0, 0, 1, 1, 2, 2, 3, 4]
    stats = pipe.stats()
    # What stays until the backward is the input of 3 fp32 numbers; in the backward, what autograd saves beside it.
    assert stats["peak_in_flight"][0] == 3 and stats["memory"][0]["activations"] == 3 * 3 * 4
    pipe.close()


@pytest.mark.parametrize(("policy", "a"), [slow("stash", 1), ("stash", 2), slow("2bw", 3)])
def test_kept_versions_train_as_a_replay_that_keeps_every_version(policy: str, a: int) -> None:
    """Linear layers, whose graphs save views of their weights, against micro-batches run one after another with a
    copy of every version that ever was."""
    stages, windows, lr = 3, 6, 0.1

    def build() -> list[nn.Module]:
        torch.manual_seed(5)
        return [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(stages)]

    generator = torch.Generator().manual_seed(6)
    data = [
        (torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator)) for _ in range(windows * a)
    ]
    modules = build()
    pipe = paci_rt.LocalPipeline(
        modules,
        n_microbatches=a,
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda params: torch.optim.SGD([param for _, param in params], lr=lr),
        policy=policy,
    )
    for k in range(windows):
        x, y = (torch.cat(parts) for parts in zip(*data[k * a : (k + 1) * a], strict=True))
        pipe.step(x, target=y)
    pipe.drain()
    pipe.close()

    replayed = build()
    versions = [[{name: p.detach().clone() for name, p in module.named_parameters()}] for module in replayed]
    for k in range(windows):
        sums: list[dict[str, Tensor]] = [{} for _ in range(stages)]
        for m in range(k * a, (k + 1) * a):
            hidden, target = data[m]
            used = []
            for stage, module in enumerate(replayed):
                version = max(0, m - (stages - 1 - stage)) // a if policy == "stash" else max(0, k - 1)
                used.append({name: w.clone().requires_grad_() for name, w in versions[stage][version].items()})
                hidden = torch.func.functional_call(module, used[-1], (hidden,))
            nn.functional.mse_loss(hidden, target).backward()
            for stage, weights in enumerate(used):
                for name, weight in weights.items():
                    assert weight.grad is not None
                    sums[stage][name] = sums[stage][name] + weight.grad if name in sums[stage] else weight.grad
        for stage in range(stages):
            newest = versions[stage][-1]
            versions[stage].append({name: w.add(sums[stage][name] / a, alpha=-lr) for name, w in newest.items()})
    for module, kept in zip(modules, versions, strict=True):
        for name, param in module.named_parameters():
            assert torch.equal(param, kept[-1][name]), name
