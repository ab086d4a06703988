"""Pipelines whose processes are on GPUs, against the same pipeline in one process, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt import launch
from paci_rt.schedules.channel import Channel
from paci_rt.transport import Message
from support.deadlines import deadline
from support.toy import Run, loss_fn, make_optimizer, module, train

DOWN, UP = Channel("F", 0, 1), Channel("B", 1, 0)

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
    results = launch.run(rank, run.stages, (run, transport, devices), threads=1, timeout_s=deadline(240.0))
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

    known = load_nccl().features["multi_rank_gpu"]
    if known and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        compare(RUNS[0], "nccl", [0, 0])
        return
    # Before 2.30 the remedy is another NCCL or another transport, after it the variable.
    with pytest.raises(paci_rt.PaciError, match=r"both processes are on one GPU .* which NCCL allows (from|with) "):
        compare(RUNS[0], "nccl", [0, 0])


def stages_of_one_process(ctx: launch.Context, transport: str) -> dict[str, str]:
    """Messages between two stages of this process, whose tensors are let go at once and written over."""
    from paci_rt.transport.ipc import IpcTransport
    from paci_rt.transport.nccl import NcclTransport

    device = torch.device("cuda", 0)
    make = {"nccl": NcclTransport, "ipc": IpcTransport}[transport]
    link = make(None, num_stages=2, chunks=2, device=device)
    link.open([UP])
    link.open([DOWN])
    got = []
    for at in range(40):
        size = 1 + at * 3001
        link.send(DOWN, at, Message((torch.full((size,), float(at), device=device),), (False,)))
        torch.full((size,), -1.0, device=device)  # takes the same memory, if it is free too early
        got.append(link.recv(DOWN, at).tensors[0])
    link.flush()
    torch.cuda.synchronize()
    for at, tensor in enumerate(got):
        assert tensor is not None and torch.equal(tensor, torch.full_like(tensor, float(at)))
    backends: dict[str, str] = link.stats()["backends"]
    link.close()
    return backends


@pytest.mark.gpu
@pytest.mark.parametrize(("transport", "backend"), [("nccl", "self-nccl"), ("ipc", "self-copy")])
def test_two_stages_of_one_process_on_one_gpu(transport: str, backend: str) -> None:
    (backends,) = launch.run(stages_of_one_process, 1, (transport,), timeout_s=deadline(120.0))
    assert set(backends.values()) == {backend}


def recorded(ctx: launch.Context) -> list[float]:
    """A hop down and a hop up within a CUDA graph, replayed; what rank 0 gets back."""
    from paci_rt.transport.nccl import NcclTransport

    device = torch.device("cuda", ctx.rank)
    torch.cuda.set_device(device)
    link = NcclTransport(None, num_stages=2, device=device)
    link.open([UP if ctx.rank == 0 else DOWN])
    value, back = torch.zeros(1 << 16, device=device), []

    def hop(at: int) -> None:
        if ctx.rank == 0:
            link.send(DOWN, at, Message((value + 1,), (False,)))
            (tensor,) = link.recv(UP, at).tensors
            assert tensor is not None
            value.copy_(tensor)
        else:
            (tensor,) = link.recv(DOWN, at).tensors
            assert tensor is not None
            link.send(UP, at, Message((tensor * 2,), (False,)))
        link.flush()

    hop(0)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    value.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hop(1)
    for _ in range(3):
        graph.replay()
        back.append(float(value[-1]))
    torch.cuda.synchronize()
    torch.distributed.barrier()
    del graph
    link.close()
    return back


@pytest.mark.multigpu
def test_transfers_within_a_recorded_graph() -> None:
    results = launch.run(recorded, 2, timeout_s=deadline(180.0))
    assert results[0] == [2.0, 6.0, 14.0]
