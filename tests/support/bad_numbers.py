"""Models that bring forth numbers that are not finite at a chosen micro-batch, and runs over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.schedules import FAMILIES, Placement
from support.toy import make_optimizer

WIDTH, ROWS, OUT = 6, 12, 3
FLUSHES = [name for name, family in FAMILIES.items() if family.flush]
CHUNKED = tuple(name for name, family in FAMILIES.items() if family.placement != "line")


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Spoiled(nn.Module):
    """A layer whose own gradient alone is multiplied by ``factor`` in micro-batch ``at``."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.9, 1.1, WIDTH))
        self._at, self._factor, self._count = at, factor, 0

    def forward(self, x: Tensor) -> Tensor:
        factor = self._factor if self._count == self._at else 1.0
        self._count += 1
        return x * _Spoil.apply(self.scale, factor)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A run in which one stage or the input spoils a micro-batch.

    Attributes:
        stage: whose own gradient is not finite in micro-batch ``at``; None where a number of the batch is: of the input
            where ``factor`` is NaN, else of the target.
    """

    schedule: str = "paci"
    stages: int = 3
    accumulation: int = 4
    windows: int = 6
    stage: int | None = None
    at: int | None = None
    factor: float = float("nan")
    optimizer: str = "adamw"
    clip: float | None = None
    on_nonfinite: str | None = "skip-window"
    lookahead: bool = False
    transport: str = "auto"
    dtype: str = "float32"


def modules(run: Bad) -> list[nn.Module]:
    found: list[nn.Module] = []
    for stage in range(run.stages):
        torch.manual_seed(50 + stage)
        spoils = run.at if run.stage == stage and run.at is not None else -1
        out = OUT if stage == run.stages - 1 else WIDTH
        last = nn.Linear(WIDTH, out, bias=stage % 2 == 0)
        layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Spoiled(spoils, run.factor), last)
        found.append(layers.to(getattr(torch, run.dtype)))
    return found


def batch(run: Bad, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator) * (1 + step % 3)
    y = torch.randn(ROWS, OUT, generator=generator) * 3
    if run.stage is None and run.at is not None and run.at // run.accumulation == step:
        whole = x if run.factor != run.factor else y  # layers turn an infinite input into a finite output
        whole.tensor_split(run.accumulation)[run.at % run.accumulation][-1, 1] = run.factor
    dtype = getattr(torch, run.dtype)
    return x.to(dtype), y.to(dtype)


def chunks(run: Bad) -> int:
    return 2 if run.schedule in CHUNKED else 1


def options(run: Bad) -> dict[str, Any]:
    found: dict[str, Any] = {"on_nonfinite": run.on_nonfinite, "max_grad_norm": run.clip}
    return found if run.schedule in FLUSHES else {**found, "lookahead": run.lookahead}


def drive(pipe: Any, run: Bad, begin: int = 0) -> dict[str, Any]:
    losses: list[Tensor] = []
    history: list[float] = []
    for step in range(begin, run.windows):
        x, y = batch(run, step)
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None, losses=losses)
        history += [float(loss) for loss in losses]
    pipe.drain()
    params = {
        f"{stage.stage_index}.{name}": param.detach().clone()
        for stage in pipe.stages
        for name, param in stage.named_parameters()
    }
    return {"params": params, "losses": history, "stats": pipe.stats()}


def local(run: Bad, **more: Any) -> paci_rt.LocalPipeline:
    given = {**options(run), "chunks": chunks(run), **more}
    return paci_rt.LocalPipeline(
        modules(run),
        schedule=run.schedule,
        n_microbatches=run.accumulation,
        loss_fn=nn.MSELoss(),
        optimizer=lambda params: make_optimizer(run.optimizer, params),
        **given,
    )


def on_rank(rank: int, group: Any, run: Bad) -> dict[str, Any]:
    places = Placement(num_stages=run.stages, chunks=chunks(run), name=FAMILIES[run.schedule].placement)
    here = places.stages_of(rank)
    pieces = modules(run)
    stages = [paci_rt.PipelineStage(pieces[at], at, run.stages, group=group) for at in here]
    schedule = paci_rt.get_schedule_class(run.schedule)(
        stages if chunks(run) > 1 else stages[0],
        run.accumulation,
        nn.MSELoss(),
        optimizer=[make_optimizer(run.optimizer, stage.parameters()) for stage in stages],
        transport=run.transport,
        transfer_timeout_s=30.0,
        **options(run),
    )
    try:
        return drive(schedule, run)
    except paci_rt.ActionError as error:
        finite = all(bool(param.isfinite().all()) for stage in stages for param in stage.parameters())
        return {"error": type(error).__name__, "text": str(error), "finite": finite}
    finally:
        schedule.close()


def plain(run: Bad, *, skip: int | None) -> dict[str, Tensor]:
    """No pipeline: the whole model, a window's gradients divided and clipped by torch, no step for window ``skip``."""
    pieces = modules(run)
    model = nn.Sequential(*pieces)
    optimizer = make_optimizer(run.optimizer, model.parameters())
    for step in range(run.windows):
        x, y = batch(run, step)
        for part, target in zip(x.tensor_split(run.accumulation), y.tensor_split(run.accumulation), strict=True):
            nn.functional.mse_loss(model(part), target).backward()
        for param in model.parameters():
            assert param.grad is not None
            param.grad.div_(run.accumulation)
        if step != skip:
            if run.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            optimizer.step()
        optimizer.zero_grad()
    return {f"{at}.{name}": p.detach() for at, piece in enumerate(pieces) for name, p in piece.named_parameters()}
