"""What PACI costs in tokens and gives in time: the tables and the figure of ``docs/method/convergence.md``.

    python benchmarks/token_overhead.py [--json FILE] [--figure FILE] [--docs FILE] [--write-table]

Three tables, from ``f`` in the package's table and from ``results/iso_loss*.json``; nothing is trained.

- *measured*: every row with its interval. Those of ``runs of one length`` come from ``staleness/one_length.py``.
- *time to accuracy*: throughput of the simulator over f, and over the best schedule that flushes, with the same update;
  stages take equal times for F, I and W, and links are free.
- *predicted*: linear theory. A share of the loss sits in directions that gradient noise keeps up; with ``x`` the step
  times the preconditioned curvature of those, delay multiplies their variance as ``staleness/stability.py`` says, and
  as many times the tokens at a lower rate bring it down again. ``x`` is the one number that is fitted, to plain PACI at
  P = a = 8; the other rows are predictions.

``--docs`` puts the tables between their marks in the page, and ``--write-table`` the finished rows of
``results/iso_loss*.json`` into ``paci_rt/planner/token_overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import print_table, write_json
from paci_rt import schedules
from paci_rt.planner.evaluate import early_share
from paci_rt.planner.token_overhead import PACKAGED, OverheadRow, OverheadTable, load_overheads
from paci_rt.schedules import Shape, Slack, policies
from paci_rt.simulate import Costs, simulate
from staleness.one_length import one_lengths
from staleness.stability import StageModel

ONE_LENGTH = "runs of one length"
RESULTS = Path(__file__).resolve().parent / "results"
FLUSHED = ("1f1b", "zb-1p", "zb-2p")
ACCUMULATIONS = (4, 8, 16, 32)
POINTS = ((8, 4), (8, 8), (8, 16), (8, 32), (16, 16), (32, 32))
MEASURED_HEADER = ("optimizer", "forwards", "policy", "P, a", "delay", "share", "rate", "f", "seeds", "from")
TIMES_HEADER = ("a", *FLUSHED, "paci", "f", *(f"over {name}" for name in FLUSHED), "f, plain", "plain over 1f1b")
FITTED = {"optimizer": "adamw", "policy": "bounded", "lookahead": False, "delay": 1}


def rows_of(path: Path) -> list[OverheadRow]:
    """Rows of one run of ``iso_loss.py``, of methods that the planner knows."""
    found = []
    document = json.loads(path.read_text(encoding="utf-8"))
    for row in document["rows"]:
        policy = "recompute" if row["method"].startswith("recompute") else "bounded"
        if row["method"] not in ("paci", "look-ahead", "recompute", "recompute look-ahead"):
            continue
        family = schedules.get("paci")
        shape = Shape(num_stages=row["stages"], accumulation=row["accumulation"])
        plan = document["plan"]
        width = f", width {plan['width']}" if plan.get("width") else ""
        clip = f", clipped at {plan['clip']:g}" if plan.get("clip") else ""
        found.append(
            OverheadRow(
                optimizer=row["optimizer"],
                policy=policy,
                lookahead="look-ahead" in row["method"],
                delay=max(policies.bounds(policy, family, shape, rank)[1] for rank in range(row["stages"])),
                share=early_share(policy, family, shape),
                f=row["f"],
                f_low=row["f_low"],
                f_high=row["f_high"],
                at=row["at"],
                rate=row["rate"],
                seeds=row["seeds"],
                stages=row["stages"],
                accumulation=row["accumulation"],
                model=f"{row['task']}{width}, {plan['shape']}{clip}",
                updates=row["updates"],
                why=row.get("why", ""),
                source=f"benchmarks/results/{path.name}" + (", plan not complete" if row.get("partial") else ""),
            )
        )
    return found


def one_length_rows(folder: Path) -> list[OverheadRow]:
    """Rows that runs of one length give, which are less than those of :func:`rows_of`. Look-ahead as it was, with
    shared passes, stands in where look-ahead as it is has none."""
    family, found = schedules.get("paci"), []
    all_of_them = one_lengths(folder)
    now = {(one.task, one.stages, one.accumulation) for one in all_of_them if one.method == "look-ahead"}
    for one in all_of_them:
        shared = one.method == "look-ahead shared"
        if shared and (one.task, one.stages, one.accumulation) in now:
            continue
        shape = Shape(num_stages=one.stages, accumulation=one.accumulation)
        main = one.task == "gpt-nano" and one.stages == 8
        found.append(
            OverheadRow(
                optimizer="adamw",
                lookahead=one.method != "paci",
                delay=max(policies.bounds("bounded", family, shape, rank)[1] for rank in range(one.stages)),
                share=early_share("bounded", family, shape),
                f=round(one.f(), 4),
                f_low=round(one.f(one.behind_low), 4),
                f_high=round(one.f(one.behind_high), 4),
                at={0.002: "best", 0.001: "half"}.get(one.rate, "") if main else "",
                rate=one.rate,
                seeds=one.seeds,
                stages=one.stages,
                accumulation=one.accumulation,
                model=f"{one.task}, cosine" + (", shared passes" if shared else ""),
                updates=one.updates,
                source=ONE_LENGTH,
            )
        )
    return found


def updated(table: OverheadTable, measured: list[OverheadRow], shorter: list[OverheadRow]) -> OverheadTable:
    """``table`` with ``measured`` in place of what it has at their shares, and rows of one length besides."""
    points = {(row.kind, round(row.share, 6)) for row in measured}
    kept = [row for row in table.rows if (row.kind, round(row.share, 6)) not in points]
    known = {(row.kind, row.share, row.at, row.model) for row in measured}
    new = [row for row in shorter if (row.kind, row.share, row.at, row.model) not in known]
    return replace(table, rows=(*measured, *new, *(row for row in kept if row.source != ONE_LENGTH)))


# --- tables ---


def interval(row: OverheadRow) -> str:
    low, high = ("?" if bound is None else f"{bound:.2f}" for bound in (row.f_low, row.f_high))
    return row.why if row.f is None else f"{row.f:.2f} ({low} to {high})"


def measured_table(table: OverheadTable) -> list[list[str]]:
    return [
        [
            row.optimizer,
            "look-ahead" if row.lookahead else "plain",
            row.policy,
            f"{row.stages}, {row.accumulation}",
            str(row.delay),
            f"{row.share:.2f}",
            row.at,
            interval(row),
            str(row.seeds or "?"),
            row.source,
        ]
        for row in sorted(table.rows, key=lambda one: (one.kind, one.share, one.at))
    ]


def throughput(schedule: str, stages: int, accumulation: int, slack: Slack = 0) -> float:
    """Share of full throughput, in the steady state, for equal F, I and W and free links."""
    costs = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    shape = Shape(num_stages=stages, accumulation=accumulation, slack=slack)
    windows = 3 if schedules.get(schedule).flush else 4 + 4 * stages // accumulation
    return 3 * simulate(schedules.get(schedule), shape, costs, windows=windows).micro_batches_per_s


def time_table(table: OverheadTable, stages: int = 8) -> list[dict[str, Any]]:
    """By ``a``: throughputs, and how many times as soon PACI is there, with look-ahead and without."""
    found = []
    family = schedules.get("paci")
    for accumulation in ACCUMULATIONS:
        shape = Shape(num_stages=stages, accumulation=accumulation)
        rates = {name: throughput(name, stages, accumulation) for name in (*FLUSHED, "paci")}
        row: dict[str, Any] = {"stages": stages, "accumulation": accumulation, "throughput": rates}
        delay = max(policies.bounds("bounded", family, shape, rank)[1] for rank in range(stages))
        for name, ahead in (("look-ahead", True), ("plain", False)):
            overhead = table.of(
                optimizer="adamw",
                policy="bounded",
                lookahead=ahead,
                delay=delay,
                share=early_share("bounded", family, shape),
            )
            row[name] = {"f": overhead.f, "f_low": overhead.low, "f_high": overhead.high, "basis": overhead.basis}
            if overhead.f is not None:
                times = {other: rates["paci"] / overhead.factor / rates[other] for other in FLUSHED}
                row[name]["sooner_than"] = times
        found.append(row)
    return found


def predicted(stages: int, accumulation: int, predictor: str, step: float) -> float:
    """``f`` by the linear theory: the mean over the stages of the variance over that of undelayed training."""
    undelayed = StageModel(behind=0, accumulation=accumulation, predictor="none").spread(step)
    ratios = [
        StageModel(behind=behind, accumulation=accumulation, predictor=predictor).spread(step) / undelayed
        for behind in range(stages)
    ]
    return sum(ratios) / stages


def fitted_step(f: float, stages: int = 8, accumulation: int = 8) -> float:
    """The ``x`` at which plain PACI's ``f`` is as measured."""
    low, high = 1e-3, 1.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted(stages, accumulation, "none", middle) < f else (low, middle)
    return low


def theory_table(table: OverheadTable) -> dict[str, Any]:
    """Predictions beside what the table has."""
    family = schedules.get("paci")
    plain = table.of(**FITTED, share=28 / 64)  # type: ignore[arg-type]
    if plain.f is None:
        return {"x": None, "rows": []}
    step, rows = fitted_step(plain.f), []
    for stages, accumulation in POINTS:
        shape = Shape(num_stages=stages, accumulation=accumulation)
        share = early_share("bounded", family, shape)
        delay = max(policies.bounds("bounded", family, shape, rank)[1] for rank in range(stages))
        for name, predictor, ahead in (("plain", "none", False), ("look-ahead", "look-ahead", True)):
            near = [
                row
                for row in table.rows
                if row.kind == ("adamw", "bounded", ahead, delay) and abs(row.share - share) < 1e-4
            ]
            rows.append(
                {
                    "stages": stages,
                    "accumulation": accumulation,
                    "method": name,
                    "share": share,
                    "delay": delay,
                    "predicted": predicted(stages, accumulation, predictor, step),
                    "measured": [interval(row) for row in near],
                }
            )
    return {"x": step, "rows": rows}


# --- the figure ---


def draw(table: OverheadTable, path: Path) -> None:
    """f against a/P, with intervals, by optimizer and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    kinds = dict.fromkeys((row.optimizer, row.policy, row.lookahead) for row in table.rows)
    for number, (optimizer, policy, ahead) in enumerate(kinds):
        for at, marker in (("best", "o"), ("half", "^"), ("", "s")):
            mine = [
                row
                for row in table.rows
                if (row.optimizer, row.policy, row.lookahead, row.at) == (optimizer, policy, ahead, at)
                and row.f is not None
                and row.stages
                and row.accumulation
                and abs(row.share - early_share("bounded", schedules.get("paci"), _shape(row))) < 1e-4
            ]
            if not mine:
                continue
            x = [row.accumulation / row.stages * 1.03 ** (number + (at == "half")) for row in mine]  # type: ignore[operator]
            ends = [
                (row.f - (row.f_low or row.f), (row.f_high or row.f) - row.f)  # type: ignore[operator]
                for row in mine
            ]
            label = f"{optimizer}, {'look-ahead' if ahead else 'plain'}" + (
                "" if policy == "bounded" else f", {policy}"
            )
            axes.errorbar(
                x,
                [row.f for row in mine],
                yerr=list(zip(*ends, strict=True)),
                fmt=marker,
                color=f"C{number}",
                capsize=3,
                label=f"{label}, {at or 'one'} rate",
            )
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4], ["1/2", "1", "2", "4"])
    axes.set_xlabel("micro-batches per update over stages, a / P")
    axes.set_ylabel("tokens over those of 1F1B-flush, f")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _shape(row: OverheadRow) -> Shape:
    assert row.stages is not None and row.accumulation is not None
    return Shape(num_stages=row.stages, accumulation=row.accumulation)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="page with the marks of the tables")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of iso_loss*.json")
    parser.add_argument("--write-table", action="store_true", help="into paci_rt/planner/token_overhead.json")
    options = parser.parse_args(argv)
    files = [path for path in sorted(options.results.glob("iso_loss*.json")) if "plan" not in path.name]
    measured = [row for path in files for row in rows_of(path)]
    table = updated(load_overheads(PACKAGED), measured, one_length_rows(options.results))
    if options.write_table:
        write_json(str(PACKAGED), table.to_json())
    times, theory = time_table(table), theory_table(table)
    tables = {
        "measured": (MEASURED_HEADER, measured_table(table)),
        "times": (TIMES_HEADER, [_time_text(row) for row in times]),
        "theory": (("P", "a", "method", "predicted f", "measured"), [_theory_text(row) for row in theory["rows"]]),
    }
    for header, rows in tables.values():
        print_table(header, rows)
        print()
    print(f"x = {theory['x']}")
    if options.docs:
        text = options.docs.read_text(encoding="utf-8")
        for name, (header, rows) in tables.items():
            text = filled(text, name, header, rows)
        options.docs.write_text(text, encoding="utf-8")
    if options.figure:
        draw(table, options.figure)
    if options.json:
        write_json(options.json, {"rows": table.to_json()["rows"], "times": times, "theory": theory})


def filled(text: str, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """``text`` with a table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
    if text.count(begin) != 1 or end not in text.split(begin)[1]:
        raise ValueError(f"the page has no marks for the table {name!r}")
    before, after = text.split(begin)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return before + begin + "\n" + "\n".join(lines) + "\n\n" + after[after.index(end) :]


def _theory_text(row: dict[str, Any]) -> list[str]:
    f = f"{row['predicted']:.2f}" if math.isfinite(row["predicted"]) else "not stable"
    measured = "; ".join(row["measured"]) or "not run"
    return [str(row["stages"]), str(row["accumulation"]), row["method"], f, measured]


def _time_text(row: dict[str, Any]) -> list[str]:
    cells = [str(row["accumulation"]), *(f"{row['throughput'][name]:.2f}" for name in (*FLUSHED, "paci"))]
    for name, over in (("look-ahead", FLUSHED), ("plain", FLUSHED[:1])):
        found = row[name]
        cells.append("?" if found["f"] is None else f"{found['f']:.2f}")
        cells += ["?" if found["f"] is None else f"{found['sooner_than'][other]:.2f}" for other in over]
    return cells


if __name__ == "__main__":
    main()
