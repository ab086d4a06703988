"""Gradients that are not finite: no weight takes them, an error names where they came from, and a window that is
skipped leaves no trace, on whatever stage it was found."""

from __future__ import annotations

import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.schedules import FAMILIES
from support.bad_numbers import Bad, batch, drive, local, on_rank, plain
from support.plain import same
from support.pool import WorkerPool

NAN, INF = float("nan"), float("inf")
FLUSH = sorted(name for name, family in FAMILIES.items() if family.flush)
ASYNC = sorted(set(FAMILIES) - set(FLUSH))


def all_finite(pipe: Any) -> bool:
    return all(bool(param.isfinite().all()) for stage in pipe.stages for param in stage.parameters())


# --- raise ---


@pytest.mark.parametrize("schedule", sorted(FAMILIES))
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_the_error_names_stage_window_and_micro_batch(schedule: str, factor: float) -> None:
    run = Bad(schedule=schedule, stages=4, at=9, factor=factor, on_nonfinite=None)
    pipe = local(run)
    with pytest.raises(paci_rt.NonFiniteError) as caught:
        drive(pipe, run)
    error, one = caught.value, FAMILIES[schedule].one_micro_batch_windows
    # Gradients begin at the last stage; of two ranks in a V, either may come to its update first.
    assert error.stage == 3 or (FAMILIES[schedule].placement == "v" and error.stage == 2)
    assert (error.window, error.micro_batch) == (9 if one else 2, 9)
    assert error.parameter == "0.weight"
    assert f"stage {error.stage}, window" in str(error) and "on_nonfinite='skip-window'" in str(error)
    assert all_finite(pipe)
    with pytest.raises(paci_rt.PaciError, match="failed earlier"):
        pipe.state_dict()  # nothing to save
    again = pickle.loads(pickle.dumps(error))
    assert (again.stage, again.window, again.micro_batch, again.parameter) == (error.stage, error.window, 9, "0.weight")
    pipe.close()


@pytest.mark.parametrize(("schedule", "stage"), [("paci", 0), ("1f1b", 1), ("zb-h1", 2), ("paci-split", 1)])
def test_a_stage_that_finds_it_in_its_own_gradient_only(schedule: str, stage: int) -> None:
    run = Bad(schedule=schedule, stage=stage, at=6, on_nonfinite="raise")
    pipe = local(run)
    with pytest.raises(paci_rt.NonFiniteError) as caught:
        drive(pipe, run)
    assert (caught.value.stage, caught.value.window, caught.value.micro_batch) == (stage, 1, 6)
    assert caught.value.parameter == "2.scale"
    assert all_finite(pipe)


def test_a_nan_that_only_a_product_of_matrices_shows() -> None:
    """A NaN in the input of a layer whose output is masked reaches no loss, but the layer's weight gradient."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.isfinite().all(1, keepdim=True), self.layer(x), 0.0)

    pipe = paci_rt.LocalPipeline(
        [Masked(), nn.Linear(4, 2)], schedule="1f1b", n_microbatches=4, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
    )
    x = torch.ones(8, 4)
    x[5, 2] = NAN
    losses: list[Tensor] = []
    with pytest.raises(paci_rt.NonFiniteError) as caught:
        pipe.step(x, target=torch.ones(8, 2), losses=losses)
    assert (caught.value.stage, caught.value.micro_batch, caught.value.parameter) == (0, 2, "layer.weight")


def test_a_sum_that_overflows_is_found_although_every_gradient_is_finite() -> None:
    pipe = paci_rt.LocalPipeline(
        [nn.Linear(4, 1)],
        schedule="gpipe",
        n_microbatches=2,
        loss_fn=lambda output, target: output.sum() * 3e38,
        optimizer=paci_rt.AdamW,
    )
    with pytest.raises(paci_rt.NonFiniteError, match="window 0, micro-batch 1: the gradient of parameter 'weight'"):
        pipe.step(torch.ones(2, 4), target=torch.ones(2))


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_large_finite_gradients_are_no_error_although_their_squares_overflow(schedule: str) -> None:
    pipe = paci_rt.LocalPipeline(
        [nn.Linear(4, 4), nn.Linear(4, 1)],
        schedule=schedule,
        n_microbatches=2,
        loss_fn=lambda output, target: output.sum() * 1e30,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-3),
        on_nonfinite="raise",
    )
    for _ in range(3):
        pipe.step(torch.ones(2, 4), target=torch.ones(2))
    pipe.drain()
    assert pipe.stats()["nonfinite_gradients"] == 0
    assert all_finite(pipe)


def test_a_frozen_last_stage_leaves_the_finding_to_the_one_before() -> None:
    head = nn.Linear(4, 2).requires_grad_(False)
    modules = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(head, nn.Tanh())]
    extra = nn.Parameter(torch.zeros(1))
    modules[2].register_parameter("unused", extra)
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="1f1b",
        n_microbatches=2,
        loss_fn=nn.MSELoss(),
        optimizer=lambda params: paci_rt.AdamW([p for _, p in params if p.requires_grad]),
    )
    y = torch.ones(4, 2)
    y[3, 1] = INF
    with pytest.raises(paci_rt.NonFiniteError) as caught:
        pipe.step(torch.ones(4, 4), target=y)
    assert (caught.value.stage, caught.value.micro_batch) == (1, 1)
    assert all_finite(pipe)


def test_a_stage_with_an_optimizer_beside_one_without_raises() -> None:
    modules = [nn.Linear(4, 4), nn.Linear(4, 2)]
    optimizers: Any = [paci_rt.AdamW(modules[0].parameters()), None]
    pipe = paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=optimizers)
    with pytest.raises(paci_rt.NonFiniteError, match="stage 0"):
        pipe.step(torch.full((4, 4), NAN), target=torch.ones(4, 2))


def test_a_finite_sum_that_fp16_cannot_hold_reaches_no_weight() -> None:
    layer = nn.Linear(2, 1).half()
    pipe = paci_rt.LocalPipeline(
        [layer],
        schedule="1f1b",
        n_microbatches=4,
        loss_fn=lambda output, target: output.sum() * 4e4,
        optimizer=lambda params: torch.optim.SGD([p for _, p in params], lr=1e-9),
        scale_grads=False,
    )
    with pytest.raises(paci_rt.ActionError, match="too large for fp16"):
        pipe.step(torch.ones(4, 2).half(), target=torch.ones(4, 1))
    assert all_finite(pipe)


@pytest.mark.parametrize("schedule", ["paci", "1f1b", "paci-split"])
def test_an_evaluation_in_between_changes_nothing(schedule: str) -> None:
    run = Bad(schedule=schedule, stage=0, at=9, clip=0.5)
    pipe, again = local(run), local(run)
    for step in range(run.windows):
        x, y = batch(run, step)
        pipe.step(x, target=y)
        pipe.drain()
        again.step(x, target=y)
        counts = [stage.submod[2]._count for stage in again.stages]  # type: ignore[index, union-attr]
        again.eval(x, target=y)
        for stage, count in zip(again.stages, counts, strict=True):
            stage.submod[2]._count = count  # type: ignore[index, union-attr]
    same(dict(again.named_parameters()), dict(pipe.named_parameters()))


def test_without_an_optimizer_gradients_are_left_to_the_caller_as_torch_does() -> None:
    layer = nn.Linear(4, 2)
    pipe = paci_rt.LocalPipeline([layer], schedule="1f1b", n_microbatches=2, loss_fn=nn.MSELoss())
    pipe.step(torch.full((4, 4), NAN), target=torch.ones(4, 2))
    assert layer.weight.grad is not None and not layer.weight.grad.isfinite().any()


@pytest.mark.parametrize(("schedule", "transport"), [("paci", "shm"), ("1f1b", "gloo"), ("zb-h1", "shm")])
def test_between_processes_the_stage_that_found_it_says_so(workers: WorkerPool, schedule: str, transport: str) -> None:
    run = Bad(schedule=schedule, stages=3, stage=1, at=9, on_nonfinite=None, transport=transport)
    ranks = workers.run(on_rank, 3, run)
    assert ranks[1]["error"] == "NonFiniteError" and ranks[1]["finite"]
    assert "stage 1, window 2, micro-batch 9: the gradient of parameter '2.scale'" in ranks[1]["text"]
    for rank in (ranks[0], ranks[2]):
        assert rank.get("error") in ("PeerLostError", "TransferTimeoutError") and rank["finite"]


# --- skip-window under a flush: the plain loop without that step ---


@pytest.mark.parametrize("schedule", FLUSH)
@pytest.mark.parametrize("stage", [None, 0, 3])
@pytest.mark.parametrize("optimizer", ["torch-adamw", "torch-sgd"])
def test_a_flush_that_skips_equals_the_plain_loop_without_that_step(
    schedule: str, stage: int | None, optimizer: str
) -> None:
    run = Bad(schedule=schedule, stages=4, stage=stage, at=9, optimizer=optimizer)
    pipe = local(run)
    found = drive(pipe, run)
    same(found["params"], plain(run, skip=2))
    assert found["stats"]["skipped_windows"] == dict.fromkeys(range(4), 1)
    assert found["stats"]["taken_back_windows"] == dict.fromkeys(range(4), 0)
    finders = range(4) if stage is None else [stage]
    assert found["stats"]["nonfinite_windows"] == {at: int(at in finders) for at in range(4)}


def test_the_learning_rate_goes_on_by_windows_and_the_step_count_does_not() -> None:
    run = Bad(schedule="1f1b", at=9)
    factor = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    pipe = local(run, lr_scheduler=factor)
    drive(pipe, run)
    for entry in pipe.state_dict()["optimizer"].values():
        assert int(entry["step"]) == run.windows - 1
    assert pipe._lr_schedulers[0].last_epoch == run.windows


# --- skip-window without a flush ---


def never_took_place(monkeypatch: pytest.MonkeyPatch, run: Bad, windows: set[int]) -> dict[str, Any]:
    """A run over the data without the fault in which no stage updates at the end of ``windows``."""
    real = StageOptimizer.update
    counts: dict[int, int] = {}

    def update(self: StageOptimizer, divisor: int, prepare: Any = lambda: None, **_: Any) -> Any:
        window = counts.get(id(self), 0)
        counts[id(self)] = window + 1
        if window in windows:
            return real(self, divisor, prepare, decide=lambda sealed: None)
        return real(self, divisor, prepare)

    clean = Bad(**{**vars(run), "at": None, "on_nonfinite": None})
    with monkeypatch.context() as patch:
        patch.setattr(StageOptimizer, "update", update)
        return drive(local(clean), clean)


@pytest.mark.parametrize("schedule", ["paci", "paci-split", "async-1f1b"])
@pytest.mark.parametrize(("at", "factor"), [(2, NAN), (9, INF), (23, NAN)])
@pytest.mark.parametrize("optimizer", ["adamw", "torch-sgd", "lion"])
def test_what_comes_with_the_gradients_leaves_no_trace_on_any_stage(
    monkeypatch: pytest.MonkeyPatch, schedule: str, at: int, factor: float, optimizer: str
) -> None:
    run = Bad(schedule=schedule, at=at, factor=factor, optimizer=optimizer)
    found = drive(local(run), run)
    window = at if schedule == "async-1f1b" else at // run.accumulation
    same(found["params"], never_took_place(monkeypatch, run, {window})["params"])
    assert found["stats"]["skipped_windows"] == {0: 1, 1: 1, 2: 1}
    assert found["stats"]["taken_back_windows"] == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize(
    "run",
    [
        Bad(stage=0, at=9),
        Bad(stage=1, at=10, optimizer="torch-adamw", transport="gloo", clip=0.5),
        Bad(stage=0, at=23, optimizer="sgd"),  # the last window: nothing travels after it
        Bad(stage=1, at=5, lookahead=True, clip=1.0),
        Bad(schedule="paci-split", stage=2, at=9, optimizer="lion"),
        Bad(schedule="async-1f1b", stage=0, at=7, optimizer="torch-sgd"),
        Bad(schedule="async-1f1b", stage=1, at=23, clip=0.1),
        Bad(schedule="interleaved-1f1b", stages=4, stage=2, at=9, clip=1.0, transport="gloo"),
        Bad(schedule="zb-2p", at=3, clip=0.2, on_nonfinite="skip-local"),
        Bad(stage=1, at=6, on_nonfinite="skip-local", clip=1.0),
    ],
    ids=lambda run: f"{run.schedule}-{run.stage}-{run.at}-{run.optimizer}-{run.clip}-{run.on_nonfinite}",
)
def test_between_processes_a_skipped_window_gives_the_bits_of_one_process(workers: WorkerPool, run: Bad) -> None:
    ranks = workers.run(on_rank, run.stages // (2 if "interleaved" in run.schedule else 1), run)
    here = drive(local(run), run)
    params: dict[str, Tensor] = {}
    for rank in ranks:
        params |= rank["params"]
        for key in ("skipped_windows", "taken_back_windows", "nonfinite_windows", "clipped_windows", "norm_lags"):
            for stage, value in rank["stats"][key].items():
                assert value == here["stats"][key][stage], key
    same(params, here["params"])
    assert torch.equal(*(torch.tensor(one["losses"]).nan_to_num(-1.0) for one in (ranks[-1], here)))
    assert sum(here["stats"]["skipped_windows"].values()) >= 1


def test_skip_local_drops_the_window_on_the_stage_that_found_it_alone() -> None:
    run = Bad(stage=1, at=9, on_nonfinite="skip-local")
    pipe = local(run)
    found = drive(pipe, run)
    assert found["stats"]["skipped_windows"] == {0: 0, 1: 1, 2: 0}
    states = pipe.state_dict()["optimizer"]
    assert {int(entry["step"]) for name, entry in states.items() if "stages.1" in name} == {run.windows - 1}
    assert {int(entry["step"]) for name, entry in states.items() if "stages.1" not in name} == {run.windows}
    assert all_finite(pipe)


@pytest.mark.parametrize("policy", ["bounded", "predict", "recompute"])
def test_look_ahead_and_prediction_do_not_carry_it_into_the_next_window(policy: str) -> None:
    for at in (4, 7, 9):
        run = Bad(stages=4, at=at, lookahead=policy != "predict")
        pipe = local(run, policy=policy)
        found = drive(pipe, run)
        assert found["stats"]["skipped_windows"] == dict.fromkeys(range(4), 1)
        assert all_finite(pipe)


def test_taking_back_costs_memory_that_is_counted_and_only_then() -> None:
    parts = {
        policy: drive(local(one), one)["stats"]["memory"]
        for policy in ("raise", "skip-local", "skip-window")
        for one in [Bad(stage=0, at=None, on_nonfinite=policy)]
    }
    assert [parts["raise"][at]["versions"] for at in range(3)] == [0, 0, 0]
    assert [parts["skip-local"][at]["versions"] for at in range(3)] == [0, 0, 0]
    held = parts["skip-window"]
    for at in (1, 2):
        assert held[at]["versions"] >= held[at]["weights"] + held[at]["optimizer"]


def test_a_run_that_goes_on_from_its_state_has_the_bits_of_one_that_was_not_interrupted() -> None:
    run = Bad(stage=1, at=18, clip=0.5, windows=6)
    whole, first = local(run), local(run)
    for pipe in (whole, first):
        drive(pipe, Bad(**{**vars(run), "windows": 3}))
    state = whole.state_dict()
    second = local(run)
    second.load_state_dict(state)
    for stage, old in zip(second.stages, first.stages, strict=True):
        stage.submod[2]._count = old.submod[2]._count  # type: ignore[index, union-attr]
    same(drive(second, run, 3)["params"], drive(whole, run, 3)["params"])


# --- spikes ---


@pytest.mark.parametrize("schedule", ["1f1b", "paci", "gpipe"])
@pytest.mark.parametrize("how", ["skip-window", "skip-local"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_window_whose_norm_stands_out_is_skipped(schedule: str, how: str, stages: int) -> None:
    run = Bad(schedule=schedule, stages=stages, windows=24, at=81, factor=1e4, on_nonfinite=how)
    pipe = local(run, skip_spikes=8.0)
    stats = drive(pipe, run)["stats"]
    assert sum(stats["spiked_windows"].values()) >= 1
    if how == "skip-window":
        assert stats["skipped_windows"] == dict.fromkeys(range(stages), 1)
    assert sum(stats["nonfinite_windows"].values()) == 0
    calm = Bad(**{**vars(run), "at": None})
    assert sum(drive(local(calm, skip_spikes=8.0), calm)["stats"]["skipped_windows"].values()) == 0


# --- refused ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_nonfinite": "skip-windows"}, "unknown on_nonfinite 'skip-windows': did you mean 'skip-window'"),
        ({"on_nonfinite": 3}, "unknown on_nonfinite 3"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0: give a finite number above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"max_grad_norm": NAN}, "max_grad_norm is nan"),
        ({"max_grad_norm": 10**400}, "max_grad_norm is 10000"),
        ({"max_grad_norm": INF}, "max_grad_norm is inf"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'"),
        ({"max_grad_norm": True}, "max_grad_norm is True"),
        ({"skip_spikes": 3.0}, "how to skip a window is said by on_nonfinite"),
        ({"skip_spikes": 0, "on_nonfinite": "skip-local"}, "skip_spikes is 0"),
        ({"on_nonfinite": "skip-window", "policy": "stash"}, "on_nonfinite='skip-window' under policy 'stash'"),
        ({"on_nonfinite": "skip-window", "schedule": "pipedream-2bw"}, "under policy '2bw'"),
        ({"on_nonfinite": "raise", "schedule": "1f1b", "optimizer": None}, "on_nonfinite was given and optimizer is"),
        ({"max_grad_norm": 1.0, "schedule": "1f1b", "optimizer": None}, "max_grad_norm was given and optimizer is"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(options: dict[str, Any], text: str) -> None:
    given = {"schedule": "paci", "optimizer": paci_rt.AdamW, "n_microbatches": 4, "loss_fn": nn.MSELoss(), **options}
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        paci_rt.LocalPipeline([nn.Linear(2, 2), nn.Linear(2, 2)], **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [NAN, INF, 1e39])
@pytest.mark.parametrize("kind", [paci_rt.AdamW, paci_rt.SGD, paci_rt.Lion, torch.optim.AdamW, torch.optim.SGD])
def test_options_of_an_optimizer_that_are_not_finite_are_refused(kind: Any, name: str, value: float) -> None:
    layer = nn.Linear(2, 2)
    options = {"schedule": "paci", "n_microbatches": 1, "loss_fn": nn.MSELoss()}
    with pytest.raises(ValueError, match=f"{name}|learning rate"):
        paci_rt.LocalPipeline(
            [layer], optimizer=lambda params: kind([p for _, p in params], **{name: value}), **options
        )
    good = paci_rt.LocalPipeline([nn.Linear(2, 2)], optimizer=lambda ps: kind([p for _, p in ps]), **options)
    good._optimizers[0].optimizer.param_groups[0][name] = value  # type: ignore[union-attr]
    with pytest.raises(paci_rt.ActionError, match=re.escape(f"{name} is {value}")):
        good.step(torch.ones(1, 2), target=torch.ones(1, 2))
    assert all_finite(good)
