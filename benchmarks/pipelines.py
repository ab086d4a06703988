"""Stages for the throughput benchmark: a real GPT, or sleeps in place of its kernels; ours, or torch's runtime."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import paci_rt
from paci_rt.train.gpt import MODELS, build_stage

PR_SET_TIMERSLACK = 29
PEERS = ("torch-1f1b", "torch-1f1b-fused")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline to measure.

    Attributes:
        schedule: a schedule of paci_rt, or one of ``PEERS``: ``torch.distributed.pipelining.Schedule1F1B`` with
            ``torch.optim.AdamW`` as its tutorial writes it, or with ``fused=True``, the fastest that torch has.
        emulate_ms: forward and backward milliseconds that a sleep takes instead of the model, or None.
        message_bytes: size of what emulated stages exchange.
        rows, seq_len: sequences a micro-batch and tokens a sequence of the real model.
    """

    schedule: str
    stages: int
    accumulation: int
    slack: int
    model: str
    rows: int
    seq_len: int
    emulate_ms: tuple[float, float] | None
    message_bytes: int

    @property
    def label(self) -> str:
        return self.schedule + (f"+slack{self.slack}" if self.slack else "")


class _Sleep(torch.autograd.Function):
    """Sleeps where a stage would compute; messages have the real size and unspecified contents."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward_s: float, backward_s: float, numel: int) -> Tensor:
        ctx.backward_s, ctx.shape = backward_s, x.shape
        time.sleep(forward_s)
        return torch.empty(1, numel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        time.sleep(ctx.backward_s)
        return torch.empty(ctx.shape), torch.zeros(1), None, None, None


class EmulatedStage(nn.Module):
    def __init__(self, forward_s: float, backward_s: float, message_bytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.forward_s, self.backward_s, self.numel = forward_s, backward_s, max(1, message_bytes // 4)

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self.forward_s, self.backward_s, self.numel)  # type: ignore[no-any-return]


def _first_element(output: Tensor, _target: Tensor) -> Tensor:
    return output.view(-1)[0] * 0.0


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.view(-1, output.shape[-1]), target.view(-1))


class Pipe:
    """One stage of one case, ready to step; the same face for our schedules and torch's."""

    def __init__(self, case: Case, rank: int, *, trace: bool = False) -> None:
        self.case, self.rank, self.trace = case, rank, trace
        self.is_first, self.is_last = rank == 0, rank == case.stages - 1
        if case.emulate_ms is None:
            config = MODELS[case.model]
            module: nn.Module = build_stage(config, rank, case.stages, seed=0, dtype=torch.float32)
            shape = (case.rows * case.accumulation, case.seq_len)
            generator = torch.Generator().manual_seed(1)
            self.x = torch.randint(config.vocab_size, shape, generator=generator)
            self.y = torch.randint(config.vocab_size, shape, generator=generator)
        else:
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # sleeps end within microseconds
            forward_ms, backward_ms = case.emulate_ms
            module = EmulatedStage(forward_ms / 1e3, backward_ms / 1e3, case.message_bytes)
            self.x = torch.zeros(case.accumulation, max(1, case.message_bytes // 4))
            self.y = torch.zeros(case.accumulation, 1)
        loss_fn = cross_entropy if case.emulate_ms is None else _first_element
        build = self._build_torch if case.schedule in PEERS else self._build_ours
        build(module, loss_fn)

    def _build_ours(self, module: nn.Module, loss_fn: Any) -> None:
        stage = paci_rt.PipelineStage(module, self.rank, self.case.stages, "cpu")
        optimizer = paci_rt.AdamW(stage.parameters(), lr=1e-4)
        cls = paci_rt.get_schedule_class(self.case.schedule)
        self.schedule: Any = cls(
            stage,
            self.case.accumulation,
            loss_fn,
            optimizer=optimizer,
            slack=self.case.slack,
            trace=self.trace,
        )
        self.optimizer: Any = None

    def _build_torch(self, module: nn.Module, loss_fn: Any) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        stage = PipelineStage(module, self.rank, self.case.stages, torch.device("cpu"))
        self.schedule = Schedule1F1B(stage, self.case.accumulation, loss_fn)
        fused = True if self.case.schedule == "torch-1f1b-fused" else None
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=fused)

    def step(self) -> None:
        args = (self.x,) if self.is_first else ()
        target = self.y if self.is_last else None
        losses: list[Tensor] | None = [] if self.is_last else None
        self.schedule.step(*args, target=target, losses=losses, return_outputs=False)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self, windows: int) -> dict[str, float]:
        """Seconds for ``windows`` windows in the steady state, and what the stage counted meanwhile."""
        ours = self.optimizer is None
        # Until every stage has left its warm-up behind, whose waiting is not the steady state's.
        for _ in range(1 + -(-(self.case.stages + self.case.slack) // self.case.accumulation)):
            self.step()
        if ours:
            self.schedule.reset_stats()
        start = time.perf_counter()
        for _ in range(windows):
            self.step()
        wall_s = time.perf_counter() - start
        stats = self.schedule.stats() if ours else {}
        if ours:
            self.schedule.drain()
        dist.barrier()
        return {
            "wall_s": wall_s,
            "compute_s": stats.get("compute_s", float("nan")),
            "exposed_comm_s": stats.get("exposed_comm_s", float("nan")),
            "max_drift": stats.get("max_drift", 0),
            "peak_weight_and_activation_bytes": _weights_and_activations(stats),
        }


def _weights_and_activations(stats: dict[str, Any]) -> int:
    parts = next(iter(stats.get("memory", {}).values()), None)
    return 0 if parts is None else parts["total"]
