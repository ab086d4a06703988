"""fp16 with dynamic loss scaling: torch.amp.GradScaler's scales, and one scale a window on all stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import same
from support.pool import WorkerPool

WIDTH, ROWS, WINDOWS, A = 8, 16, 24, 4
SCALER = {"init_scale": 2.0**20, "growth_interval": 5}


def pieces(stages: int, dtype: torch.dtype = torch.float16) -> list[nn.Module]:
    found: list[nn.Module] = []
    for stage in range(stages):
        torch.manual_seed(20 + stage)
        found.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(dtype))
    return found


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.float(), target)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return x.half(), torch.randn(ROWS, WIDTH, generator=generator) * 20


def drive(pipe: Any, scaler: paci_rt.LossScaler) -> dict[str, Any]:
    scales = []
    for step in range(WINDOWS):
        x, y = batch(step)
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None)
        scales.append(scaler.get_scale())
    pipe.drain()
    params = {
        f"{stage.stage_index}.{name}": param.detach().clone()
        for stage in pipe.stages
        for name, param in stage.named_parameters()
    }
    return {"params": params, "scales": scales, "stats": pipe.stats()}


def local(schedule: str, stages: int = 2, **options: Any) -> dict[str, Any]:
    scaler = paci_rt.LossScaler(**{**SCALER, **options.pop("scaler", {})})
    pipe = paci_rt.LocalPipeline(
        pieces(stages),
        schedule=schedule,
        n_microbatches=A,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        loss_scale=scaler,
        **options,
    )
    return drive(pipe, scaler)


def with_torch(clip: float | None) -> dict[str, Any]:
    """The uncut fp16 model with fp32 masters, gradients summed up in fp32, and torch's scaler."""
    modules = pieces(2)
    model = nn.Sequential(*modules)
    masters = [param.detach().float().requires_grad_() for param in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALER["init_scale"], growth_interval=5)
    scales, skipped = [], 0
    for step in range(WINDOWS):
        x, y = batch(step)
        for part, target in zip(x.tensor_split(A), y.tensor_split(A), strict=True):
            scaler.scale(loss_fn(model(part), target)).backward()
            for master, param in zip(masters, model.parameters(), strict=True):
                grad = param.grad.float() / A
                master.grad = grad if master.grad is None else master.grad + grad
                param.grad = None
        before = scaler.get_scale()
        scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(masters, clip)
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                param.copy_(master)
        scales.append(scaler.get_scale())
    params = {f"{at}.{name}": p.detach() for at, one in enumerate(modules) for name, p in one.named_parameters()}
    return {"params": params, "scales": scales, "skipped": skipped}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_flush_has_the_scales_of_torchs_scaler(schedule: str, clip: float | None) -> None:
    ours, theirs = local(schedule, max_grad_norm=clip), with_torch(clip)
    assert ours["scales"] == theirs["scales"]
    assert ours["stats"]["skipped_windows"] == {0: theirs["skipped"], 1: theirs["skipped"]}
    assert theirs["skipped"] >= 3 and len(set(theirs["scales"])) >= 4
    for name, param in ours["params"].items():
        # fp16 rounds to 2**-11; a few elements may round the other way
        expected = theirs["params"][name].float()
        assert float((param.float() - expected).norm() / expected.norm()) < 2.0**-9, name


def test_scaling_by_a_power_of_two_changes_no_bit_of_fp32() -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        pipe = paci_rt.LocalPipeline(
            pieces(3, torch.float32),
            n_microbatches=A,
            loss_fn=loss_fn,
            optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
            **options,
        )
        for step in range(6):
            x, y = batch(step)
            pipe.step(x.float(), target=y)
        pipe.drain()
        return dict(pipe.named_parameters())

    clip = {"max_grad_norm": 0.5}
    for more in ({}, clip):
        scaled = run(loss_scale=paci_rt.LossScaler(init_scale=2.0**10), **more)
        same({n: p.detach() for n, p in scaled.items()}, {n: p.detach() for n, p in run(**more).items()})


@pytest.mark.parametrize("schedule", ["paci", "paci-split", "async-1f1b"])
@pytest.mark.parametrize("stages", [1, 3])
def test_without_a_flush_the_scale_finds_its_place(schedule: str, stages: int) -> None:
    found = local(schedule, stages)
    assert found["scales"][-1] < SCALER["init_scale"]
    skipped = set(found["stats"]["skipped_windows"].values())
    assert len(skipped) == 1 and 1 <= skipped.pop() < WINDOWS * (A if schedule == "async-1f1b" else 1)
    assert all(bool(param.isfinite().all()) for param in found["params"].values())


def on_rank(rank: int, group: Any, schedule: str, transport: str, clip: float | None) -> dict[str, Any]:
    stage = paci_rt.PipelineStage(pieces(3)[rank], rank, 3, group=group)
    scaler = paci_rt.LossScaler(**SCALER)
    pipe = paci_rt.get_schedule_class(schedule)(
        stage,
        A,
        loss_fn,
        optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2),
        loss_scale=scaler,
        transport=transport,
        max_grad_norm=clip,
    )
    return drive(pipe, scaler)


@pytest.mark.parametrize(
    ("schedule", "transport", "clip"),
    [("paci", "shm", None), ("paci", "gloo", 0.5), ("1f1b", "shm", 0.5), ("paci-split", "shm", 0.5)],
)
def test_between_processes_scales_and_bits_are_those_of_one_process(
    workers: WorkerPool, schedule: str, transport: str, clip: float | None
) -> None:
    ranks = workers.run(on_rank, 3, schedule, transport, clip)
    here = local(schedule, 3, max_grad_norm=clip)
    params: dict[str, Tensor] = {}
    for number, rank in enumerate(ranks):
        params |= rank["params"]
        for key in ("skipped_windows", "taken_back_windows"):
            assert rank["stats"][key][number] == here["stats"][key][number]
    same(params, here["params"])
    assert ranks[-1]["scales"] == here["scales"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_scale": 1000.0}, "init_scale is 1000.0: give a power of two"),
        ({"init_scale": float("inf")}, "init_scale is inf"),
        ({"init_scale": 0}, "init_scale is 0"),
        ({"init_scale": 2**1000}, "init_scale is 1071"),
        ({"growth_factor": 0.5}, "growth_factor is 0.5 and backoff_factor 0.5"),
        ({"backoff_factor": 2.0}, "backoff_factor 2.0"),
        ({"growth_factor": float("nan")}, "growth_factor is nan"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"growth_interval": 2.5}, "growth_interval is 2.5"),
    ],
)
def test_a_scaler_that_means_nothing_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        paci_rt.LossScaler(**options)


def test_what_scaling_needs_is_said() -> None:
    options: dict[str, Any] = {"n_microbatches": 1, "loss_fn": loss_fn, "optimizer": paci_rt.AdamW}
    for wrong in (65536.0, True, torch.amp.GradScaler("cpu")):
        with pytest.raises(ValueError, match=r"give a paci_rt\.LossScaler"):
            paci_rt.LocalPipeline([nn.Linear(2, 2)], loss_scale=wrong, **options)
    scaler = paci_rt.LossScaler()
    with pytest.raises(ValueError, match="whose window all stages must skip"):
        paci_rt.LocalPipeline([nn.Linear(2, 2)], loss_scale=scaler, on_nonfinite="raise", **options)
    scaler = paci_rt.LossScaler(growth_interval=1)
    scaler.update(bad=False, scale=65536.0)
    again = paci_rt.LossScaler()
    again.load_state_dict(scaler.state_dict())
    assert again.get_scale() == 131072.0
    with pytest.raises(ValueError, match="no state of a LossScaler"):
        again.load_state_dict({"scale": float("nan"), "good_windows": 0})
