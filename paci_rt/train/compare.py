"""Time to accuracy: the same training under several schedules, one run after another.

Runs of one seed see the same tokens in the same order, start from the same weights and make the same number of
updates. What differs is how long a token takes, and how much it buys.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paci_rt import schedules
from paci_rt.report import plots, text
from paci_rt.report.machine import machine
from paci_rt.report.runs import COMPARISON
from paci_rt.report.spread import Ratio, first_reached, median, thresholds
from paci_rt.schedules.policies import POLICIES
from paci_rt.trace import write_perfetto
from paci_rt.train.comparison import Comparison, Run
from paci_rt.train.config import TrainConfig
from paci_rt.train.results import RunResult

Execute = Callable[[TrainConfig, str], RunResult]
TIMELINE_WINDOWS = 3


def plan(names: Sequence[str], seeds: int, options: dict[str, Any]) -> list[TrainConfig]:
    """The configs of all runs: schedules take turns within each seed, so that a busy hour hits all of them, and every
    second seed goes through them backwards, so that none always comes first.

    ``slack``, ``profile``, ``chunks``, ``step_costs``, ``activation_limit``, ``lookahead`` and ``policy`` go to the
    schedules that can have them, and ``accumulation`` to all but those whose window is one micro-batch.

    Raises:
        ValueError: options that cannot work.
    """
    families = [schedules.get(name) for name in names]
    repeated = {family.name for family in families if families.count(family) > 1}
    if repeated:
        raise ValueError(
            f"--schedules names {', '.join(sorted(repeated))} twice: name each once, and repeat by --seeds"
        )
    if not families:
        raise ValueError(f"--schedules is empty: choose from {', '.join(schedules.FAMILIES)}")
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}: give an integer of at least 1")
    first_seed = options.get("seed", 0)
    configs = []
    for seed in range(first_seed, first_seed + seeds):
        for family in families if (seed - first_seed) % 2 == 0 else reversed(families):
            mine = {**options, "schedule": family.name, "seed": seed}
            for name, can_have in (
                ("slack", family.takes_slack),
                ("profile", family.takes_slack),
                ("chunks", family.takes_chunks),
                ("step_costs", family.takes_costs),
                ("activation_limit", family.takes_activation_limit),
                ("lookahead", not family.flush),
                ("policy", options.get("policy") not in POLICIES or options["policy"] in family.policies),
                ("accumulation", not family.one_micro_batch_windows),
            ):
                if not can_have:
                    mine.pop(name, None)
            configs.append(TrainConfig(**mine))
    if any(config.eval_interval == 0 for config in configs):
        raise ValueError("--eval-interval 0 validates at the end only, which shows no time to a target: give 1 or more")
    return configs


def compare(
    configs: Sequence[TrainConfig], *, target_loss: float | Sequence[float] | None, execute: Execute
) -> Comparison:
    """Run all configs with ``execute(config, label)`` and find out who reached the target when.

    Args:
        target_loss: nats per token over the held-back set, one or several; None takes the lowest round numbers that
            every run reached, see :func:`paci_rt.report.spread.thresholds`.
    """
    seeds = {config.seed for config in configs}
    width = max(len(config.schedule) for config in configs)
    results = []
    for config in configs:
        label = config.schedule.ljust(width)
        results.append(execute(config, f"{label} seed {config.seed}" if len(seeds) > 1 else label))
    if target_loss is None:
        last = [result.val_loss for result in results]
        fine = all(math.isfinite(value) for value in last)
        losses = thresholds([result.evals[0].val_loss for result in results], last) if fine else ()
    else:
        given = target_loss if isinstance(target_loss, Sequence) else (target_loss,)
        losses = tuple(sorted(set(given), reverse=True))
    target = losses[-1] if losses else None
    runs = []
    for config, result in zip(configs, results, strict=True):
        tokens, elapsed_s = first_reached(result.evals, target)
        runs.append(Run(seed=config.seed, result=result, tokens_to_target=tokens, time_to_target_s=elapsed_s))
    return Comparison(
        runs=tuple(runs), target_loss=target, automatic_target=target_loss is None, thresholds=tuple(losses)
    )


def summary_table(comparison: Comparison, *, markdown: bool = False) -> str:
    """One row per schedule; medians where there are several seeds."""
    header = ("schedule", "time to target", "tokens to target", "final loss", "tokens/s", "utilization")
    rows = []
    for name in comparison.schedules:
        results = [run.result for run in comparison.of(name)]
        tokens = comparison.tokens_to_target(name)
        rows.append(
            (
                name,
                text.seconds(comparison.time_to_target_s(name)),
                text.NOTHING if tokens is None else f"{tokens:,.0f}",
                text.loss(statistics.median(result.val_loss for result in results)),
                f"{statistics.median(result.tokens_per_s for result in results):,.0f}",
                text.share(statistics.median(result.utilization for result in results)),
                f"{max(result.max_drift for result in results)} / {results[0].drift_bound}",
                text.size(max(result.peak_memory_bytes for result in results)),
            )
        )
    return text.table((*header, "max drift / bound", "memory"), rows, markdown=markdown)


def verdict(comparison: Comparison) -> str:
    """Plain sentences: which schedule reached the target first, and by how much."""
    target = comparison.target_loss
    if target is None:
        diverged = {run.result.schedule for run in comparison.runs if not math.isfinite(run.result.val_loss)}
        return f"No target: the loss of {', '.join(sorted(diverged))} ended as NaN or infinite. Try a smaller --lr."
    how = " (the lowest round number that every run reached)" if comparison.automatic_target else ""
    times = {name: comparison.time_to_target_s(name) for name in comparison.schedules}
    reached = sorted((seconds, name) for name, seconds in times.items() if seconds is not None)
    if not reached:
        return f"No schedule reached the target loss of {target:.4f}."
    best_s, best = reached[0]
    pairs = {name: comparison.speedup(name, best) for _, name in reached[1:]}
    unsure = any(one is not None and not one.differs for one in pairs.values())
    many = len(comparison.of(best)) > 1
    first = f"reached the target loss of {target:.4f}{how}{'' if unsure and many else ' first'}"
    sentences = [f"{best} {first}, after {text.seconds(best_s)}{' (median)' if many else ''}."]
    for seconds, name in reached[1:]:
        one = pairs[name]
        sentences.append(f"{name} took {text.seconds(seconds)}{'' if one is None else _against(best, one)}.")
    for name in (name for name, seconds in times.items() if seconds is None):
        runs = comparison.of(name)
        missed = sum(run.time_to_target_s is None for run in runs)
        sentences.append(
            f"{name} did not reach it" + ("." if missed == len(runs) else f" in {missed} of {len(runs)} runs.")
        )
    return " ".join(sentences)


def _against(best: str, one: Ratio) -> str:
    return f": {one.words()}" if one.differs is False else f": {best} was {one.words()}"


def iso_loss_table(comparison: Comparison, *, markdown: bool = False) -> str:
    """As the paper has it: a row a threshold, with each schedule's time, tokens, and speed-up over the baseline."""
    base, others = comparison.baseline, [name for name in comparison.schedules if name != comparison.baseline]
    header = ["loss", "perplexity", f"{base}: time", "tokens"]
    for name in others:
        header += [f"{name}: time", "tokens", f"times as fast as {base}"]
    rows = []
    for loss in comparison.thresholds:
        cells = [f"{loss:.3f}", f"{math.exp(min(loss, 700.0)):.4g}"]
        for name in (base, *others):
            found = comparison.reached(name, loss)
            tokens = median([one for one, _ in found])
            cells += [
                text.seconds(median([one for _, one in found])),
                text.NOTHING if tokens is None else f"{tokens:,.0f}",
            ]
            if name != base:
                one = comparison.speedup(base, name, loss)
                cells.append(text.NOTHING if one is None else one.text() + (" =" if one.differs is False else ""))
        rows.append(tuple(cells))
    return text.table(tuple(header), rows, markdown=markdown)


def write_report(folder: str | Path, comparison: Comparison) -> list[Path]:
    """Write ``report.md``, the loss plots, ``timeline.png`` and a Perfetto trace per schedule; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in ("report.md", "loss_vs_tokens.png", "loss_vs_time.png", "timeline.png")]
    curves = [_curve(run) for run in comparison.runs]
    plots.loss_over_tokens(written[1], curves, target=comparison.target_loss)
    plots.loss_over_time(written[2], curves, target=comparison.target_loss)
    shown = [comparison.of(name)[0].result for name in comparison.schedules]
    write_timeline(written[3], shown)
    for result in shown:
        written.append(folder / f"trace-{result.schedule}.json")
        write_perfetto(written[-1], result.events)
    written[0].write_text(_report(comparison), encoding="utf-8")
    written.append(folder / COMPARISON)
    written[-1].write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")
    return written


def write_timeline(path: str | Path, results: Sequence[RunResult]) -> None:
    """A few windows from the middle of each run, on one time axis; needs runs with ``events``."""
    cuts = [_middle(result) for result in results]
    span_s = max(end_s - start_s for start_s, end_s in cuts)
    lanes = []
    for result, (start_s, _) in zip(results, cuts, strict=True):
        title = f"{result.schedule}: {text.share(result.utilization)} of the time computing"
        placement = schedules.get(result.schedule).placement
        lane = plots.Lane(title=title, events=result.events, start_s=start_s, ranks=result.stages, placement=placement)
        lanes.append(lane)
    plots.timeline(path, lanes, span_s=span_s)


def _middle(result: RunResult) -> tuple[float, float]:
    """Start and end of some windows halfway between two validations, on the clock of the events."""
    ends = sorted(event.end_s for event in result.events if event.stage == 0 and event.action.startswith("0U"))
    interval, done = result.config["eval_interval"], result.steps - result.windows
    first = done + result.windows // 2  # in local updates since the very first
    start = first - first % interval + max(0, interval - TIMELINE_WINDOWS) // 2 - done
    start = min(max(1, start), max(1, len(ends) - 1))
    end = min(start + TIMELINE_WINDOWS, len(ends))
    if end <= start:  # a run of a single window
        return min(event.start_s for event in result.events), max(event.end_s for event in result.events)
    return ends[start - 1], ends[end - 1]


def _curve(run: Run) -> plots.Curve:
    evals = run.result.evals
    reached = None
    if run.tokens_to_target is not None and run.time_to_target_s is not None:
        reached = (run.tokens_to_target, run.time_to_target_s)
    return plots.Curve(
        label=run.result.schedule,
        schedule=run.result.schedule,
        tokens=[point.tokens for point in evals],
        elapsed_s=[point.elapsed_s for point in evals],
        val_loss=[point.val_loss for point in evals],
        reached=reached,
    )


def _report(comparison: Comparison) -> str:
    first = comparison.runs[0].result
    config, host = first.config, machine()
    seeds = sorted({run.seed for run in comparison.runs})
    data = config["data"] or "the text of Python's standard library"
    medians = " Medians over the seeds." if len(seeds) > 1 else ""
    return f"""# {" against ".join(comparison.schedules)}

{verdict(comparison)}

{summary_table(comparison, markdown=True)}

{iso_loss_table(comparison, markdown=True)}

In brackets: where the ratio lies with a confidence of 95 %, from the seeds. "=" marks one that shows no difference.

![loss over time](loss_vs_time.png)

![loss over tokens](loss_vs_tokens.png)

![what each stage did when](timeline.png)

## What was run

- {config["model"]} in {first.stages} stages, {config["threads"]} thread(s) each, {config["dtype"]}
- {first.steps} local updates of {config["batch_size"]} sequences of {config["seq_len"]} tokens: {first.tokens:,} tokens
- micro-batches per update: {_accumulations(comparison)}
- optimizer {config["optimizer"]}, learning rate {config["lr"]:g}, seeds {", ".join(map(str, seeds))}
- data: {data}
- {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]}, torch {host["torch"]}

## What the columns mean

- **time to target**: seconds of training until the loss over the held-back set first was the target, on a straight
  line between two validations. Start-up and the validations themselves do not count, drains do.{medians}
- **final loss**: nats per token over the held-back set. **tokens/s** leaves out the first window.
- **utilization**: seconds that the stages computed over seconds of training, their mean.
- **max drift / bound**: the most updates that any micro-batch saw between its forward and its backward, as counted,
  and what the schedule allows.
- **memory**: weights, gradients, optimizer and saved activations of the largest stage, at the peak.

The traces open at ui.perfetto.dev: {", ".join(f"`trace-{name}.json`" for name in comparison.schedules)}.
"""


def _accumulations(comparison: Comparison) -> str:
    by_schedule = {name: comparison.of(name)[0].result.accumulation for name in comparison.schedules}
    if len(set(by_schedule.values())) == 1:
        return str(comparison.runs[0].result.accumulation)
    return ", ".join(f"{name} {count}" for name, count in by_schedule.items())
