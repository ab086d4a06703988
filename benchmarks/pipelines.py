"""Stages for the throughput benchmark: a real GPT, or sleeps in place of its kernels; ours, or torch's runtime."""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import paci_rt
from common import positive
from delayed import DelayedTransport
from emulated import EmulatedPipelineStage, EmulatedStage, Messages
from paci_rt import launch
from paci_rt.schedules import Slack
from paci_rt.schedules.placement import V
from paci_rt.schedules.slack import slack_by_stage, slack_text
from paci_rt.train.gpt import MODELS, build_stage
from paci_rt.transport import make_transport
from peers import FUSED, PEERS, SavedBytes, make, places_of, state_bytes

PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline to measure.

    Attributes:
        schedule: a schedule of paci_rt, or one of ``PEERS``: that of ``torch.distributed.pipelining`` with
            ``torch.optim.AdamW`` as its tutorial writes it, or with ``fused=True``, the fastest that torch has.
        stages, chunks: processes, and pieces of the model in each.
        slack, policy, costs, activation_limit: as for ``paci_rt.SchedulePACI`` and ``paci_rt.SchedulePACIV``.
        hop_ms: milliseconds that each message takes at least, emulated (``delayed.py``); 0 leaves the transport alone.
        emulate_ms: milliseconds of a process for one micro-batch that a sleep takes instead of the model: forward and
            backward, or forward, I and W; None for the real model.
        message_bytes: size of what emulated stages exchange.
        activation_bytes: what an emulated process keeps of a micro-batch from its F to its I, both pieces together.
        transport: how the stages of paci_rt's schedules reach each other; torch's go over gloo.
        rows, seq_len: sequences per micro-batch and tokens per sequence of the real model.
    """

    schedule: str
    stages: int
    accumulation: int
    slack: Slack = 0
    hop_ms: float = 0.0
    chunks: int = 1
    policy: str | None = None
    costs: paci_rt.StepCosts | None = None
    activation_limit: float | None = None
    model: str = ""
    rows: int = 1
    seq_len: int = 1
    emulate_ms: tuple[float, ...] | None = None
    message_bytes: int = 1024
    activation_bytes: int = 0
    transport: str = "auto"

    @property
    def label(self) -> str:
        extras = [self.policy] if self.policy else []
        extras += [f"slack{slack_text(self.slack)}"] if self.slack else []
        limit = "" if self.activation_limit is None else f"@{self.activation_limit:g}"
        return self.with_hop("+".join([self.schedule + limit, *extras]))

    def with_hop(self, name: str) -> str:
        """``name`` over the links of this case."""
        return f"{name}+hop{self.hop_ms:g}ms" if self.hop_ms else name

    @property
    def windows_to_steady(self) -> int:
        """Windows until every stage has left its warm-up behind."""
        first = slack_by_stage(self.slack, self.stages)[0]  # no stage runs further ahead
        ahead = self.stages * (2 if self.placed["placement"] == V else 1) + first
        return 1 + -(-ahead // self.accumulation)

    @property
    def pieces(self) -> int:
        """Stages of the whole pipeline, those of all ranks."""
        return self.stages * self.chunks

    @property
    def placed(self) -> dict[str, Any]:
        """Which of them each rank has, as a transport takes it."""
        return {"chunks": self.chunks, "placement": places_of(self.schedule, self.stages, self.chunks).name}

    @property
    def numbers(self) -> int:
        """fp32 numbers in a message of emulated stages."""
        return max(1, self.message_bytes // 4)


def _first_element(output: Tensor, _target: Tensor) -> Tensor:
    return output.view(-1)[0] * 0.0


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.view(-1, output.shape[-1]), target.view(-1))


def _transport(case: Case, stages: list[paci_rt.PipelineStage]) -> DelayedTransport | str:
    """The case's transport, behind links with latency where it asks for them."""
    if not case.hop_ms:
        return case.transport
    inner = make_transport(case.transport, group=stages[0].group, num_stages=case.pieces, **case.placed)
    return DelayedTransport(inner, case.hop_ms / 1e3)


class Pipe:
    """One stage of one case, ready to step; the same face for our schedules and torch's."""

    def __init__(self, case: Case, rank: int, *, trace: bool = False) -> None:
        self.case, self.rank, self.trace = case, rank, trace
        places = places_of(case.schedule, case.stages, case.chunks)
        self.pieces = list(places.stages_of(rank))
        self.is_first, self.is_last = rank == 0, rank == places.last_rank
        self.saved: SavedBytes | None = None
        self.optimizer: Any = None
        if case.emulate_ms is None:
            config = MODELS[case.model]
            shape = (case.rows * case.accumulation, case.seq_len)
            generator = torch.Generator().manual_seed(1)
            self.x = torch.randint(config.vocab_size, shape, generator=generator)
            self.y = torch.randint(config.vocab_size, shape, generator=generator)
        else:
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # sleeps end within microseconds
            self.x = torch.zeros(case.accumulation, case.numbers)
            self.y = torch.zeros(case.accumulation, 1)
        loss_fn = cross_entropy if case.emulate_ms is None else _first_element
        if case.schedule in PEERS:
            self._build_torch(loss_fn)
        else:
            self._build_ours(loss_fn)

    def _module(self, piece: int) -> nn.Module:
        case = self.case
        if case.emulate_ms is None:
            return build_stage(MODELS[case.model], piece, case.pieces, seed=0, dtype=torch.float32)
        forward_ms, backward_ms = (ms / case.chunks for ms in case.emulate_ms)
        return EmulatedStage(forward_ms / 1e3, backward_ms / 1e3, self._messages(piece))

    def _messages(self, piece: int) -> Messages:
        return Messages(self.case.numbers, last=piece == self.case.pieces - 1)

    def _stage(self, piece: int) -> paci_rt.PipelineStage:
        case = self.case
        place = (piece, case.pieces, "cpu")
        if case.emulate_ms is None or len(case.emulate_ms) == 2:
            return paci_rt.PipelineStage(self._module(piece), *place)
        forward_s, input_grad_s, weight_grad_s = (ms / 1e3 / case.chunks for ms in case.emulate_ms)
        times_s = (forward_s, input_grad_s, weight_grad_s)
        return EmulatedPipelineStage(times_s, self._messages(piece), case.activation_bytes // case.chunks, *place)

    def _build_ours(self, loss_fn: Any) -> None:
        case = self.case
        stages = [self._stage(piece) for piece in self.pieces]
        cls = paci_rt.get_schedule_class(case.schedule)
        self.schedule: Any = cls(
            stages,
            case.accumulation,
            loss_fn,
            optimizer=[paci_rt.AdamW(stage.parameters(), lr=1e-4) for stage in stages],
            slack=case.slack,
            policy=case.policy,
            costs=case.costs,
            activation_limit=case.activation_limit,
            transport=_transport(case, stages),
            lookahead=False,  # what it costs and gives is for convergence.py to say
            trace=self.trace,
        )

    def _build_torch(self, loss_fn: Any) -> None:
        case = self.case
        modules = [self._module(piece) for piece in self.pieces]
        self.schedule = make(case.schedule, modules, self.pieces, case.pieces, case.accumulation, loss_fn)
        self.params = [param for module in modules for param in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=True if case.schedule == FUSED else None)

    def _peak_bytes(self) -> int:
        """What torch's schedule takes, counted in a step that is not measured."""
        if self.saved is None:
            self.saved = SavedBytes(self.params)
            with self.saved:
                self.step()
        return self.saved.peak_bytes + state_bytes(self.params, self.optimizer)

    def step(self) -> None:
        args = (self.x,) if self.is_first else ()
        target = self.y if self.is_last else None
        losses: list[Tensor] | None = [] if self.is_last else None
        self.schedule.step(*args, target=target, losses=losses, return_outputs=False)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self, windows: int) -> dict[str, Any]:
        """Seconds for ``windows`` windows in the steady state, and what the stage counted meanwhile."""
        ours = self.optimizer is None
        # Until every stage has left its warm-up behind, whose waiting is not the steady state's.
        for _ in range(self.case.windows_to_steady):
            self.step()
        peak_bytes = 0 if ours else self._peak_bytes()
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
            "transport": stats.get("transport", "gloo"),
            "compute_s": stats.get("compute_s", float("nan")),
            "exposed_comm_s": stats.get("exposed_comm_s", float("nan")),
            "max_drift": stats.get("max_drift", 0),
            "peak_weight_and_activation_bytes": stats.get("peak_bytes", peak_bytes),
            "stats": stats,
        }


Measured = dict[Case, list[dict[str, Any]]]
"""What :meth:`Pipe.measure` found, by case and repeat."""


def measure(ctx: launch.Context, cases: list[Case], windows: int, repeats: int, trace: bool = False) -> Measured:
    """Run by every process: all cases, in alternation; the first round warms up.

    Args:
        trace: keep each repeat's events, under the key ``events``.
    """
    pipes = {case: Pipe(case, ctx.rank, trace=trace) for case in cases}
    results: Measured = defaultdict(list)
    for round_number in range(repeats + 1):
        for case, pipe in pipes.items():
            if trace:
                pipe.schedule.events.clear()
            measured = pipe.measure(windows if round_number else 1)
            if round_number:
                results[case].append({**measured, "events": list(pipe.schedule.events)} if trace else measured)
        if ctx.rank == 0:
            ctx.report({"round": round_number})
    return dict(results)


def add_options(parser: argparse.ArgumentParser, *, windows: int, repeats: int) -> None:
    """Options of benchmarks that run cases: the model, how often, and where to write the result."""
    parser.add_argument("--message-bytes", type=positive, default=1024, help="between emulated stages")
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt-mini")
    parser.add_argument("--rows", type=positive, default=2, help="sequences per micro-batch")
    parser.add_argument("--seq-len", type=positive, default=128)
    parser.add_argument("--windows", type=positive, default=windows, help="windows per repeat")
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--json", default=None)


def case_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of every :class:`Case` of a benchmark with these options."""
    names = ("stages", "model", "rows", "seq_len", "emulate_ms", "message_bytes", "transport")
    return {name: getattr(args, name) for name in names}


def describe(args: argparse.Namespace, compute: str | None, *notes: str) -> str:
    """The first line that such a benchmark prints; ``compute`` says what takes the model's place, None if nothing."""
    what = "; ".join([compute or f"model {args.model}, {args.rows} x {args.seq_len} tokens per micro-batch", *notes])
    how = f"{args.repeats} repeats of {args.windows} windows"
    return f"{args.stages} processes, one thread each; transport {args.transport}; {what}; {how}"
