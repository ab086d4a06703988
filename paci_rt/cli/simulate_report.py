"""What ``paci-rt simulate`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paci_rt import schedules
from paci_rt.cli.options import MS
from paci_rt.report import text
from paci_rt.schedules.slack import slack_text
from paci_rt.simulate import Simulation

PRICE = (
    "steady_utilization",
    "micro_batches_per_s",
    "peak_activations",
    "peak_activation_bytes",
    "max_drift",
    "max_delay",
)
"""What slack changes in a simulation."""


def price_table(simulations: Sequence[Simulation]) -> str:
    """A row per simulation: what its slack gives, and what it takes."""
    header = ["slack", "steady utilization", "micro-batches/s", "peak activations", "max drift", "max delay"]
    sizes = any(any(one.peak_activation_bytes.values()) for one in simulations)
    header[4:4] = ["peak size"] * sizes
    rows = []
    for one in simulations:
        row = [slack_text(one.slack), f"{one.steady_utilization:.4f}", f"{one.micro_batches_per_s:.5g}"]
        row.append(str(max(one.peak_activations.values())))
        row += [text.size(max(one.peak_activation_bytes.values()))] * sizes
        rows.append([*row, str(one.max_drift), str(one.max_delay)])
    return text.table(header, rows)


_TABLE_ROWS = 40


def to_json(found: Simulation) -> dict[str, Any]:
    """The keys of ``paci-rt simulate --json``: those of the simulation, and the makespan in milliseconds."""
    return {**found.to_json(), "makespan": _milliseconds(found.makespan_s)}


def _milliseconds(value_s: float) -> float:
    """Without the rounding errors of seconds."""
    return float(f"{value_s / MS:.12g}")


def report_text(found: Simulation, strict: Simulation | None = None) -> str:
    """The summary, and a table with a row per stage; ``strict`` is the same without slack."""
    chunks = found.stages // found.ranks
    parts = [
        f"{found.schedule}: {_counted(found.ranks, 'stage')}" + (f" of {chunks} pieces" if chunks > 1 else ""),
        f"{_counted(found.windows, 'window')} of {_counted(found.accumulation, 'micro-batch')}",
        f"policy {found.policy}" + (", look-ahead" if found.lookahead else ""),
    ]
    whole = not found.steady_windows and not schedules.get(found.schedule).flush
    steady = " (of the whole run: more --windows have a steady part)" if whole else ""
    parts += [f"slack {slack_text(found.slack)}"] if schedules.get(found.schedule).takes_slack else []
    lines = [
        ", ".join(parts),
        f"bubble rate {found.bubble_rate:.4f}",
        f"makespan {_milliseconds(found.makespan_s):.6g} ms",
        f"steady utilization {found.steady_utilization:.4f}, {found.micro_batches_per_s:.5g} micro-batches/s{steady}",
        f"max drift {found.max_drift}, max delay {found.max_delay}",
    ]
    compared = [] if strict is None else [price_table([strict, found])]
    return "\n\n".join(["\n".join(lines), *compared, _table(found)])


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")


def _table(found: Simulation) -> str:
    header = ["stage", "busy", "peak activations", "drift", "delay", "weight versions"]
    stashes, sizes = any(found.peak_stashes.values()), any(found.peak_activation_bytes.values())
    extra = any(found.extra_weight_bytes.values())
    header[3:3] = ["stashes"] * stashes + ["peak size"] * sizes
    header += ["extra weights"] * extra
    rows = []
    for rank in range(min(found.ranks, _TABLE_ROWS)):
        row = [str(rank), text.share(found.busy_s[rank] / found.makespan_s if found.makespan_s else 0.0)]
        row.append(str(found.peak_activations[rank]))
        row += [str(found.peak_stashes[rank])] * stashes
        row += [text.size(found.peak_activation_bytes[rank])] * sizes
        row += [str(max(found.drift[rank])), str(max(found.delay[rank])), str(found.weight_versions[rank])]
        row += [text.size(found.extra_weight_bytes[rank])] * extra
        rows.append(row)
    more = f"\n... {found.ranks - _TABLE_ROWS} more stages" if found.ranks > _TABLE_ROWS else ""
    return text.table(header, rows) + more
