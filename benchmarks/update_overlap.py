"""What does an optimizer update cost beside the next micro-batch, and does anything in a window wait for the device?

    python benchmarks/update_overlap.py [--device cuda] [--model gpt2-medium] [--rounds 9] [--json FILE]

One stage under PACI, bf16 parameters with fp32 masters: the hardest case, since the very next action is a forward that
needs the new weights. The same stage runs with its updates and without (an AdamW that leaves the weights alone), by
turns, round by round:

- *exposed*: seconds of a window with its update minus those of a window without, over those of a micro-batch (a window
  without, divided by its micro-batches). Median over the rounds. Asked is at most 2 %.
- *in line*: the same difference where the host waits for the device after every window, so that nothing follows the
  update to hide it.

Then small pipelines of four stages and the large one run windows under ``torch.cuda.set_sync_debug_mode("error")``,
where torch raises at calls that wait for the device.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from common import could_not, finish_measures, measure, positive, write_measures
from paci_rt.train.gpt import MODELS, build_stage, cross_entropy

EXPOSED_PERCENT = 2.0
SCHEDULES = ("1f1b", "paci", "zb-2p")
WARM_UP_WINDOWS = 3
"""First uses compile kernels, measure routes and fill torch's pools, all of which may wait."""


class Unmoved(paci_rt.AdamW):
    """Ends its windows as AdamW does, and leaves the weights alone."""

    def run(self, *args: Any, **options: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What runs.

    Attributes:
        device: where. model: a GPT of ``paci_rt.train``.
        sequences: of a micro-batch. tokens: of a sequence.
        accumulation: micro-batches per window.
        windows: in a sample. rounds: samples of each kind.
    """

    device: str
    model: str
    sequences: int
    tokens: int
    accumulation: int
    windows: int
    rounds: int


def make_pipeline(
    modules: Sequence[nn.Module], schedule: str, accumulation: int, device: str, *, updates: bool = True
) -> paci_rt.LocalPipeline:
    """All stages on one device."""
    kind = paci_rt.AdamW if updates else Unmoved
    return paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=accumulation,
        loss_fn=cross_entropy,
        optimizer=lambda params: kind(params, lr=1e-5),
        device=device,
    )


def random_batch(vocabulary: int, sequences: int, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 [sequences, tokens]."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(vocabulary, (2, sequences, tokens), generator=generator).to(device)
    return both[0].contiguous(), both[1].contiguous()


def wait(device: str) -> None:
    """Until the device has done everything."""
    if device != "cpu":
        torch.cuda.synchronize()


def sample_s(
    pipeline: paci_rt.LocalPipeline, batch: tuple[Tensor, Tensor], setting: Setting, *, in_line: bool
) -> tuple[float, float]:
    """Seconds a window: until the device was done, and until the host was."""
    x, y = batch
    losses: list[Tensor] = []
    host_s = 0.0
    wait(setting.device)
    start = time.perf_counter()
    for _ in range(setting.windows):
        issues = time.perf_counter()
        pipeline.step(x, target=y, losses=losses, return_outputs=False)
        host_s += time.perf_counter() - issues
        if in_line:
            wait(setting.device)
    wait(setting.device)
    return (time.perf_counter() - start) / setting.windows, host_s / setting.windows


def timings(setting: Setting) -> tuple[list[dict[str, float]], paci_rt.LocalPipeline]:
    """Seconds a window in each round, by kind; and the pipeline with its updates.

    Raises:
        RuntimeError: the stage without updates got one, or the other none.
    """
    config = MODELS[setting.model]
    module = build_stage(config, 0, 1, dtype=torch.bfloat16)
    make = {"device": setting.device, "accumulation": setting.accumulation, "schedule": "paci"}
    pipelines = {
        "without": make_pipeline([copy.deepcopy(module)], updates=False, **make),  # type: ignore[arg-type]
        "with": make_pipeline([module], **make),  # type: ignore[arg-type]
    }
    batch = random_batch(config.vocab_size, setting.sequences * setting.accumulation, setting.tokens, setting.device)
    before = {name: fingerprint(pipeline, setting.device) for name, pipeline in pipelines.items()}
    rounds = []
    for number in range(setting.rounds + 1):
        seconds: dict[str, float] = {}
        for in_line in (False, True):
            for name, pipeline in pipelines.items():
                device_s, host_s = sample_s(pipeline, batch, setting, in_line=in_line)
                seconds[f"{name} in line" if in_line else name] = device_s
                if not in_line:
                    seconds[f"{name}, host"] = host_s
        if number > 0:  # the first round compiles
            rounds.append(seconds)
    moved = {name: fingerprint(pipeline, setting.device) != before[name] for name, pipeline in pipelines.items()}
    if moved != {"without": False, "with": True}:
        raise RuntimeError(f"weights that moved: {moved}, so updates were not compared with none")
    pipelines["without"].close()
    return rounds, pipelines["with"]


def fingerprint(pipeline: paci_rt.LocalPipeline, device: str) -> str:
    """Of all weights, once nothing is on its way."""
    pipeline.drain()
    wait(device)
    return paci_rt.params_sha256(pipeline.named_parameters())


def overlap_measures(rounds: Sequence[dict[str, float]], setting: Setting) -> list[dict[str, Any]]:
    """Rows of the exposed time; judged on a GPU only."""
    micro_batch = [seconds["without"] / setting.accumulation for seconds in rounds]
    exposed = [
        100 * (seconds["with"] - seconds["without"]) / one for seconds, one in zip(rounds, micro_batch, strict=True)
    ]
    in_line = [1e3 * (seconds["with in line"] - seconds["without in line"]) for seconds in rounds]
    micro_batch_ms = 1e3 * statistics.median(micro_batch)
    host = [100 * seconds["with, host"] / seconds["with"] for seconds in rounds]
    low, middle, high = statistics.quantiles(exposed, n=4) if len(exposed) > 1 else exposed * 3
    spread = f"quartiles {low:.2f} to {high:.2f}"
    judged = {"at_most": EXPOSED_PERCENT} if setting.device != "cpu" else {}
    return [
        measure("micro-batch", micro_batch_ms, "ms"),
        measure("update in line", statistics.median(in_line), "ms"),
        measure("update overlapped, exposed", middle, "% of a micro-batch", note=spread, **judged),
        measure("host issues a window in", statistics.median(host), "% of its time"),
    ]


def windows_without_waiting(pipeline: paci_rt.LocalPipeline, batch: tuple[Tensor, Tensor], windows: int) -> str | None:
    """Run windows in which torch raises where it would wait for the device; what it said, None where it did not."""
    x, y = batch
    losses: list[Tensor] = []
    for _ in range(WARM_UP_WINDOWS):
        pipeline.step(x, target=y, losses=losses, return_outputs=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(windows):
            pipeline.step(x, target=y, losses=losses, return_outputs=False)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def waiting_measures(setting: Setting, large: paci_rt.LocalPipeline | None) -> list[dict[str, Any]]:
    """A row a pipeline: 1 where a window waited; without ``large`` where that one could not be made."""
    config = MODELS[setting.model]
    rows: list[dict[str, Any]] = []
    batch = random_batch(config.vocab_size, setting.sequences * setting.accumulation, setting.tokens, setting.device)
    found: dict[str, str | None] = {}
    if large is not None:
        found[f"{setting.model}, 1 stage, paci"] = windows_without_waiting(large, batch, setting.windows)
    tiny = MODELS["gpt-tiny"]
    for schedule in SCHEDULES:
        name = f"gpt-tiny, 4 stages, {schedule}"
        try:
            modules = [build_stage(tiny, stage, 4) for stage in range(4)]
            pipeline = make_pipeline(modules, schedule, 8, setting.device)
            batch = random_batch(tiny.vocab_size, 16, 32, setting.device)
            found[name] = windows_without_waiting(pipeline, batch, setting.windows)
        except Exception as error:  # outside the windows: it could not be tried
            traceback.print_exc()
            rows.append(could_not(f"windows that wait: {name}", error))
    for name, said in found.items():
        rows.append(measure(f"windows that wait: {name}", float(said is not None), "", at_most=0.0, note=said))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where (default cuda; cpu judges nothing)")
    parser.add_argument("--model", default="gpt2-medium", choices=sorted(MODELS), help="default gpt2-medium")
    parser.add_argument("--sequences", type=positive, default=8, help="of a micro-batch (default 8)")
    parser.add_argument("--tokens", type=positive, default=1024, help="of a sequence (default 1024)")
    parser.add_argument("--accumulation", type=positive, default=2, help="micro-batches per window (default 2)")
    parser.add_argument("--windows", type=positive, default=6, help="windows a sample (default 6)")
    parser.add_argument("--rounds", type=positive, default=9, help="samples of each kind (default 9)")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device here; run it where there is one")
    if options.tokens > MODELS[options.model].context:
        parser.error(f"--tokens {options.tokens}: {options.model} has {MODELS[options.model].context} positions")
    chosen = {name: value for name, value in vars(options).items() if name != "json"}
    setting = Setting(**chosen)
    measures: list[dict[str, Any]] = []
    details: dict[str, Any] = {"setting": chosen, "rounds_s": []}
    pipeline = None
    try:
        details["rounds_s"], pipeline = timings(setting)
        measures += overlap_measures(details["rounds_s"], setting)
    except Exception as error:
        traceback.print_exc()
        measures.append(could_not("update overlapped, exposed", error))
    write_measures("update_overlap", measures, details, options.json)
    if setting.device != "cpu":
        measures += waiting_measures(setting, pipeline)
    return finish_measures("update_overlap", measures, details, options.json)


if __name__ == "__main__":
    sys.exit(main())
