"""What is not finite where the Triton kernels add and update, as on a GPU: no weight takes it, and nobody waits for the
number that says so; on the CPU under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paci_rt
from optim.test_kernel_path import on
from paci_rt.optim import accumulator
from support.bad_numbers import Bad, drive, local
from support.interpreted import Interpreter
from support.marks import slow
from support.plain import same


def raises(schedule: str, optimizer: str, stage: int | None, at: int) -> None:
    run = Bad(schedule=schedule, stages=2, windows=4, stage=stage, at=at, optimizer=optimizer, on_nonfinite=None)
    with on(True):
        pipe = local(run)
        try:
            drive(pipe, run)
        except paci_rt.NonFiniteError as error:
            found = error
        else:
            raise AssertionError("no error")
        expected = 1 if stage is None else stage
        assert (found.stage, found.window, found.micro_batch) == (expected, at // 4, at), found
        assert found.parameter == ("0.weight" if stage is None else "2.scale"), found
        for one in pipe.stages:
            for name, param in one.named_parameters():
                assert bool(param.isfinite().all()), name
        with pytest.raises(paci_rt.PaciError, match="failed earlier"):
            pipe.state_dict()


@pytest.mark.parametrize(
    ("schedule", "optimizer", "stage", "at"),
    [
        ("paci", "adamw", None, 5),
        slow("1f1b", "sgd", None, 14),  # the last window: a drain finds it
        slow("paci", "lion", 0, 6),
        slow("zb-h1", "adamw", 1, 3),
        slow("1f1b", "muon", None, 6),  # its steps cannot be told on the device: the host waits
        slow("paci", "torch-adamw", 0, 6),
    ],
)
def test_no_weight_takes_it_and_the_error_comes_later(
    interpreter: Interpreter, schedule: str, optimizer: str, stage: int | None, at: int
) -> None:
    interpreter(raises, schedule, optimizer, stage, at)


def masked(kind: str) -> None:
    """A clip coefficient of NaN leaves weights and state as they are, and 1 gives the bits of none."""
    from paci_rt.optim.bind import bind_optimizer
    from paci_rt.optim.verdict import Verdict
    from support.toy import make_optimizer

    with on(True):
        results: dict[str, list[Any]] = {}
        for name, factor in (("plain", 1.0), ("one", torch.ones(1)), ("nan", torch.full((1,), float("nan")))):
            torch.manual_seed(2)
            module = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3))
            before = [param.detach().clone() for param in module.parameters()]
            bound = bind_optimizer(make_optimizer(kind, module.parameters()), dict(module.named_parameters()))
            assert bound.masks
            for window in range(2):
                generator = torch.Generator().manual_seed(window)
                for param in module.parameters():
                    bound.accumulate(param, torch.randn(param.shape, generator=generator))
                bound.update(1, decide=lambda sealed, factor=factor: Verdict(factor))
            state = bound.state_by_name()
            results[name] = [
                *module.parameters(),
                *(v for e in state.values() for v in e.values() if torch.as_tensor(v).dim()),
            ]
            if name == "nan":
                assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
                assert not any(bool(one.any()) for one in results[name][len(before) :])
        assert all(torch.equal(a, b) for a, b in zip(results["plain"], results["one"], strict=True))


@pytest.mark.parametrize("kind", ["adamw", slow("sgd"), slow("lion"), slow("nadam")])
def test_a_coefficient_of_nan_leaves_everything_as_it_is(interpreter: Interpreter, kind: str) -> None:
    interpreter(masked, kind)


def skips(run: Bad) -> None:
    with on(True):
        kernels = drive(local(run), run)
    with pytest.MonkeyPatch.context() as patch:  # kernels have a product added in one pass, whatever the bits of two
        patch.setattr(accumulator, "merged_is_exact", lambda *_: True)
        native = drive(local(run), run)
    same(kernels["params"], native["params"])
    assert kernels["stats"]["skipped_windows"] == native["stats"]["skipped_windows"]
    assert max(native["stats"]["skipped_windows"].values()) == 1


@pytest.mark.parametrize(
    "run",
    [
        Bad(stages=2, windows=3, stage=0, at=5),
        slow(Bad(stages=2, windows=3, at=5, clip=0.5, lookahead=True)),
        slow(Bad(schedule="1f1b", stages=2, windows=3, at=5, clip=0.5)),
        slow(Bad(schedule="1f1b", stages=2, windows=3, stage=1, at=5, on_nonfinite="skip-local")),
    ],
    ids=lambda run: f"{run.schedule}-{run.on_nonfinite}-{run.clip}",
)
def test_skipping_has_the_bits_of_the_native_core(interpreter: Interpreter, run: Bad) -> None:
    interpreter(skips, run)
