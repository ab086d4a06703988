"""The toy model trained by several pipelines at once, each on its own rows of one global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import paci_rt
from support.toy import Run, batch, loss_fn, make_optimizer, module


@dataclass(frozen=True, kw_only=True)
class Replicated:
    """``replicas`` pipelines of ``run``; ``batch`` of it counts the rows of all."""

    run: Run
    replicas: int = 2
    shard: bool = False
    overlap: int | None = None
    clip: float | None = None
    on_nonfinite: str | None = None
    lr_scheduler: bool = False
    scale_grads: bool = True
    spoil: tuple[int, int, int] | None = None  # replica, window, row of its part: an infinite input
    dtype: str = "float32"
    same_rows: bool = False
    frozen: int | None = None  # a stage


def groups_of(given: Replicated) -> list[Any]:
    """Groups of all pipelines, then of all replicas; every process of the pool makes all of them."""
    ranks = given.run.stages // given.run.chunks
    pipes = [range(at * ranks, (at + 1) * ranks) for at in range(given.replicas)]
    others = [range(at, given.replicas * ranks, ranks) for at in range(ranks)]
    return [dist.new_group(list(one), backend="gloo") for one in (*pipes, *others)]


def rows(given: Replicated, step: int, replica: int) -> tuple[Tensor, Tensor]:
    """What one replica trains on: its part of the global batch."""
    x, y = batch(given.run, step)
    if not given.same_rows:
        x, y = x.tensor_split(given.replicas)[replica].clone(), y.tensor_split(given.replicas)[replica]
    if given.spoil is not None and given.spoil[:2] == (replica, step):
        x[given.spoil[2]] = float("nan")
    return x.to(getattr(torch, given.dtype)), y


def make(groups: list[Any], given: Replicated, *, shift: float = 0.0, **more: Any) -> tuple[Any, int]:
    """This process's schedule, and its replica; ``shift`` is added to a bias."""
    run = given.run
    replica, rank = divmod(dist.get_rank(), run.stages // run.chunks)
    pipe, others = groups[replica], groups[given.replicas + rank]
    here = run.places.stages_of(rank)
    modules: list[Any] = [module(at, run).to(getattr(torch, given.dtype)) for at in here]
    for one, at in zip(modules, here, strict=True):
        one[0].bias.data += shift
        one.requires_grad_(at != given.frozen)
    stages = [paci_rt.PipelineStage(one, at, run.stages, group=pipe) for one, at in zip(modules, here, strict=True)]
    optimizers = [make_optimizer(run.optimizer, stage.parameters()) for stage in stages]
    options: dict[str, Any] = {
        "replica_group": others,
        "shard_optimizer": given.shard,
        "overlap": given.overlap,
        "max_grad_norm": given.clip,
        "on_nonfinite": given.on_nonfinite,
        "slack": run.slack,
        "policy": run.policy,
        "lookahead": run.lookahead if run.lookahead or run.schedule.startswith("paci") else None,
        "transport": run.transport,
        "transfer_timeout_s": 30.0,
        "scale_grads": given.scale_grads,
        **more,
    }
    if given.lr_scheduler:
        options["lr_scheduler"] = [torch.optim.lr_scheduler.StepLR(one, 2, 0.5) for one in optimizers]
    schedule = paci_rt.get_schedule_class(run.schedule)(
        stages if run.chunks > 1 else stages[0], run.accumulation, loss_fn, optimizer=optimizers, **options
    )
    return schedule, replica


def drive(schedule: Any, given: Replicated, replica: int) -> dict[str, Any]:
    losses: list[Tensor] = []
    history: list[float] = []
    for step in range(given.run.windows):
        x, y = rows(given, step, replica)
        args = (x,) if schedule.has_first else ()
        schedule.step(*args, target=y if schedule.has_last else None, losses=losses)
        history += [float(loss) for loss in losses]
    schedule.drain()
    params = {
        f"{stage.stage_index}.{name}": p.detach().clone()
        for stage in schedule.stages
        for name, p in stage.named_parameters()
    }
    return {"params": params, "losses": history, "stats": schedule.stats(), "replica": replica}


def train_replica(rank: int, group: Any, given: Replicated) -> dict[str, Any] | None:
    """For all four processes of the pool; those that are not needed return None."""
    torch.manual_seed(0)
    groups = groups_of(given)
    if rank >= given.replicas * given.run.stages // given.run.chunks:
        return None
    schedule, replica = make(groups, given)
    try:
        return drive(schedule, given, replica)
    except paci_rt.PaciError as error:
        stages = schedule.stages
        finite = all(bool(param.isfinite().all()) for stage in stages for param in stage.parameters())
        return {"error": type(error).__name__, "text": str(error), "finite": finite, "replica": replica}
    finally:
        schedule.close()


def plain(given: Replicated, *, skip: int | None = None) -> dict[str, Tensor]:
    """No pipeline, no processes: each replica's micro-batches are summed, then these sums, in the order of replicas."""
    run, dtype = given.run, getattr(torch, given.dtype)
    pieces = [module(at, run).to(dtype) for at in range(run.stages)]
    model = nn.Sequential(*pieces)
    optimizers = [make_optimizer(run.optimizer, piece.parameters()) for piece in pieces]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 2, 0.5) for one in optimizers if given.lr_scheduler]
    params = list(model.parameters())
    for step in range(run.windows):
        sums = []
        for replica in range(given.replicas):
            x, y = rows(given, step, replica)
            for part, target in zip(x.tensor_split(run.accumulation), y.tensor_split(run.accumulation), strict=True):
                loss_fn(model(part), target).backward()
            sums.append([param.grad for param in params])
            for param in params:
                param.grad = None
        for at, param in enumerate(params):
            total = sums[0][at].clone()
            for other in sums[1:]:
                total += other[at]
            param.grad = total / (run.accumulation * given.replicas) if given.scale_grads else total
        if given.clip is not None:
            torch.nn.utils.clip_grad_norm_(params, given.clip)
        if step != skip:
            for optimizer in optimizers:
                optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        for param in params:
            param.grad = None
    return {f"{at}.{name}": p.detach() for at, piece in enumerate(pieces) for name, p in piece.named_parameters()}


def gathered(results: list[Any]) -> list[dict[str, Tensor]]:
    """Parameters of each replica."""
    found: dict[int, dict[str, Tensor]] = {}
    for one in filter(None, results):
        found.setdefault(one["replica"], {}).update(one["params"])
    return [found[at] for at in sorted(found)]


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    wrong = [name for name in one if not torch.equal(one[name], other[name])]
    assert not wrong, wrong
