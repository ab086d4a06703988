"""Pipelines whose processes are on GPUs, against the same pipeline in one process, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from toy import Run, loss_fn, make_optimizer, module, train

import paci_rt
from paci_rt import launch

RUNS = [
    Run(schedule="paci", stages=2, accumulation=3, lookahead=True, wide=True),
    Run(schedule="1f1b", stages=2, accumulation=4, eval_every=2),
    Run(schedule="zb-h1", stages=2, accumulation=4),
]


def options(run: Run) -> dict[str, Any]:
    return {"policy": run.policy, "lookahead": run.lookahead, "buffers": run.buffers}


def rank(ctx: launch.Context, run: Run, transport: str, devices: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_device(devices[ctx.rank])
    device = torch.device("cuda", devices[ctx.rank])
    stage = paci_rt.PipelineStage(module(ctx.rank, run), ctx.rank, run.stages, device)
    schedule = paci_rt.get_schedule_class(run.schedule)(
        stage,
        run.accumulation,
        loss_fn,
        optimizer=make_optimizer(run.optimizer, stage.parameters()),
        transport=transport,
        **options(run),
    )
    link = schedule._executor.transport
    done = train(schedule, run)
    done["params"] = {name: value.cpu() for name, value in done["params"].items()}
    return done, link.stats() if hasattr(link, "stats") else {}


def local(run: Run) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    pipe = paci_rt.LocalPipeline(
        [module(stage, run) for stage in range(run.stages)],
        schedule=run.schedule,
        n_microbatches=run.accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: make_optimizer(run.optimizer, params),
        device="cuda",
        **options(run),
    )
    done = train(pipe, run)
    done["params"] = {name: value.cpu() for name, value in done["params"].items()}
    return done


def compare(run: Run, transport: str, devices: list[int]) -> None:
    expected = local(run)
    results = launch.run(rank, run.stages, (run, transport, devices), threads=1, timeout_s=240.0)
    params = {name: value for done, _ in results for name, value in done["params"].items()}
    assert params.keys() == expected["params"].keys()
    assert all(torch.equal(params[name], expected["params"][name]) for name in params)
    assert results[-1][0]["losses"] == expected["losses"]
    assert all(stats["backends"] for _, stats in results)


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", ["nccl", "ipc", "auto"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.schedule)
def test_two_gpus_equal_one_process(run: Run, transport: str) -> None:
    compare(run, transport, [0, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.schedule)
def test_two_processes_on_one_gpu_equal_one_process_over_copies(run: Run) -> None:
    compare(run, "ipc", [0, 0])


@pytest.mark.gpu
def test_two_processes_on_one_gpu_over_nccl_where_it_allows_that() -> None:
    from paci_rt.transport.nccl import load_nccl

    allowed = load_nccl().features["multi_rank_gpu"] and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if allowed:
        compare(RUNS[0], "nccl", [0, 0])
        return
    with pytest.raises(paci_rt.PaciError, match="NCCL_MULTI_RANK_GPU_ENABLE"):
        compare(RUNS[0], "nccl", [0, 0])
