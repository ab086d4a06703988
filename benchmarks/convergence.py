"""How many more tokens does an asynchronous schedule need than 1F1B-flush, and how much sooner is it there?

Every run is a replay in one process, which computes exactly what a distributed run does. Runs are kept in a file, one
a line, so an interrupted benchmark goes on where it was. README.md in this folder defines each number.

    python benchmarks/convergence.py --quick
    python benchmarks/convergence.py --studies main,rivals --jobs 2 --out runs/convergence
    python benchmarks/convergence.py --studies all --report-only --out runs/convergence
    python benchmarks/convergence.py --task gpt-tiny --stages 8 --methods paci,look-ahead --accumulation 8,16 \
      --rates 5e-4,1e-3 --updates 200 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import finish, list_of, positive, print_table
from paci_rt.simulate import Costs
from staleness.case import METHODS
from staleness.catalogue import STUDIES
from staleness.report import Table, markdown, missed, print_tables, tabulate
from staleness.seconds import TimeRow, measure_costs, profiled_costs, time_rows
from staleness.store import Store, complete
from staleness.studies import Study, baseline_of
from staleness.tasks import TASKS

RESULTS = Path(__file__).resolve().parent / "results"
TIMED = ("main", "gpt-tiny")  # studies whose overheads become times
TIMED_ACCUMULATION = 8
TIME_COLUMNS = ("study", "method", "over", "throughput", "early", "middle", "late")
LEAST_SPEEDUP = 1.65  # over 1F1B-flush, at the first and the last threshold


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument("--studies", type=list_of(str), help=f"of {', '.join(STUDIES)}; or all (default main)")
    what.add_argument("--quick", action="store_true", help="a verdict within 3 minutes on 2 cores")
    own = parser.add_argument_group("a study of your own, instead")
    own.add_argument("--task", choices=sorted(TASKS))
    own.add_argument("--layers", type=positive, help="blocks; the task's own number")
    own.add_argument("--stages", type=positive, default=8)
    own.add_argument("--accumulation", type=list_of(positive), default=[8])
    own.add_argument("--methods", type=list_of(str), default=["paci", "look-ahead"], help="see replay/case.py")
    own.add_argument("--rates", type=list_of(float), default=[1e-3])
    own.add_argument("--seeds", type=list_of(int), default=[0, 1, 2])
    own.add_argument("--updates", type=positive, default=200)
    own.add_argument("--warmup", type=int, default=20)
    own.add_argument("--shape", choices=("cosine", "constant", "drops"), default="cosine")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    how.add_argument("--jobs", type=positive, default=2, help="runs at a time, one thread each (default 2)")
    how.add_argument("--minutes", type=float, help="start no run after so many")
    how.add_argument("--runs", type=Path, default=RESULTS / "convergence_runs.jsonl", help="file of finished runs")
    how.add_argument("--report-only", action="store_true", help="run nothing, show what is there")
    how.add_argument("--out", type=Path, help="folder for plots and tables")
    how.add_argument("--costs", help="profile of stage costs (default: the task's, measured here)")
    how.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        parser.error("--device cuda: this version of paci_rt trains on the CPU only; use --device cpu")
    if options.warmup < 0:
        parser.error(f"--warmup is {options.warmup}: give a number of updates, at least 0")
    if options.quick and (options.studies or options.task):
        parser.error("--quick is a study of its own: leave --studies and --task out")
    if options.studies and options.task:
        parser.error("--task describes a study of your own: leave --studies out")
    unknown = [name for name in options.studies or [] if name not in (*STUDIES, "all")]
    unknown += [name for name in options.methods if name not in METHODS]
    if unknown:
        known = METHODS if unknown[0] in options.methods else STUDIES
        parser.error(f"{unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return options


def chosen(options: argparse.Namespace) -> list[Study]:
    """The studies that were asked for."""
    if options.task:
        baselines = dict.fromkeys(map(baseline_of, options.methods))
        cells = [(name, (options.accumulation[0],)) for name in baselines]
        cells += [(name, tuple(options.accumulation)) for name in options.methods if name not in baselines]
        studies = [
            Study(
                name="own",
                question=f"{', '.join(options.methods)} on {options.task}",
                task=options.task,
                layers=options.layers,
                stages=options.stages,
                cells=tuple(cells),
                rates=tuple(options.rates),
                seeds=tuple(options.seeds),
                updates=options.updates,
                warmup=options.warmup,
                shape=options.shape,
            )
        ]
    elif options.quick:
        studies = [STUDIES["quick"]]
    elif options.studies and "all" in options.studies:
        studies = [study for study in STUDIES.values() if study.name != "quick"]
    else:
        studies = [STUDIES[name] for name in options.studies or ["main"]]
    return [replace(study, device=options.device, dtype=options.dtype) for study in studies]


def run(studies: list[Study], store: Store, jobs: int, minutes: float | None) -> None:
    """What is missing of the studies, one study after another."""
    until = None if minutes is None else time.monotonic() + 60 * minutes
    for study in studies:
        print(f"{study.name}: {study.question}", flush=True)
        for phase in ([*map(study.pilot, study.baselines), *study.search()], lambda s=study: s.repeats(store)):
            cases = phase() if callable(phase) else phase
            left_s = None if until is None else until - time.monotonic()
            if left_s is not None and left_s <= 0:
                print("out of time: run the same command again to go on", flush=True)
                return
            complete(store, cases, jobs=jobs, deadline_s=left_s)


def timed(tables: list[Table], costs_file: str | None) -> tuple[list[TimeRow], dict[str, Costs]]:
    """Time to accuracy of the studies that have tables, by stage costs from a profile or measured now."""
    rows, costs = [], {}
    for table in tables:
        study = table.study
        if study.name in TIMED and table.ahead(TIMED_ACCUMULATION) is not None:
            if costs_file is None:
                found = measure_costs(
                    study.task, layers=study.layers, stages=study.stages, accumulation=TIMED_ACCUMULATION
                )
            else:
                found = profiled_costs(costs_file, study.stages, TIMED_ACCUMULATION)
            costs[study.name] = found
            rows += time_rows(table, found, TIMED_ACCUMULATION)
    return rows, costs


def slow(rows: list[TimeRow]) -> list[str]:
    """Where look-ahead is not LEAST_SPEEDUP times as fast as 1F1B-flush."""
    return [
        f"{row.study}: {row.method} {name} {speedup:.2f} times as fast as {row.over}, asked {LEAST_SPEEDUP}"
        for row in rows
        if row.method.startswith("look-ahead") and row.over == "1f1b"
        for name, speedup in (("early", row.speedups[0]), ("late", row.speedups[-1]))
        if speedup < LEAST_SPEEDUP
    ]


def main() -> None:
    options = parse()
    studies = chosen(options)
    try:
        store = Store(options.runs)
        if not options.report_only:
            run(studies, store, options.jobs, options.minutes)
        tables = [table for table in (tabulate(study, store) for study in studies) if table.rows]
        rows, costs = timed(tables, options.costs)
    except ValueError as error:
        sys.exit(f"convergence.py: {error}")
    print_tables(tables, print_table)
    if rows:
        source = options.costs or "measured here"
        print(f"\ntime to accuracy: how many times as fast, in a simulated pipeline with stage costs {source}")
        print_table(TIME_COLUMNS, [row.cells for row in rows])
    if options.out is not None:
        from staleness.pictures import draw

        written = draw(options.out, tables)
        (options.out / "tables.md").write_text(markdown(tables), encoding="utf-8")
        for path in (*written, options.out / "tables.md"):
            print(f"wrote {path}")
    documents: list[dict[str, Any]] = [table.to_json() for table in tables]
    documents += [row.to_json() for row in rows]
    documents += [{"study": name, "stage_costs_s": asdict(cost)} for name, cost in costs.items()]
    incomplete = [f"{table.study.name} is not complete: run it again" for table in tables if not table.complete]
    finish("convergence", documents, [*incomplete, *missed(tables), *slow(rows)], options.json)


if __name__ == "__main__":
    main()
