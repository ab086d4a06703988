"""Updates that are taken back, against a pipeline of two stages that is played by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.take_back import UpdateHistory
from paci_rt.optim.verdict import Verdict
from support.bad_numbers import ROWS, WIDTH, Spoiled
from support.toy import make_optimizer

WINDOWS = 6


class ByHand:
    """One stage's weights and optimizer, with what it takes to go back."""

    def __init__(self, module: nn.Module, optimizer: str) -> None:
        self.module, self.optimizer = module, make_optimizer(optimizer, module.parameters())
        self.before: dict[int, Any] = {}
        self.means: dict[int, list[Tensor]] = {}

    def take_means(self, micro_batches: int) -> list[Tensor]:
        means = []
        for param in self.module.parameters():
            assert param.grad is not None
            means.append(param.grad / micro_batches)
            param.grad = None
        return means

    def update(self, window: int, means: list[Tensor]) -> None:
        weights = [param.detach().clone() for param in self.module.parameters()]
        self.before[window] = weights, copy.deepcopy(self.optimizer.state_dict())
        self.means[window] = means
        for param, mean in zip(self.module.parameters(), means, strict=True):
            param.grad = mean.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def go_back(self, window: int) -> None:
        later = [one for one in self.before if one > window]
        if window not in self.before:
            return
        weights, state = self.before.pop(window)
        with torch.no_grad():
            for param, weight in zip(self.module.parameters(), weights, strict=True):
                param.copy_(weight)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        for one in later:
            self.update(one, self.means[one])


def pieces(at: int | None) -> list[nn.Module]:
    """The first stage's backward needs no weight, so that plain autograd can play PACI."""
    torch.manual_seed(1)
    second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))
    return [Spoiled(-1 if at is None else at, float("nan")), second]


def data(accumulation: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for step in range(WINDOWS):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, 2, generator=generator)
        found += list(zip(x.tensor_split(accumulation), y.tensor_split(accumulation), strict=True))
    return found


def by_hand(at: int, a: int, optimizer: str) -> tuple[list[Tensor], int]:
    """PACI's order; what stage 0 has found by the time that it sends activations, stage 1 hears when it takes them."""
    first, second = (ByHand(module, optimizer) for module in pieces(at))
    batches, bad = data(a), set[int]()
    outputs, known = {0: first.module(batches[0][0])}, {0: set[int]()}
    heard, taken_back = set[int](), 0

    def hear(windows: set[int]) -> int:
        count = 0
        for window in sorted(windows - heard):
            heard.add(window)
            count += window in second.before
            second.go_back(window)
        return count

    for m in range(len(batches)):
        taken_back += hear(known[m])
        x = outputs[m].detach().requires_grad_()
        nn.functional.mse_loss(second.module(x), batches[m][1]).backward()
        if m % a == a - 1:
            second.update(m // a, second.take_means(a))
        if m + 1 < len(batches):
            outputs[m + 1], known[m + 1] = first.module(batches[m + 1][0]), set(bad)
        outputs[m].backward(x.grad)
        if m % a == a - 1:
            means = first.take_means(a)
            if all(bool(mean.isfinite().all()) for mean in means):
                first.update(m // a, means)
            else:
                bad.add(m // a)
    taken_back += hear(bad)
    return [param.detach() for one in (first, second) for param in one.module.parameters()], taken_back


@pytest.mark.parametrize("optimizer", ["torch-adamw", "torch-sgd"])
@pytest.mark.parametrize("a", [1, 2, 4, 6])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_an_update_that_is_taken_back_leaves_what_a_pipeline_by_hand_has(optimizer: str, a: int, share: float) -> None:
    at = int(share * a * WINDOWS)
    expected, count = by_hand(at, a, optimizer)
    assert count == 1
    pipe = paci_rt.LocalPipeline(
        pieces(at),
        n_microbatches=a,
        loss_fn=nn.MSELoss(),
        optimizer=lambda named: make_optimizer(optimizer, [param for _, param in named]),
        on_nonfinite="skip-window",
        lookahead=False,
    )
    batches = data(a)
    for step in range(WINDOWS):
        x, y = (torch.cat(parts) for parts in zip(*batches[step * a : (step + 1) * a], strict=True))
        pipe.step(x, target=y)
    pipe.drain()
    for ours, theirs in zip((p for stage in pipe.stages for p in stage.parameters()), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert pipe.stats()["taken_back_windows"] == {0: 0, 1: 1}
    assert pipe.stats()["skipped_windows"] == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("kind", "dtype"),  # torch's optimizers keep no masters
    [
        *((kind, torch.float32) for kind in ("adamw", "nadam", "lion", "muon", "sgd", "torch-adamw", "torch-sgd")),
        *((kind, torch.bfloat16) for kind in ("adamw", "nadam", "lion", "muon", "sgd")),
    ],
)
@pytest.mark.parametrize("bad", [[0], [1], [0, 2], [2], [0, 1, 2]])
def test_the_history_of_every_optimizer_goes_back_and_forth(kind: str, dtype: torch.dtype, bad: list[int]) -> None:
    def bound(skip: list[int], back: bool) -> tuple[Any, Any]:
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
        found = bind_optimizer(make_optimizer(kind, module.parameters()), dict(module.named_parameters()))
        found.history = UpdateHistory(found) if back else None
        for window in range(3):
            generator = torch.Generator().manual_seed(window)
            for param in module.parameters():
                found.accumulate(param, torch.randn(param.shape, generator=generator).to(dtype))
            if window in skip and not back:
                found.update(1, decide=lambda sealed: None)
            else:
                verdict = Verdict(window=window)
                found.update(1, decide=lambda sealed, verdict=verdict: verdict)
        if back:
            assert found.history is not None
            assert found.history.take_back(skip) == len(skip)
        return [param.detach().clone() for param in module.parameters()], found.state_by_name()

    (weights, state), (expected, expected_state) = bound(bad, True), bound(bad, False)
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert state.keys() == expected_state.keys()
    for name, entry in state.items():
        assert entry.keys() == expected_state[name].keys(), name
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected_state[name][key])), (name, key)
