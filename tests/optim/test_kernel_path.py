"""Stages whose gradients and updates go through the Triton kernels, as on a GPU, but on the CPU under the interpreter.

What the streams of a GPU add to this, the order of work, is looked at in ``test_update_stream.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.errors import AccumulatorStateError
from paci_rt.optim import backend, stage_optimizer
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.backend import make_accumulator
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.update_stream import UpdateStream
from support.interpreted import Interpreter
from support.marks import slow
from support.toy import CLASSES, WIDTH, Run, make_optimizer


class Odd(nn.Module):
    """One of each kind of gradient: split layers with and without bias, one used twice, one left to autograd, one that
    only every other micro-batch uses."""

    def __init__(self, stage: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.first, self.twice = nn.Linear(WIDTH, width), nn.Linear(width, width)
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(width))
        self.last = nn.Linear(width, WIDTH, bias=False)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.relu(self.twice(self.first(x)))) * self.scale
        return self.last(self.norm(h)) + x


class InParts(UpdateStream):
    """Updates in parts that nobody waits for, so that every launch is about a part of the parameters."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def updating(self) -> Iterator[None]:
        yield

    def _nothing(self, *_: Any) -> None:
        pass

    publish = set_buckets = wait = wait_all = _nothing  # type: ignore[assignment]


@contextmanager
def on(kernels: bool) -> Iterator[None]:
    """Within it, groups are worked on by the kernels, or by the native core."""
    with pytest.MonkeyPatch.context() as patch:
        if kernels:
            patch.setattr(backend, "uses_kernels", lambda device: True)
            patch.setattr(stage_optimizer, "update_order", lambda device: InParts())
        yield


def train(run: Run, kernels: bool, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters, optimizer state and losses after a few windows; the statistics."""
    with on(kernels):
        modules: list[nn.Module] = [Odd(stage, 24 + 8 * stage) for stage in range(run.stages)]
        pipe = paci_rt.LocalPipeline(
            [module.to(dtype) for module in modules],
            schedule=run.schedule,
            n_microbatches=run.accumulation,
            loss_fn=lambda output, target: (output[..., :CLASSES].float() - target).square().mean(),
            optimizer=lambda params: make_optimizer(run.optimizer, params),
            policy=run.policy,
            lookahead=run.lookahead,
            buffers=run.buffers,
        )
        torch.manual_seed(5)
        seen: dict[str, Tensor] = {}
        for window in range(run.windows):
            losses: list[Tensor] = []
            x, target = torch.randn(run.batch, WIDTH).to(dtype), torch.randn(run.batch, CLASSES)
            pipe.step(x, target=target, losses=losses)
            seen |= {f"loss {window}.{at}": loss for at, loss in enumerate(losses)}
        state = pipe.state_dict()
        seen |= {f"param {name}": value for name, value in state["params"].items()}
        for name, entry in state["optimizer"].items():
            seen |= {f"{key} of {name}": torch.as_tensor(value) for key, value in entry.items()}
        stats = pipe.stats()
        pipe.close()
        return seen, stats


RUNS = [
    Run(schedule="paci", stages=3, batch=16, accumulation=4, lookahead=True),
    Run(schedule="paci", stages=2, batch=12, accumulation=3, optimizer="sgd", lookahead=True),
    Run(schedule="paci", stages=3, batch=8, accumulation=2, buffers=2),
    Run(schedule="1f1b", stages=2, batch=12, accumulation=3),
    Run(schedule="zb-h1", stages=2, batch=12, accumulation=3),
    Run(schedule="pipedream-2bw", stages=3, batch=12, accumulation=3),
    Run(schedule="paci", stages=3, batch=8, accumulation=2, policy="predict"),
    Run(schedule="paci", stages=2, batch=8, accumulation=2, policy="recompute"),
    Run(schedule="paci", stages=2, batch=8, accumulation=2, optimizer="muon", lookahead=True),
    Run(schedule="paci", stages=2, batch=8, accumulation=2, optimizer="nadam", lookahead=True),
    Run(schedule="paci", stages=2, batch=8, accumulation=2, optimizer="lion", lookahead=True),
    Run(schedule="paci", stages=2, batch=8, accumulation=2, optimizer="torch-adamw"),
]


FAST = RUNS[1]


def both(run: Run) -> None:
    native, native_stats = train(run, kernels=False)
    kernel, kernel_stats = train(run, kernels=True)
    assert native.keys() == kernel.keys()
    different = [name for name in native if not torch.equal(native[name], kernel[name])]
    assert different == [], f"{len(different)} of {len(native)} differ"
    assert not all(torch.isnan(value).any() for value in native.values())
    for key in ("drift", "memory", "nonfinite_gradients", "peak_in_flight"):
        assert native_stats[key] == kernel_stats[key], key


@pytest.mark.parametrize(
    "run",
    [FAST if run is FAST else slow(run) for run in RUNS],
    ids=lambda run: f"{run.schedule}-{run.optimizer}-{run.policy}",
)
def test_fp32_training_has_the_bits_of_the_native_core(interpreter: Interpreter, run: Run) -> None:
    """Micro-batches have four rows: products of this size come in one piece, and sums over rows in one order."""
    interpreter(both, run)


def half(run: Run) -> float:
    native, _ = train(run, kernels=False, dtype=torch.float16)
    kernel, _ = train(run, kernels=True, dtype=torch.float16)
    assert any(not torch.equal(native[name], kernel[name]) for name in native)
    names = [name for name in native if name.startswith("master")]
    assert names
    apart = sum(float((native[name] - kernel[name]).square().sum()) for name in names)
    return (apart / sum(float(native[name].square().sum()) for name in names)) ** 0.5


@pytest.mark.slow
def test_fp16_training_differs_by_the_rounding_of_products(interpreter: Interpreter) -> None:
    """The kernels keep products in fp32, the native core rounds each to fp16: 2^-11 of a gradient. AdamW's steps are
    lr-sized, and the sign of a tiny gradient may flip: lr = 1e-2 for 3 windows moves a weight of size 0.2 by 15 % at
    most, so that a thousandth is far from what an error would do and far from what rounding does."""
    assert interpreter(half, Run(schedule="paci", stages=2, accumulation=2, windows=3)) < 1e-3


def accumulate_in_parts() -> None:
    with on(kernels=True):
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 6), (4,), (5,))]
        group = FlatGroup([(f"p{at}", param) for at, param in enumerate(params)])
        accumulator = make_accumulator(group, 2)
        assert type(accumulator) is not GradAccumulator
        grads = [torch.randn(param.shape) for param in params]
        x, dy = torch.randn(7, 6), torch.randn(7, 4)
        accumulator.add(2, grads[2])
        assert accumulator.state == "empty"  # nothing has been launched
        accumulator.add(2, grads[2])  # the second one of a parameter sends the first off
        assert accumulator.state == "filling"
        accumulator.add(0, grads[0])
        accumulator.add_product(0, dy.t(), x, (accumulator, 1))  # behind what the parameter already has
        accumulator.add(1, torch.full((4,), torch.inf))
        front, _ = accumulator.sums()
        assert torch.equal(group.view(front, 0), torch.addmm(grads[0], dy.t(), x))
        assert torch.equal(group.view(front, 2), grads[2] + grads[2])
        accumulator.seal()
        squares, nonfinite = (float(value) for value in accumulator.measured())
        assert squares == torch.inf and nonfinite == 4
        accumulator.consume()
        accumulator.add_product(0, dy.t(), x)  # the other buffer
        with pytest.raises(AccumulatorStateError, match="sealed"):
            accumulator.seal()
        accumulator.release()
        accumulator.seal()
        squares, nonfinite = (float(value) for value in accumulator.measured())
        expected = torch.mm(dy.t(), x).double().square().sum()
        assert nonfinite == 0 and abs(squares / float(expected) - 1) < 1e-14
        assert accumulator.touched == (True, False, False)
        accumulator.consume()
        assert not accumulator.sealed_view(1).any() and not accumulator.sealed_view(2).any()


def test_gradients_wait_for_one_launch(interpreter: Interpreter) -> None:
    interpreter(accumulate_in_parts)
