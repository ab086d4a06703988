"""Stages on a GPU: against the CPU, against themselves on other streams, and without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.train.config import TrainConfig
from paci_rt.train.run import execute
from support.toy import Run, batch, loss_fn, make_optimizer, module

pytestmark = pytest.mark.gpu

RUNS = [
    Run(schedule="paci", stages=4, accumulation=4, lookahead=True),
    Run(schedule="paci", stages=4, accumulation=2, buffers=2),
    Run(schedule="1f1b", stages=3, accumulation=4),
    Run(schedule="zb-2p", stages=3, accumulation=6),
    Run(schedule="interleaved-1f1b", stages=4, accumulation=4, chunks=2),
    Run(schedule="pipedream-2bw", stages=3, accumulation=3),
    Run(schedule="pipedream", stages=3, accumulation=2),
    Run(schedule="paci", stages=3, accumulation=2, policy="predict"),
    Run(schedule="paci", stages=3, accumulation=3, policy="recompute"),
    Run(schedule="paci", stages=2, accumulation=2, optimizer="sgd", lookahead=True),
    Run(schedule="paci", stages=2, accumulation=2, optimizer="nadam", lookahead=True),
    Run(schedule="paci", stages=2, accumulation=2, optimizer="lion", lookahead=True),
    Run(schedule="paci", stages=2, accumulation=2, optimizer="muon", lookahead=True),
    Run(schedule="paci", stages=2, accumulation=2, optimizer="torch-adamw"),
]


@contextmanager
def exact() -> Iterator[None]:
    """fp32 products in fp32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def train(run: Run, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Parameters in fp32 on the CPU, losses, and statistics."""
    with exact():
        pipe = paci_rt.LocalPipeline(
            [module(stage, run).to(dtype) for stage in range(run.stages)],
            schedule=run.schedule,
            n_microbatches=run.accumulation,
            loss_fn=lambda output, target: loss_fn(output.float(), target),
            optimizer=lambda params: make_optimizer(run.optimizer, params),
            chunks=run.chunks,
            policy=run.policy,
            lookahead=run.lookahead,
            buffers=run.buffers,
            device=device,
            **options,
        )
        history: list[float] = []
        for step in range(run.windows):
            x, y = batch(run, step)
            losses: list[Tensor] = []
            pipe.step(x.to(dtype).to(device), target=y.to(device), losses=losses)
            history += torch.stack(losses).tolist()
        pipe.drain()
        params = [param.detach().float().cpu().flatten() for _, param in pipe.named_parameters()]
        stats = pipe.stats()
        pipe.close()
    return {"params": torch.cat(params), "losses": torch.tensor(history), "stats": stats}


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.schedule}-{run.optimizer}-{run.policy}-{run.buffers}")
def test_fp32_on_a_gpu_follows_the_cpu(run: Run) -> None:
    """Sums have another order, 2^-24 of a value each; gradients near zero may change their sign, and with it an AdamW
    step of lr = 1e-2 for that element. A thousandth of the weights' norm is far above rounding and far below an error
    in the order of work, which changes whole gradients."""
    cpu, gpu = train(run, "cpu"), train(run, "cuda")
    assert apart(gpu["losses"], cpu["losses"]) < 1e-3
    assert apart(gpu["params"], cpu["params"]) < (2e-2 if run.optimizer == "lion" else 1e-3)
    for key in ("drift", "delay", "peak_in_flight", "micro_batches", "windows", "nonfinite_gradients"):
        assert gpu["stats"][key] == cpu["stats"][key], key
    assert gpu["stats"]["utilization"] > 0


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.schedule}-{run.optimizer}-{run.policy}-{run.buffers}")
def test_streams_change_no_bit(run: Run) -> None:
    own = train(run, "cuda")
    for options in ({"streams": [None] * run.stages}, {}):
        other = train(run, "cuda", **options)
        assert torch.equal(own["params"], other["params"]) and torch.equal(own["losses"], other["losses"])


def test_bf16_follows_fp32() -> None:
    """bf16 weights carry 8 bits: 2^-9 each, and losses at these weights differ by as much at most."""
    run = Run(schedule="paci", stages=4, accumulation=4, lookahead=True)
    low, full = train(run, "cuda", torch.bfloat16), train(run, "cuda")
    assert apart(low["losses"], full["losses"]) < 2e-2
    assert apart(low["params"], full["params"]) < 5e-2


class Wide(nn.Sequential):
    def __init__(self, stage: int) -> None:
        torch.manual_seed(stage)
        layers = [part for _ in range(4) for part in (nn.Linear(256, 256), nn.GELU())]
        super().__init__(nn.LayerNorm(256), *layers)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "paci"},
        {"schedule": "1f1b"},
        {"schedule": "paci", "buffers": 2},
        {"schedule": "paci", "policy": "predict"},
        {"schedule": "paci", "policy": "recompute"},
        {"schedule": "pipedream-2bw"},
        {"schedule": "zb-h1"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pinned", [False, True], ids=["from the GPU", "from pinned memory"])
def test_windows_never_wait_for_the_device(options: dict[str, Any], dtype: torch.dtype, pinned: bool) -> None:
    pipe = paci_rt.LocalPipeline(
        [Wide(stage).to(dtype) for stage in range(3)],
        n_microbatches=4,
        loss_fn=lambda output, target: (output - target).float().square().mean(),
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-3),
        device="cuda",
        **options,
    )
    x, y = (torch.randn(64, 256, dtype=dtype) for _ in range(2))
    x, y = (x.pin_memory(), y.pin_memory()) if pinned else (x.cuda(), y.cuda())
    losses: list[Tensor] = []
    for _ in range(3):  # tables and kernels are made, and the clocks brought together
        pipe.step(x, target=y, losses=losses)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            pipe.step(x, target=y, losses=losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    pipe.close()


def test_updates_are_waited_for_layer_by_layer_without_a_race() -> None:
    """An update that takes long, against one in line: a forward that ran ahead of it would see other weights."""

    def trained(hold_us: int) -> Tensor:
        pipe = paci_rt.LocalPipeline(
            [Wide(0), Wide(1)],
            n_microbatches=2,
            loss_fn=lambda output, target: (output - target).square().mean(),
            optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-2),
            device="cuda",
        )
        torch.manual_seed(0)
        data = [torch.randn(2, 32, 256, device="cuda") for _ in range(6)]
        apply = paci_rt.AdamW.apply

        def slow(self: Any, *args: Any) -> None:
            stream = torch.cuda.current_stream()
            paci_rt.native.core().cuda_spin(stream.device_index, stream.cuda_stream, hold_us)
            apply(self, *args)

        paci_rt.AdamW.apply = slow  # type: ignore[method-assign]
        try:
            for x, y in data:
                pipe.step(x, target=y)
            pipe.drain()
        finally:
            paci_rt.AdamW.apply = apply  # type: ignore[method-assign]
        params = torch.cat([param.detach().flatten() for _, param in pipe.named_parameters()])
        pipe.close()
        return params

    assert torch.equal(trained(0), trained(3000))


def wide_pipeline() -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        [Wide(0), Wide(1)],
        n_microbatches=2,
        loss_fn=lambda output, target: (output - target).square().mean(),
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-2),
        device="cuda",
    )


def spin(stream: torch.cuda.Stream, hold_us: int) -> None:
    paci_rt.native.core().cuda_spin(stream.device_index, stream.cuda_stream, hold_us)


def test_outputs_and_losses_stay_whole_until_a_caller_that_is_late_has_read_them() -> None:
    """Inputs from pinned memory: the stages go on while the caller's stream is held up, steps behind them."""
    torch.manual_seed(0)
    data = [tuple(torch.randn(512, 256).pin_memory() for _ in range(2)) for _ in range(8)]

    def read(hold_us: int) -> Tensor:
        pipe, seen = wide_pipeline(), []
        for x, y in data:
            spin(torch.cuda.current_stream(), hold_us)
            losses: list[Tensor] = []
            output = pipe.step(x, target=y, losses=losses)
            seen.append(output.double().sum() + torch.stack(losses).double().sum())
            del output, losses
        pipe.close()
        return torch.stack(seen)

    assert torch.equal(read(0), read(20_000))


def test_a_close_without_a_drain_is_behind_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = paci_rt.AdamW.apply

    def slow(self: Any, *args: Any) -> None:
        spin(torch.cuda.current_stream(), 20_000)
        apply(self, *args)

    monkeypatch.setattr(paci_rt.AdamW, "apply", slow)
    pipe = wide_pipeline()
    x, y = torch.randn(2, 32, 256, device="cuda")
    for _ in range(2):
        pipe.step(x, target=y)
    params = [param for _, param in pipe.named_parameters()]
    pipe.close()
    at_once = torch.cat([param.detach().flatten() for param in params])
    torch.cuda.synchronize()
    assert torch.equal(at_once, torch.cat([param.detach().flatten() for param in params]))


def test_state_of_a_torch_optimizer_comes_back_from_the_cpu() -> None:
    run = Run(schedule="paci", stages=2, accumulation=2, optimizer="torch-adamw")
    pipes = [
        paci_rt.LocalPipeline(
            [module(stage, run) for stage in range(2)],
            n_microbatches=2,
            loss_fn=loss_fn,
            optimizer=lambda params: make_optimizer("torch-adamw", params),
            device="cuda",
        )
        for _ in range(2)
    ]

    def step(pipe: paci_rt.LocalPipeline, number: int) -> None:
        x, y = batch(run, number)
        pipe.step(x.cuda(), target=y.cuda())

    for number in range(2):
        step(pipes[0], number)
    state = pipes[0].state_dict()
    state["optimizer"] = {
        name: {key: value.cpu() for key, value in entry.items()} for name, entry in state["optimizer"].items()
    }
    pipes[1].load_state_dict(state)
    for pipe in pipes:
        step(pipe, 2)
        pipe.drain()
    for (_, one), (_, other) in zip(*(pipe.named_parameters() for pipe in pipes), strict=True):
        assert torch.equal(one, other)
    for pipe in pipes:
        pipe.close()


def test_state_survives_the_way_to_the_cpu_and_back(tmp_path: Path) -> None:
    run = Run(schedule="paci", stages=2, accumulation=2)

    def pipeline(device: str) -> paci_rt.LocalPipeline:
        return paci_rt.LocalPipeline(
            [module(stage, run).bfloat16() for stage in range(2)],
            n_microbatches=2,
            loss_fn=lambda output, target: loss_fn(output.float(), target),
            optimizer=lambda params: make_optimizer("adamw", params),
            device=device,
        )

    first = pipeline("cuda")
    for step in range(3):
        x, y = batch(run, step)
        first.step(x.bfloat16().cuda(), target=y.cuda())
    state = first.state_dict()
    torch.save(state, tmp_path / "state.pt")
    second = pipeline("cpu")
    second.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
    for name, entry in second.state_dict()["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["optimizer"][name][key]).cpu()), key
    first.close()
    second.close()


def test_training_from_the_command_line(tmp_path: Path) -> None:
    result = execute(
        TrainConfig(stages=2, steps=6, batch_size=8, seq_len=32, device="cuda", dtype="bf16", out=str(tmp_path))
    )
    assert result is not None and result.steps == 6 and result.max_drift <= result.drift_bound
