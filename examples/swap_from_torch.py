"""The same training loop on torch.distributed.pipelining and on paci_rt: only the import changes.

``python examples/swap_from_torch.py`` starts two processes, one per stage, and trains three times: with torch's
Schedule1F1B, with paci_rt's (equal bit for bit), and with PACI, which takes the optimizer along because it steps while
the pipeline is full.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import paci_rt
from paci_rt import launch

STEPS, MICRO_BATCHES, WIDTH = 20, 4, 512


def make_module(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(8)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10)) if rank == 1 else nn.Sequential(*hidden)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(256, WIDTH, generator=generator), torch.randint(10, (256,), generator=generator)


def train_1f1b(rank: int, PipelineStage: Any, Schedule1F1B: Any) -> tuple[nn.Module, float]:
    """Written for torch.distributed.pipelining, and run as it is with either package's classes."""
    module = make_module(rank)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=nn.functional.cross_entropy)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    start = time.perf_counter()
    for step in range(STEPS):
        x, y = batch(step)
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    return module, time.perf_counter() - start


def train_paci(rank: int) -> tuple[nn.Module, float]:
    """The other change: the optimizer goes into the schedule, and a drain ends the run."""
    module = make_module(rank)
    stage = paci_rt.PipelineStage(module, rank, 2, torch.device("cpu"))
    optimizer = paci_rt.AdamW(module.parameters(), lr=1e-3)
    schedule = paci_rt.SchedulePACI(stage, MICRO_BATCHES, loss_fn=nn.functional.cross_entropy, optimizer=optimizer)
    start = time.perf_counter()
    for step in range(STEPS):
        x, y = batch(step)
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)
    schedule.drain()
    dist.barrier()
    return module, time.perf_counter() - start


def both_sides(ctx: launch.Context) -> dict[str, Any]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    theirs, torch_s = train_1f1b(ctx.rank, PipelineStage, Schedule1F1B)
    ours, ours_s = train_1f1b(ctx.rank, paci_rt.PipelineStage, paci_rt.Schedule1F1B)
    _, paci_s = train_paci(ctx.rank)
    equal = all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    return {"equal": equal, "torch 1F1B": torch_s, "paci_rt 1F1B": ours_s, "PACI": paci_s}


def main() -> None:
    results = launch.run(both_sides, 2)
    print("parameters after 1F1B equal torch's bit for bit:", all(result["equal"] for result in results))
    for name in ("torch 1F1B", "paci_rt 1F1B", "PACI"):
        print(f"{name:>13}: {STEPS * MICRO_BATCHES / results[0][name]:6.1f} micro-batches/s")


if __name__ == "__main__":
    main()
