"""A small model cut into stages, trained the same way in one process, in several, and without a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.schedules import Placement, Shape, get

WIDTH, CLASSES = 16, 5


@dataclass(frozen=True, kw_only=True)
class Run:
    schedule: str
    stages: int  # pieces of the model; with chunks, there are stages // chunks ranks
    accumulation: int
    windows: int = 5
    slack: int | tuple[int, ...] = 0
    chunks: int = 1
    policy: str | None = None
    lookahead: bool = False
    optimizer: str = "adamw"
    batch: int = 12
    buffers: int = 1
    wide: bool = False  # outputs too large for an inline message
    eval_every: int = 0
    transport: str = "auto"  # between processes

    def __post_init__(self) -> None:
        if get(self.schedule).placement == "v" and self.chunks == 1:  # two pieces a rank
            object.__setattr__(self, "chunks", 2)
            object.__setattr__(self, "stages", 2 * self.stages)

    @property
    def places(self) -> Placement:
        return Placement(num_stages=self.stages, chunks=self.chunks, name=get(self.schedule).placement)

    @property
    def shape(self) -> Shape:
        family = get(self.schedule)
        accumulation = 1 if family.one_micro_batch_windows else self.accumulation
        placement = family.placement
        return Shape(num_stages=self.stages, accumulation=accumulation, chunks=self.chunks, placement=placement)


def module(stage: int, run: Run) -> nn.Module:
    torch.manual_seed(100 + stage)
    width = 700 if run.wide else WIDTH
    first = nn.Linear(WIDTH if stage == 0 else width, width)
    last = nn.Linear(width, CLASSES if stage == run.stages - 1 else width)
    return nn.Sequential(first, nn.LayerNorm(width), nn.GELU(), last)


def make_muon(params: Any, **options: Any) -> paci_rt.Muon:
    """Muon for all matrices among parameters or pairs of name and parameter."""
    tensors = [param if isinstance(param, Tensor) else param[1] for param in params]
    groups = [
        {"params": [p for p in tensors if (p.dim() == 2) == use_muon], "use_muon": use_muon}
        for use_muon in (True, False)
    ]
    return paci_rt.Muon([group for group in groups if group["params"]], **{"lr": 1e-2, **options})


def make_optimizer(kind: str, params: Any) -> torch.optim.Optimizer:
    if kind == "adamw":
        return paci_rt.AdamW(params, lr=1e-2, weight_decay=0.1)
    if kind == "nadam":
        return paci_rt.NAdam(params, lr=1e-2, weight_decay=0.1)
    if kind == "lion":
        return paci_rt.Lion(params, lr=1e-3, weight_decay=0.1)
    if kind == "muon":
        return make_muon(params)
    if kind == "sgd":
        return paci_rt.SGD(params, lr=1e-2, momentum=0.9)
    if kind == "torch-adamw":
        return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    assert kind == "torch-sgd"
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    rows = run.batch + (step % 2 if run.wide else 0)  # shapes that change from step to step
    return torch.randn(rows, WIDTH, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def train(pipe: Any, run: Run) -> dict[str, Any]:
    """Drive any pipeline over ``run.windows`` batches; what every test wants to know comes back."""
    losses: list[Tensor] = []
    history: list[float] = []
    for step in range(run.windows):
        x, y = batch(run, step)
        args = (x,) if pipe.has_first else ()
        pipe.step(*args, target=y if pipe.has_last else None, losses=losses if pipe.has_last else None)
        history += [float(loss) for loss in losses]
        if run.eval_every and (step + 1) % run.eval_every == 0:
            pipe.eval(*args, target=y if pipe.has_last else None, losses=losses if pipe.has_last else None)
            history += [float(loss) for loss in losses]
    pipe.drain()
    params = {
        f"{stage.stage_index}.{name}": p.detach().clone()
        for stage in pipe.stages
        for name, p in stage.named_parameters()
    }
    stats = pipe.stats()
    pipe.close()
    return {"params": params, "losses": history, "stats": stats}


def train_rank(rank: int, group: Any, run: Run) -> dict[str, Any]:
    torch.manual_seed(0)
    here = run.places.stages_of(rank)
    stages = [paci_rt.PipelineStage(module(at, run), at, run.stages, "cpu", group=group) for at in here]
    schedule = paci_rt.get_schedule_class(run.schedule)(
        stages if run.chunks > 1 else stages[0],
        run.accumulation,
        loss_fn,
        optimizer=[make_optimizer(run.optimizer, stage.parameters()) for stage in stages],
        slack=run.slack,
        policy=run.policy,
        lookahead=run.lookahead,
        buffers=run.buffers,
        transport=run.transport,
    )
    return train(schedule, run)


def train_local(run: Run, **options: Any) -> dict[str, Any]:
    pipe = paci_rt.LocalPipeline(
        [module(stage, run) for stage in range(run.stages)],
        schedule=run.schedule,
        n_microbatches=run.accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: make_optimizer(run.optimizer, params),
        chunks=run.chunks,
        slack=run.slack,
        policy=run.policy,
        lookahead=run.lookahead,
        buffers=run.buffers,
        **options,
    )
    return train(pipe, run)


def sha(params: dict[str, Tensor]) -> str:
    return paci_rt.params_sha256(sorted(params.items()))
