"""One pipeline, run for some windows: its trace, how long the host took to issue it, and its memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from onegpu.place import Place
from paci_rt import schedules
from paci_rt.schedules import ScheduleFamily, Shape, StepCosts
from paci_rt.trace import Event


@dataclass(frozen=True, kw_only=True)
class Model:
    """A stack of residual layers, the same in every stage.

    Attributes:
        hidden: width. layers: linear layers a stage. tokens: rows of a micro-batch.
        dtype: of parameters and activations; masters, moments and sums are fp32.
    """

    hidden: int
    layers: int
    tokens: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline to measure.

    Attributes:
        schedule: its name.
        stages, accumulation, slack: integers of the schedule.
        costs: what a searched schedule is fitted to.
    """

    schedule: str
    stages: int
    accumulation: int
    slack: int = 0
    costs: StepCosts | None = None

    @property
    def label(self) -> str:
        return self.schedule + (f"+slack{self.slack}" if self.slack else "")

    @property
    def family(self) -> ScheduleFamily:
        return schedules.get(self.schedule)

    @property
    def shape(self) -> Shape:
        costs = StepCosts() if self.costs is None else self.costs
        return Shape(num_stages=self.stages, accumulation=self.accumulation, slack=self.slack, costs=costs)

    @property
    def warm_up(self) -> int:
        """Windows until every stage has left its own warm-up behind."""
        return 1 + -(-(self.stages + self.slack) // self.accumulation)

    @property
    def lag(self) -> int:
        """Windows after which a window's last update comes."""
        return 0 if self.family.flush else -(-(self.stages - 1 + self.slack) // self.accumulation)

    @property
    def actions_per_micro_batch(self) -> float:
        """Compute actions, updates among them, of all stages."""
        return self.stages * ((3 if self.family.split else 2) + 1 / self.accumulation)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a run shows.

    Attributes:
        events: of all windows, those of warm-up and drain included.
        host_s: seconds in which the host issues a micro-batch's actions to an idle device; None on the CPU, where
            issuing and computing are the same.
        peak_bytes: most device memory in use; None on the CPU.
        stats: of ``LocalPipeline``.
    """

    events: list[Event]
    host_s: float | None
    peak_bytes: int | None
    stats: dict[str, Any]


class Block(nn.Module):
    """``x + gelu(x W^T)``."""

    def __init__(self, model: Model, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(model.hidden, model.hidden, bias=False, device=device, dtype=model.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.linear(x))


def make_modules(model: Model, stages: int, device: torch.device) -> list[nn.Module]:
    """One module per stage, with weights that are always the same on one kind of device."""
    torch.manual_seed(0)
    return [nn.Sequential(*(Block(model, device) for _ in range(model.layers))) for _ in range(stages)]


def make_batch(model: Model, accumulation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and target of a window, both ``[accumulation * tokens, hidden]``."""
    torch.manual_seed(1)
    shape = (accumulation * model.tokens, model.hidden)
    return torch.randn(shape, device=device, dtype=model.dtype), torch.randn(shape, device=device, dtype=model.dtype)


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Next to no work, so that the last stage has no more than the others, and a gradient like any other."""
    return torch.dot(output.flatten(), target.flatten())


def run(
    case: Case,
    modules: Sequence[nn.Module],
    batch: tuple[Tensor, Tensor],
    place: Place,
    *,
    latency_us: int,
    windows: int,
) -> Sample:
    """Run ``windows`` windows after the warm-up, and one more to see how fast the host is.

    Nothing waits for the device between the first window and the last but the host, for the step before the last.
    """
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=case.schedule,
        n_microbatches=case.accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-5),
        slack=case.slack,
        costs=case.costs,
        lookahead=False,  # what it costs and gives is for convergence.py to say
        device=place.device,
        streams=place.streams,
        update_streams=place.update_streams,
        transport=place.transport(latency_us),
        trace=True,
    )
    try:
        place.wait()  # the pipeline was made on another stream
        place.reset_peak()
        steps = case.warm_up + windows + case.lag
        for step in range(steps):
            with place.feeding(step):
                pipe.step(batch[0], target=batch[1], return_outputs=False)
        _drain(pipe, place, steps)
        events, peak_bytes, stats = list(pipe.events), place.peak_bytes(), pipe.stats()
        host_s = _host_s(pipe, case, batch, place) if place.streams is not None else None
        _drain(pipe, place, steps)
    finally:
        place.wait()
        pipe.close()
    del pipe
    gc.collect()  # what a pipeline holds goes now, and not while the next one is being measured
    return Sample(events=events, host_s=host_s, peak_bytes=peak_bytes, stats=stats)


def _drain(pipe: paci_rt.LocalPipeline, place: Place, step: int) -> None:
    with place.feeding(step):
        pipe.drain()
    place.wait()


def _host_s(pipe: paci_rt.LocalPipeline, case: Case, batch: tuple[Tensor, Tensor], place: Place) -> float:
    """See :class:`Sample`: with nothing queued, no call waits for room in a queue."""
    before = len(pipe.events)
    with place.feeding(0):
        start = time.perf_counter()
        pipe.step(batch[0], target=batch[1], return_outputs=False)
        issued_s = time.perf_counter() - start
    return issued_s / (len(pipe.events) - before) * case.actions_per_micro_batch
