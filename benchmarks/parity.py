"""Does training on a GPU give what it gives on the CPU, and the same bits whatever runs beside what?

    python benchmarks/parity.py [--device cuda] [--windows 12] [--schedules 1f1b,paci,zb-2p] [--json FILE]

A ``gpt-tiny`` in four stages, all in one process and on one device, learns to count in steps. Compared are the loss of
every micro-batch and all weights at the end, each as ``|x - y| / |y|`` over all of them:

- fp32 on the GPU with fp32 on the CPU. Both only round, in another order, so the yardstick is what rounding does here:
  a CPU run whose first weights are each off by up to one rounding unit, 2^-24 of themselves. Asked is at most 16 times
  the distance between that run and the CPU's. (On a CPU, fp64 training is 1 to 1.5 times that distance away; TF32
  products are some 1000 times as coarse as fp32 ones.)
- bf16 parameters with fp32 masters with fp32, both on the GPU. A bf16 weight or activation is off by up to 2^-9 of
  itself; over all weights, that and the steps that small gradients take the other way stay below 2^-6, and the losses,
  in which independent roundings average out, below 2^-8. (On a CPU: 0.005 and 0.0007.)
- A run, in which every stage computes on a stream of its own, with the same run again; with a run in which all stages
  share one stream; and with a run in which the host waits for every kernel (``CUDA_LAUNCH_BLOCKING=1``, in a process of
  its own), so that nothing overlaps, updates included: the same bits, all of them.

Kernels whose order of summation varies are off (``torch.use_deterministic_algorithms``, attention by plain products):
only then can a difference be ours.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import paci_rt
from common import could_not, finish_measures, list_of, measure, positive, write_measures
from paci_rt.train.gpt import MODELS, build_stage, cross_entropy

STAGES, ACCUMULATION, SEQUENCES, TOKENS, VOCABULARY = 4, 8, 16, 64, 256
LEARNING_RATE = 1e-3
ROUNDING_UNIT = 2.0**-24
FP32_FACTOR = 16.0
BF16_LOSSES, BF16_WEIGHTS = 2.0**-8, 2.0**-6
WORKER_LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run.

    Attributes:
        schedule: its name.
        device: where all stages are.
        dtype: of the parameters, ``fp32`` or ``bf16``.
        windows: local updates.
        perturbed: the first weights are each off by up to a rounding unit.
        one_stream: all stages compute on one stream; on a GPU.
    """

    schedule: str
    device: str
    windows: int
    dtype: str = "fp32"
    perturbed: bool = False
    one_stream: bool = False

    @property
    def key(self) -> str:
        return f"{self.schedule} {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run leaves.

    Attributes:
        losses: fp64 [micro-batches], on the CPU.
        weights: fp64 [parameters], on the CPU.
        sha256: of all parameters' bytes.
    """

    losses: Tensor
    weights: Tensor
    sha256: str

    def distance(self, other: Trained) -> tuple[float, float]:
        """Of the losses and of the weights, relative to the other's."""
        return relative(self.losses, other.losses), relative(self.weights, other.weights)

    def same(self, other: Trained) -> bool:
        """To the bit."""
        return self.sha256 == other.sha256 and torch.equal(self.losses, other.losses)


def relative(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|``; NaN where either has one."""
    return float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y))


def batch(window: int) -> tuple[Tensor, Tensor]:
    """Tokens that count up in steps of 1 to 7 from anywhere, and the next ones: int64 [sequences, tokens], twice."""
    generator = torch.Generator().manual_seed(1000 + window)
    start = torch.randint(VOCABULARY, (SEQUENCES, 1), generator=generator)
    step = torch.randint(1, 8, (SEQUENCES, 1), generator=generator)
    tokens = (start + step * torch.arange(TOKENS + 1)) % VOCABULARY
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(case: Case) -> Trained:
    """Train all stages in this process."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    modules = [build_stage(MODELS["gpt-tiny"], stage, STAGES, dtype=dtype) for stage in range(STAGES)]
    if case.perturbed:
        perturb(modules)
    streams = [None] * STAGES if case.one_stream else None
    pipeline = paci_rt.LocalPipeline(
        modules,
        schedule=case.schedule,
        n_microbatches=ACCUMULATION,
        loss_fn=cross_entropy,
        optimizer=lambda params: paci_rt.AdamW(params, lr=LEARNING_RATE),
        device=case.device,
        streams=streams,
    )
    collected: list[Tensor] = []
    with sdpa_kernel(SDPBackend.MATH):
        for window in range(case.windows):
            x, y = (tokens.to(case.device) for tokens in batch(window))
            losses: list[Tensor] = []
            pipeline.step(x, target=y, losses=losses, return_outputs=False)
            collected += losses
        pipeline.drain()
    if case.device != "cpu":
        torch.cuda.synchronize()
    named = list(pipeline.named_parameters())
    weights = torch.cat([param.detach().double().cpu().flatten() for _, param in named])
    trained = Trained(
        losses=torch.stack([loss.double().cpu() for loss in collected]),
        weights=weights,
        sha256=paci_rt.params_sha256(named),
    )
    pipeline.close()
    return trained


def perturb(modules: Sequence[torch.nn.Module]) -> None:
    """Move every weight by up to a rounding unit of itself."""
    generator = torch.Generator().manual_seed(1)
    for module in modules:
        for param in module.parameters():
            shift = 2.0 * torch.rand(param.shape, generator=generator, dtype=torch.float64) - 1.0
            param.data.copy_(param.data.double() * (1.0 + ROUNDING_UNIT * shift))


def bits_cases(device: str, schedules: Sequence[str], windows: int) -> list[Case]:
    """Runs that are held against each other to the bit: every schedule in fp32, and one in bf16 with masters."""
    cases = [Case(schedule=name, device=device, windows=windows) for name in schedules]
    return [*cases, replace(cases[-1 if "paci" not in schedules else schedules.index("paci")], dtype="bf16")]


def one_at_a_time(device: str, schedules: Sequence[str], windows: int) -> dict[str, Trained]:
    """The same runs in a process in which the host waits for every kernel."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.pt"
        command = [sys.executable, __file__, "--device", device, "--windows", str(windows)]
        command += ["--schedules", ",".join(schedules), "--worker", str(results)]
        done = subprocess.run(
            command, env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}, timeout=WORKER_LIMIT_S, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise RuntimeError(f"the process with waiting launches ended with exit code {done.returncode}")
        saved = torch.load(results, weights_only=True)
    return {key: Trained(**values) for key, values in saved.items()}


def work(device: str, schedules: Sequence[str], windows: int, results: Path) -> None:
    """What that process does."""
    trained = {case.key: train(case) for case in bits_cases(device, schedules, windows)}
    torch.save({key: vars(one) for key, one in trained.items()}, results)


class Comparison:
    """Trains what is needed once, and collects rows; what cannot be trained is a row that says so."""

    def __init__(
        self,
        device: str,
        schedules: Sequence[str],
        windows: int,
        keep: Callable[[list[dict[str, Any]]], None] = lambda measures: None,
    ) -> None:
        self.measures: list[dict[str, Any]] = []
        self._keep = keep
        self._device, self._schedules, self._windows = device, list(schedules), windows
        self._done: dict[Case, Trained] = {}

    def trained(self, case: Case) -> Trained:
        if case not in self._done:
            print(f"training {case}", flush=True)
            self._done[case] = train(case)
        return self._done[case]

    def attempt(self, name: str, compare: Callable[[str], None]) -> None:
        """Run one comparison; its failure costs no other."""
        try:
            compare(name)
        except Exception as error:
            traceback.print_exc()
            self.measures.append(could_not(name, error))
        self._keep(self.measures)

    def fp32(self, name: str, schedule: str) -> None:
        """GPU against CPU."""
        here = self.trained(Case(schedule=schedule, device=self._device, windows=self._windows))
        reference = Case(schedule=schedule, device="cpu", windows=self._windows)
        expected, shaken = self.trained(reference), self.trained(replace(reference, perturbed=True))
        found, yardstick = here.distance(expected), shaken.distance(expected)
        for what, distance, unit in zip(("losses", "weights"), found, yardstick, strict=True):
            row = measure(f"{name}, {what}", distance, "relative", at_most=FP32_FACTOR * unit)
            self.measures.append({**row, "yardstick": unit})

    def bf16(self, name: str, schedule: str) -> None:
        """bf16 with masters against fp32."""
        case = Case(schedule=schedule, device=self._device, windows=self._windows)
        found = self.trained(replace(case, dtype="bf16")).distance(self.trained(case))
        for what, distance, bound in zip(("losses", "weights"), found, (BF16_LOSSES, BF16_WEIGHTS), strict=True):
            self.measures.append(measure(f"{name}, {what}", distance, "relative", at_most=bound))

    def bits(self, name: str, compare_to: Callable[[Case], Trained]) -> None:
        """Every run against another that must be its equal: the number of those that are not."""
        cases = bits_cases(self._device, self._schedules, self._windows)
        different = [case.key for case in cases if not self.trained(case).same(compare_to(case))]
        note = f"not {', '.join(different)}" if different else None
        self.measures.append(measure(name, float(len(different)), f"of {len(cases)} differ", at_most=0.0, note=note))

    def run(self) -> None:
        """All comparisons."""
        for schedule in self._schedules:
            self.attempt(f"{schedule}: fp32 as on the CPU", lambda name, s=schedule: self.fp32(name, s))  # type: ignore[misc]
        schedule = bits_cases(self._device, self._schedules, 1)[-1].schedule
        self.attempt(f"{schedule}: bf16 with masters as fp32", lambda name: self.bf16(name, schedule))
        self.attempt("run again: the same bits", lambda name: self.bits(name, train))

        def together(case: Case) -> Trained:
            return train(replace(case, one_stream=True))

        self.attempt("all stages on one stream: the same bits", lambda name: self.bits(name, together))

        def waiting(name: str) -> None:
            others = one_at_a_time(self._device, self._schedules, self._windows)
            self.bits(name, lambda case: others[case.key])

        self.attempt("nothing beside anything: the same bits", waiting)


def settle() -> None:
    """Fixed orders of summation, and no TF32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    # A warning suffices: what then differs shows in the bits.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where to train (default cuda; cpu tries the script itself)")
    parser.add_argument("--windows", type=positive, default=12, help="local updates per run (default 12)")
    parser.add_argument("--schedules", type=list_of(str), default=["1f1b", "paci", "zb-2p"], help="which to train")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device here; run it where there is one")
    try:
        for name in options.schedules:
            paci_rt.get_schedule_class(name)
    except ValueError as error:
        parser.error(f"--schedules: {error}")
    settle()
    if options.worker is not None:
        work(options.device, options.schedules, options.windows, options.worker)
        return 0
    details = {"windows": options.windows, "schedules": options.schedules}

    def keep(measures: list[dict[str, Any]]) -> None:
        write_measures("parity", measures, details, options.json)

    comparison = Comparison(options.device, options.schedules, options.windows, keep)
    comparison.run()
    return finish_measures("parity", comparison.measures, details, options.json)


if __name__ == "__main__":
    sys.exit(main())
