"""One HTML page about a set of runs that needs nothing else: curves, timeline, schedules, memory, machine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from paci_rt import schedules
from paci_rt.action import Action
from paci_rt.errors import ScheduleError
from paci_rt.report import figures, text
from paci_rt.report.page_parts import SCRIPT, STYLE
from paci_rt.report.plots import ACTION_COLOURS, ACTION_NAMES
from paci_rt.report.runs import FoundRun, FoundTrace, differences, grouped
from paci_rt.report.spread import median
from paci_rt.runtime.stats import MEMORY_PARTS as PARTS
from paci_rt.schedules import Shape
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import Event

MOST_EVENTS = 20_000
"""Actions of a timeline that a page shows."""
PART_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#E69F00", "#D55E00", "#999999", "#000000")
SIMULATED_WINDOWS = 4


def page(runs: Sequence[FoundRun], traces: Sequence[FoundTrace], thresholds: Sequence[float], baseline: str) -> str:
    """The page's text.

    Args:
        runs, traces: what was found. Without a trace the timeline is a simulation of each schedule.
        thresholds: losses in nats per token at which runs are compared. baseline: a label of the runs.
    """
    labels = list(grouped(runs))
    title = " against ".join(labels)
    sections = (
        ("Curves", _curves(runs, thresholds, baseline)),
        ("Time to a loss", _iso_loss(runs, thresholds, baseline)),
        ("Schedules", _schedules(runs)),
        ("Timeline", _timeline(runs, traces)),
        ("Memory per stage", _memory(runs)),
        ("What was run, and on what", _environment(runs)),
    )
    body = "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{body}\n<script>{SCRIPT}</script></body></html>\n"
    )


def _curves(runs: Sequence[FoundRun], thresholds: Sequence[float], baseline: str) -> str:
    one = figures.as_svg(figures.loss_over_tokens(runs))
    other = figures.as_svg(figures.perplexity_over_time(runs, thresholds, baseline))
    found = differences(runs)
    warning = ""
    if found:
        words = "; ".join(f"--{name.replace('_', '-')}: {', '.join(values)}" for name, values in found.items())
        warning = f'<p class="warning">These runs differ in more than their schedules: {escape(words)}.</p>'
    return (
        f'{warning}<div class="figures"><figure>{one}<figcaption>What a token buys.</figcaption></figure>'
        f"<figure>{other}<figcaption>What an hour buys; arrows say how many times as fast as {escape(baseline)} the "
        "quickest came down to the same loss.</figcaption></figure></div>"
    )


def _iso_loss(runs: Sequence[FoundRun], thresholds: Sequence[float], baseline: str) -> str:
    groups = grouped(runs)
    header = ["loss", "perplexity"]
    for label in groups:
        header += [f"{label}: time"] + ([f"times as fast as {baseline}"] if label != baseline else [])
    rows = []
    for loss in thresholds:
        cells = [f"{loss:.3f}", f"{math.exp(min(loss, 700.0)):.4g}"]
        for label, some in groups.items():
            cells.append(text.seconds(median(figures.times_to(some, loss))))
            if label != baseline:
                one = figures.speedup(groups, baseline, label, loss)
                cells.append(text.NOTHING if one is None else one.words().replace(" times as fast", ""))
        rows.append(cells)
    return _table(header, rows) + (
        "<p>Medians over the seeds. In brackets: where the ratio lies with a confidence of 95 %, from seeds that both "
        "have.</p>"
    )


def _schedules(runs: Sequence[FoundRun]) -> str:
    rows = []
    for label, some in grouped(runs).items():
        facts = [run.facts for run in some]
        modelled = _simulated(some[0])
        rows.append(
            [
                label,
                str(facts[0]["stages"]),
                str(facts[0]["accumulation"]),
                str(len(some)),
                _median_of(facts, "val_loss", lambda value: f"{value:.3f}"),
                _median_of(facts, "tokens_per_s", lambda value: f"{value:,.0f}"),
                _median_of(facts, "utilization", text.share),
                text.NOTHING if modelled is None else text.share(modelled.steady_utilization),
                f"{_median_of(facts, 'max_drift', str)} / {_median_of(facts, 'drift_bound', str)}",
                _median_of(facts, "peak_memory_bytes", text.size),
            ]
        )
    header = ["schedule", "stages", "accumulation", "seeds", "final loss", "tokens/s", "utilization", "simulated"]
    return _table([*header, "max drift / bound", "memory"], rows) + (
        "<p>Simulated: utilization where forwards and both halves of backwards take as long, and messages no time.</p>"
    )


def _median_of(facts: Sequence[dict[str, Any]], key: str, form: Any) -> str:
    value = median([one.get(key) for one in facts])
    return text.NOTHING if value is None else str(form(int(value) if form is str else value))


def _simulated(run: FoundRun, *, keep_events: bool = False) -> Any:
    """The run's schedule with unit costs; None where it cannot be simulated."""
    chunks = int(run.facts.get("chunks") or 1)
    slack = run.facts["config"].get("slack", 0)
    try:
        shape = Shape(
            num_stages=int(run.facts["stages"]) * chunks,
            accumulation=int(run.facts["accumulation"]),
            chunks=chunks,
            placement=schedules.get(run.schedule).placement,
            slack=tuple(slack) if isinstance(slack, list) else slack,
        )
        unit = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,), update_s=(0.2,))
        family = schedules.get(run.schedule)
        return simulate(family, shape, unit, windows=SIMULATED_WINDOWS, keep_events=keep_events)
    except (ValueError, TypeError, ScheduleError):
        return None


def _timeline(runs: Sequence[FoundRun], traces: Sequence[FoundTrace]) -> str:
    lanes: list[tuple[str, Sequence[Event]]] = [(trace.label, trace.events) for trace in traces]
    kind = "What each stage did, as executed."
    if not lanes:
        kind = "What each schedule does, simulated with unit costs: give traces of --save-trace for what was executed."
        for label, some in grouped(runs).items():
            modelled = _simulated(some[0], keep_events=True)
            if modelled is not None:
                lanes.append((f"{label} (simulated)", modelled.events))
    data = []
    left_out = 0
    for label, events in lanes:
        shown = sorted(events, key=lambda event: event.start_s)
        left_out += max(0, len(shown) - MOST_EVENTS)
        shown = shown[:MOST_EVENTS]
        origin = shown[0].start_s if shown else 0.0
        cells = [_cell(event, origin) for event in shown]
        data.append({"label": label, "rows": 1 + max((event.stage for event in shown), default=0), "cells": cells})
    legend = " ".join(
        f'<span class="key"><i style="background:{colour}"></i>{op} {ACTION_NAMES[op]}</span>'
        for op, colour in ACTION_COLOURS.items()
    )
    more = f" {left_out:,} later actions are left out." if left_out else ""
    embedded = json.dumps({"lanes": data, "colours": ACTION_COLOURS}).replace("</", "<\\/")
    return (
        f"<p>{kind}{more} Scroll to zoom, drag to move, double-click for all of it; a cell says what it is.</p>"
        f'<p>{legend}</p><div id="timeline"></div><p id="cell">&nbsp;</p>'
        f'<script type="application/json" id="timeline-data">{embedded}</script>'
    )


def _cell(event: Event, origin: float) -> list[Any]:
    action = Action.parse(event.action)
    times = (round(event.start_s - origin, 6), round(event.end_s - origin, 6))
    return [event.stage, action.op.value, action.index, *times, event.version]


def _memory(runs: Sequence[FoundRun]) -> str:
    """Bars of what each stage held at its peak, to one scale."""
    rows = []
    most = max((int(part.get("total", 0)) for run in runs for part in run.facts.get("memory", {}).values()), default=0)
    for label, some in grouped(runs).items():
        for stage, parts in some[0].facts.get("memory", {}).items():
            bars = "".join(
                f'<i title="{name}: {text.size(parts.get(name, 0))}" '
                f'style="width:{100 * parts.get(name, 0) / max(1, most):.3f}%;background:{colour}"></i>'
                for name, colour in zip(PARTS, PART_COLOURS, strict=True)
            )
            total = text.size(parts.get("total", 0))
            rows.append(
                f"<tr><td>{escape(label)}</td><td>stage {escape(stage)}</td><td>{total}</td>"
                f'<td class="bars">{bars}</td></tr>'
            )
    if not rows:
        return "<p>The runs say nothing about memory.</p>"
    legend = " ".join(
        f'<span class="key"><i style="background:{colour}"></i>{name}</span>'
        for name, colour in zip(PARTS, PART_COLOURS, strict=True)
    )
    return f'<p>{legend}</p><table class="memory">{"".join(rows)}</table>'


def _environment(runs: Sequence[FoundRun]) -> str:
    machines = [run.machine for run in runs if run.machine]
    facts = [[key, str(value)] for key, value in (machines[0] if machines else {}).items()]
    several = "" if all(one == machines[0] for one in machines) else '<p class="warning">Not all on one machine.</p>'
    options = runs[0].facts["config"]
    alike = [
        [key, str(value)]
        for key, value in options.items()
        if value is not None and all(run.facts["config"].get(key) == value for run in runs)
    ]
    files = [[run.label, str(run.seed), str(run.where)] for run in runs]
    return (
        f"{several}{_table(['machine', ''], facts) if facts else ''}"
        f"<details><summary>Options that all runs share</summary>{_table(['option', 'value'], alike)}</details>"
        f"<details><summary>Runs</summary>{_table(['schedule', 'seed', 'file'], files)}</details>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
