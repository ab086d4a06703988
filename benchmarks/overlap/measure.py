"""The measurements, run by every process of a chain: all wires take turns, repeat by repeat."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from overlap.compute import Compute, make_compute
from overlap.sms import blocks_in_use
from overlap.wires import WIRES, Wire, WireKind, make_wire, neighbours
from paci_rt import launch
from paci_rt.errors import PaciError
from paci_rt.profiling.link import ping_pong, seconds_between, written_bytes
from paci_rt.runtime.device_clock import clock_for

WARM_UP = 4
MOST_ROUNDS, LEAST_ROUNDS = 200, 12
VOLUME_BYTES = 64 << 20
"""What a measurement of one size moves at most, until there are too few messages to tell."""
OVERLAP_S = 0.2
MOST_STEPS, LEAST_STEPS = 40, 8
PROFILED_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        wires: names from ``WIRES``, all of one device.
        processes: in the chain.
        sizes: bytes per message.
        computes: kinds of compute, ``gemm`` or ``emulated``.
        compute_ms: lengths of compute that is to hide transfers.
        quick: a quarter of the rounds.
        gpus: how many there are; with more processes than that, some share one.
    """

    wires: tuple[str, ...]
    processes: int
    sizes: tuple[int, ...]
    computes: tuple[str, ...]
    compute_ms: tuple[float, ...]
    repeats: int
    quick: bool = False
    gpus: int = 0

    def rounds(self, nbytes: int) -> int:
        """Messages of a latency or bandwidth measurement."""
        full = min(MOST_ROUNDS, max(LEAST_ROUNDS, VOLUME_BYTES // nbytes))
        return max(LEAST_ROUNDS // 2, full // 4) if self.quick else full

    def steps(self, milliseconds: float) -> int:
        """Steps of compute, with and without transfers."""
        full = min(MOST_STEPS, max(LEAST_STEPS, round(OVERLAP_S * 1e3 / milliseconds)))
        return max(LEAST_STEPS // 2, full // 4) if self.quick else full


Key = tuple[Any, ...]
"""``("link", wire, bytes)`` or ``("overlap", wire, bytes, compute, compute_ms)`` or ``("copy", device, bytes)``."""


@dataclass
class Results:
    """What one process found.

    Attributes:
        refused: reason, by wire that does not work here.
        samples: a dict of seconds a repeat, by case.
        verified_bytes: bytes that arrived and were compared with what was sent, by wire and size.
        blocks: largest number of thread blocks that transfers had running at once on the GPU, by wire and size.
    """

    refused: dict[str, str] = field(default_factory=dict)
    samples: dict[Key, list[dict[str, Any]]] = field(default_factory=dict)
    verified_bytes: dict[tuple[str, int], int] = field(default_factory=dict)
    blocks: dict[tuple[str, int], int] = field(default_factory=dict)

    def add(self, key: Key, sample: dict[str, Any]) -> None:
        self.samples.setdefault(key, []).append(sample)

    def refuse(self, name: str, reason: str) -> None:
        """Forget what earlier repeats found: a wire has all of them or none."""
        self.refused[name] = reason
        self.samples = {key: samples for key, samples in self.samples.items() if key[1] != name}


def run(ctx: launch.Context, plan: Plan) -> Results:
    """Run by every process."""
    process = _Process(ctx, plan)
    for repeat in range(plan.repeats):
        for name in plan.wires:
            process.measure(WIRES[name], first=repeat == 0)
        process.copies()
        if ctx.rank == 0:
            ctx.report({"repeat": repeat + 1})
    return process.results


class _Process:
    def __init__(self, ctx: launch.Context, plan: Plan) -> None:
        self.plan, self.rank = plan, ctx.rank
        self.results = Results()
        cuda = WIRES[plan.wires[0]].device == "cuda"
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", ctx.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.clock = clock_for(self.device)
        self.clock.mark()  # the first one waits for the device
        wants_nccl = any(WIRES[name].backend == "nccl" for name in plan.wires)
        self.nccl_group = dist.new_group(backend="nccl") if wants_nccl else None
        self.computes: dict[tuple[str, float], Compute] = {
            (name, ms): make_compute(name, ms, self.device) for name, ms in product(plan.computes, plan.compute_ms)
        }
        self.around = neighbours(ctx.rank, plan.processes)
        self.pair = [1 - ctx.rank] if ctx.rank < 2 else []

    def measure(self, kind: WireKind, *, first: bool) -> None:
        """Every size over one wire, once."""
        for nbytes in self.plan.sizes if first and self.device.type == "cuda" else ():
            if kind.name not in self.results.refused:
                self.results.blocks[kind.name, nbytes] = self._blocks(kind, nbytes)
        wire = None if kind.name in self.results.refused else self._connect(kind)
        if wire is None:
            return
        for nbytes in self.plan.sizes:
            verified = self._verify(wire, kind.name, nbytes)
            if first:
                self.results.verified_bytes[kind.name, nbytes] = verified
            self.results.add(("link", kind.name, nbytes), self._link(wire, nbytes))
            for (name, ms), compute in self.computes.items():
                sample = self._overlap(wire, nbytes, compute, self.plan.steps(ms))
                self.results.add(("overlap", kind.name, nbytes, name, ms), sample)
        self._disconnect(wire)

    def _disconnect(self, wire: Wire) -> None:
        wire.flush()
        self._settle()  # no process leaves while a neighbour still reads
        wire.close()

    def _connect(self, kind: WireKind) -> Wire | None:
        """The wire, or None where any process cannot have it; then all know why."""
        wire, reason = None, ""
        try:
            wire = make_wire(kind, self.rank, self.plan.processes, self.nccl_group)
        except (PaciError, ValueError) as error:
            reason = str(error).splitlines()[0]
        reasons: list[str] = [""] * self.plan.processes
        dist.all_gather_object(reasons, reason)
        if any(reasons):
            if wire is not None:
                wire.close()
            self.results.refuse(kind.name, next(one for one in reasons if one))
            return None
        return wire

    def _settle(self) -> None:
        """All processes have done what they began. A GPU may still have receives posted that no process waits for."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        dist.barrier()

    def _message(self, nbytes: int) -> Tensor:
        return written_bytes(nbytes, self.device)

    # ------------------------------------------------------------------------------------------------- are they right

    def _verify(self, wire: Wire, name: str, nbytes: int) -> int:
        """Send random bytes to all neighbours and compare what arrives; warms the wire up, too."""
        for number in range(WARM_UP):
            outgoing = {peer: self._random(self.rank, peer, number, nbytes).to(self.device) for peer in self.around}
            wire.begin(outgoing, dict.fromkeys(self.around, nbytes))
            self._compare(wire.finish(), name, number, nbytes)
        self._settle()
        return WARM_UP * len(self.around) * nbytes

    def _compare(self, arrived: dict[int, Tensor], name: str, number: int, nbytes: int) -> None:
        for peer, tensor in arrived.items():
            if not torch.equal(tensor.cpu(), self._random(peer, self.rank, number, nbytes)):
                raise RuntimeError(
                    f"{name}: message {number} of {nbytes} bytes from rank {peer} arrived at rank {self.rank} with "
                    "other bytes than were sent"
                )

    def _random(self, sender: int, receiver: int, number: int, nbytes: int) -> Tensor:
        generator = torch.Generator().manual_seed((sender * self.plan.processes + receiver) * WARM_UP + number)
        return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)

    # ------------------------------------------------------------------------------------------------------ the links

    def _link(self, wire: Wire, nbytes: int) -> dict[str, Any]:
        rounds = self.plan.rounds(nbytes)
        message = self._message(nbytes)
        sample: dict[str, Any] = {
            "latency_s": self._latency(wire, message, rounds),
            "one_way_s": self._one_way(wire, message, rounds) / rounds,
            "two_way_s": self._both_ways(wire, message, rounds, self.pair) / rounds,
        }
        alone = self.plan.processes == 2
        sample["chain_s"] = (
            sample["two_way_s"] if alone else self._both_ways(wire, message, rounds, self.around) / rounds
        )
        return sample

    def _latency(self, wire: Wire, message: Tensor, rounds: int) -> list[float]:
        """Ranks 0 and 1: seconds of one way, by round."""
        self._settle()
        if not self.pair:
            return []
        (peer,), nbytes = self.pair, message.numel()

        def reply() -> None:
            wire.begin({peer: message}, {})
            wire.finish()

        def await_ping() -> None:
            wire.begin({}, {peer: nbytes})
            wire.finish()

        if self.rank == 0:
            return ping_pong(
                lambda: wire.begin({peer: message}, {peer: nbytes}),
                wire.finish,
                first=True,
                rounds=rounds,
                clock=self.clock,
            )
        return ping_pong(reply, await_ping, first=False, rounds=rounds, clock=self.clock)

    def _one_way(self, wire: Wire, message: Tensor, rounds: int) -> float:
        """Rank 0 sends to rank 1 as fast as it may, and hears a byte back at the end; seconds."""
        self._settle()
        if not self.pair:
            return 0.0
        (peer,), nbytes = self.pair, message.numel()
        last = self._message(1)

        def stream(count: int) -> None:
            if self.rank == 0:
                for _ in range(count):
                    wire.begin({peer: message}, {})
                wire.begin({}, {peer: 1})
                for _ in range(count + 1):
                    wire.finish()
            else:
                for _ in range(count):
                    wire.begin({}, {peer: nbytes})
                for _ in range(count):
                    wire.finish()
                wire.begin({peer: last}, {})
                wire.finish()

        return self._timed(lambda: stream(WARM_UP), lambda: stream(rounds))

    def _both_ways(self, wire: Wire, message: Tensor, rounds: int, peers: list[int]) -> float:
        """``rounds`` messages to each of ``peers`` and as many back, ``wire.ahead`` of them under way; seconds."""
        self._settle()
        if not peers:
            return 0.0
        outgoing, incoming = dict.fromkeys(peers, message), dict.fromkeys(peers, message.numel())

        def stream(count: int) -> None:
            for _ in range(min(wire.ahead, count)):
                wire.begin(outgoing, incoming)
            for number in range(count):
                wire.finish()
                if number + wire.ahead < count:
                    wire.begin(outgoing, incoming)

        return self._timed(lambda: stream(WARM_UP), lambda: stream(rounds))

    def _timed(self, warm_up: Callable[[], None], work: Callable[[], None]) -> float:
        warm_up()
        marks = [self.clock.mark()]
        work()
        marks.append(self.clock.mark())
        return seconds_between(self.clock, marks)[0]

    # ---------------------------------------------------------------------------------------------------- the overlap

    def _overlap(self, wire: Wire, nbytes: int, compute: Compute, steps: int) -> dict[str, float]:
        """Median seconds of a step that computes, that transfers, that does both, and of the compute in the latter.

        A step sends one message to each neighbour, computes, and takes one message from each.
        """
        message = self._message(nbytes)
        outgoing, incoming = dict.fromkeys(self.around, message), dict.fromkeys(self.around, nbytes)

        def begin() -> None:
            wire.begin(outgoing, incoming)

        alone = self._steps(steps, compute.run)
        transfer = self._steps(steps, begin, wire.finish)
        both = self._steps(steps, begin, compute.run, wire.finish)
        return {
            "compute_s": _median_step(alone),
            "transfer_s": _median_step(transfer),
            "both_s": _median_step(both),
            "compute_in_both_s": statistics.median(parts[1] for parts in both),
        }

    def _steps(self, count: int, *parts: Callable[[], object]) -> list[list[float]]:
        """Seconds of each part of each step, after a warm-up."""
        self._settle()
        marks: list[list[Any]] = []
        for _ in range(WARM_UP + count):
            step = [self.clock.mark()]
            for part in parts:
                part()
                step.append(self.clock.mark())
            marks.append(step)
        return [seconds_between(self.clock, step) for step in marks[WARM_UP:]]

    # ----------------------------------------------------------------------------------------------------- beside them

    def _blocks(self, kind: WireKind, nbytes: int) -> int:
        """Over a wire of its own: the profiler waits for the device, which posted receives would keep waiting."""
        message = self._message(nbytes)
        outgoing, incoming = dict.fromkeys(self.around, message), dict.fromkeys(self.around, nbytes)

        def transfers() -> None:
            wire = self._connect(kind)
            for _ in range(PROFILED_STEPS if wire is not None else 0):
                wire.begin(outgoing, incoming)
                wire.finish()
            if wire is not None:
                self._disconnect(wire)

        return blocks_in_use(transfers)

    def copies(self) -> None:
        """Rank 0 copies as many bytes inside its memory, or from its GPU to that of rank 1."""
        self._settle()
        for nbytes in self.plan.sizes if self.rank == 0 else ():
            source = self._message(nbytes)
            there = torch.device("cuda", 1 % torch.cuda.device_count()) if source.is_cuda else self.device
            target = written_bytes(nbytes, there)
            rounds = self.plan.rounds(nbytes)

            def copy(count: int, target: Tensor = target, source: Tensor = source) -> None:
                for _ in range(count):
                    target.copy_(source, non_blocking=True)

            seconds = self._timed(lambda: copy(WARM_UP), lambda rounds=rounds: copy(rounds)) / rounds
            self.results.add(("copy", self.device.type, nbytes), {"copy_s": seconds})
        self._settle()


def _median_step(steps: list[list[float]]) -> float:
    return statistics.median(sum(parts) for parts in steps)
