"""One run of a case in this process: exactly what a distributed run computes, and the held-back loss along the way.

All stages live in a :class:`paci_rt.LocalPipeline`, whose numbers are those of a distributed run to the bit. Every few
updates each stage leaves a copy of its weights the moment it has made that update. Together the copies are the model
that a drain at that point would leave, but no drain disturbs the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import paci_rt
from staleness.case import METHODS, Case, Method
from staleness.joined import join_windows, windows_joined
from staleness.rivals import RIVALS, RivalOptions, delay_scaled_rate, pipemare_rate
from staleness.tasks import Task, make_task
from staleness.variants import replaced

POINTS = 40  # measurements along a run
WEIGHT_DECAY, BETA2, MOMENTUM = 0.1, 0.95, 0.9
SGD_WEIGHT_DECAY = 1e-3  # times its learning rates, what AdamW's are times theirs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Named = list[tuple[str, nn.Parameter]]


def make_optimizer(task: Task, method: Method, lr: float, named: Named, beta2: float = BETA2) -> torch.optim.Optimizer:
    """The optimizer of one stage. Weight decay is on matrices and embeddings, none on vectors."""
    betas = (method.beta1, beta2)
    if method.optimizer in RIVALS:
        options = RivalOptions(lr=lr, weight_decay=WEIGHT_DECAY, betas=betas, is_hidden_matrix=task.is_hidden_matrix)
        return RIVALS[method.optimizer](named, options)
    matrices = [param for _, param in named if param.dim() >= 2]
    vectors = [param for _, param in named if param.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": SGD_WEIGHT_DECAY if method.optimizer == "sgd" else WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if method.optimizer == "muon":
        hidden = [param for name, param in named if task.is_hidden_matrix(name, param)]
        known = {id(param) for param in hidden}
        groups[0]["params"] = [param for param in matrices if id(param) not in known]
        groups = [{**group, "use_muon": False} for group in groups]
        groups.append({"params": hidden, "weight_decay": WEIGHT_DECAY, "use_muon": True})
    groups = [group for group in groups if group["params"]]
    if method.optimizer == "sgd":
        return paci_rt.SGD(groups, lr=lr, momentum=MOMENTUM)
    if method.optimizer == "lion":
        return paci_rt.Lion(groups, lr=lr)
    if method.optimizer == "muon":
        return paci_rt.Muon(groups, lr=lr, betas=betas)
    if method.optimizer == "nadam":
        return paci_rt.NAdam(groups, lr=lr, betas=betas)
    if method.optimizer == "adamw":
        return paci_rt.AdamW(groups, lr=lr, betas=betas)
    raise ValueError(f"unknown optimizer {method.optimizer!r}")


class StageRecorder:
    """What a stage does after each of its updates: move its learning rate on, and leave a copy where one is due.

    It stands where a pipeline expects a learning-rate scheduler.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: nn.Module,
        rate: Callable[[int], float],
        due: set[int],
        leave: Callable[[int, list[Tensor]], None],
    ) -> None:
        self._scheduler = LambdaLR(optimizer, rate)
        self._module, self._due, self._leave = module, due, leave
        self._updates = 0

    def step(self) -> None:
        self._scheduler.step()
        self._updates += 1
        if self._updates in self._due:
            self._leave(self._updates, [param.detach().clone() for param in self._module.parameters()])

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self._scheduler.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state["scheduler"])
        self._updates = state["updates"]


class Evaluator:
    """Held-back loss of the models that the stages' copies make."""

    def __init__(self, task: Task, case: Case) -> None:
        self._task = task
        self._modules = [module.to(case.device) for module in task.build(case.stages, case.seed)]
        self._x, self._y = (tensor.to(case.device) for tensor in task.held_back())
        self._copies: dict[int, dict[int, list[Tensor]]] = {}
        self.curve: list[tuple[int, float]] = []

    def take(self, stage: int, update: int, params: list[Tensor]) -> None:
        """One stage's weights after ``update``; measures once the copies of all stages are there."""
        copies = self._copies.setdefault(update, {})
        copies[stage] = params
        if len(copies) == len(self._modules):
            self.curve.append((update, self._loss(self._copies.pop(update))))

    @torch.no_grad()
    def _loss(self, copies: dict[int, list[Tensor]]) -> float:
        for stage, module in enumerate(self._modules):
            for param, value in zip(module.parameters(), copies[stage], strict=True):
                param.copy_(value)
        means = []
        for x, y in zip(self._x.chunk(4), self._y.chunk(4), strict=True):
            for module in self._modules:
                x = module(x)
            means.append(self._task.loss(x, y))
        return float(torch.stack(means).mean())


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a case.

    Attributes:
        curve: updates made and held-back loss then, from 0 on.
        diverged: it ended early, because the loss was NaN or far above where it began.
        max_drift: updates between forward and backward, at most, as counted.
        lookahead_share: seconds of look-ahead over seconds of computing.
    """

    case: Case
    curve: tuple[tuple[int, float], ...]
    diverged: bool
    max_drift: int
    lookahead_share: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {"key": self.case.key, **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Run:
        """What :meth:`to_json` wrote."""
        values = {name: value for name, value in record.items() if name != "key"}
        curve = tuple((int(update), float(loss)) for update, loss in record["curve"])
        return cls(**{**values, "case": Case(**record["case"]), "curve": curve})


def task_of(case: Case) -> Task:
    """What ``case`` trains."""
    return make_task(case.task, layers=case.layers, width=case.width, batch_size=case.batch_size, corpus=case.corpus)


def run(case: Case, *, points: int = POINTS, on_point: Callable[[int, float], None] | None = None) -> Run:
    """Run ``case`` to its end, or until it diverges.

    Args:
        points: measurements along the run.
        on_point: called with updates and loss at every measurement.
    """
    task, method = task_of(case), METHODS[case.method]
    modules = [module.to(case.device, DTYPES[case.dtype]) for module in task.build(case.stages, case.seed)]
    evaluator = Evaluator(task, case)
    for stage, module in enumerate(modules):
        evaluator.take(stage, 0, [param.detach().clone() for param in module.parameters()])
    every = max(1, case.updates // points)
    due = {*range(every, case.updates, every), case.updates}
    beta2 = BETA2 if case.beta2 is None else case.beta2
    optimizers = [make_optimizer(task, method, case.lr, list(module.named_parameters()), beta2) for module in modules]
    recorders = [
        StageRecorder(
            optimizer,
            module,
            stage_rate(case, method, stage),
            due,
            lambda update, params, stage=stage: evaluator.take(stage, update, params),
        )
        for stage, (optimizer, module) in enumerate(zip(optimizers, modules, strict=True))
    ]
    start, seen = time.perf_counter(), 0
    pipeline = _pipeline(case, method, task, modules, optimizers, recorders)
    worst = 2 * evaluator.curve[0][1]
    for update in range(case.updates):
        x, y = (tensor.to(case.device) for tensor in task.batch(update, case.seed))
        pipeline.step(x, target=y, return_outputs=False)
        if update < method.flush_updates or update + 1 == case.updates:
            pipeline.drain()
        for point in evaluator.curve[seen:]:
            if on_point is not None:
                on_point(*point)
        seen = len(evaluator.curve)
        if not evaluator.curve[-1][1] < worst:
            break
    stats = pipeline.stats()
    pipeline.close()
    return Run(
        case=case,
        curve=tuple(evaluator.curve),
        diverged=not evaluator.curve[-1][1] < worst,
        max_drift=int(stats["max_drift"]),
        lookahead_share=stats["lookahead_s"] / stats["compute_s"],
        seconds=time.perf_counter() - start,
    )


def _pipeline(
    case: Case,
    method: Method,
    task: Task,
    modules: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    recorders: list[StageRecorder],
) -> paci_rt.LocalPipeline:
    """All stages in this process, under ``method``."""
    with replaced(method.variant) if method.variant else nullcontext():
        pipeline = paci_rt.LocalPipeline(
            modules,
            schedule=method.schedule,
            policy=method.policy,
            lookahead=method.lookahead,
            n_microbatches=case.accumulation,
            loss_fn=task.loss,
            optimizer=optimizers,
            lr_scheduler=recorders,
            max_grad_norm=case.clip,
        )
    if method.joined is not None:
        join_windows(pipeline, pipeline._optimizers, case.accumulation)
    return pipeline


def stage_rate(case: Case, method: Method, stage: int) -> Callable[[int], float]:
    """Learning rate of one stage by update, as a share of ``case.lr``."""
    behind = case.stages - 1 - stage
    if method.joined is not None:
        factor = windows_joined(behind, case.accumulation) ** method.joined
        return lambda update: factor * case.rate(update)
    if method.rates == "pipemare":
        # Its own count of delay: micro-batches between a forward and the end of its backward, in updates.
        rule = pipemare_rate((2 * behind + 1) / case.accumulation, max(1, case.updates // 4))
    elif method.rates == "delay-scaled":
        rule = delay_scaled_rate(behind / case.accumulation)
    elif method.rates == "same":
        return case.rate
    else:
        raise ValueError(f"unknown rates {method.rates!r}: use same, pipemare or delay-scaled")
    return lambda update: case.rate(update) * rule(update)


def perplexity(loss: float) -> float:
    """Of a loss in nats."""
    return math.exp(min(loss, 700.0))
