"""Faults at random places of training runs: does every run end in time, say whose fault it was, and leave nothing?

    python benchmarks/faults.py --runs 60 --seed 1 --json FILE

One row per run. Each run draws a launcher (``paci-rt train`` or torchrun), a transport, a schedule, a phase of the run
(start, warm-up, training, validation, save, end), a stage and a fault: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``term``
(SIGTERM to the launcher), ``raise`` and ``memory`` (exceptions), ``exit``, ``cut`` (all its connections, over gloo).

A run passes if
- it ends within the deadline (``--transfer-timeout``) and 5 s more after the fault, with the right exit code (SIGTERM
  after the last step may let it end as if nothing had come);
- its output names the stage at fault;
- no process, no shared memory and no temporary file is left;
- the folder of checkpoints holds a whole one, if it held one when the fault came.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "benchmarks" / "faults_stage.py"
STEPS = 12
MARGIN_S = 5.0
HANG_S = 90.0
"""A run that has not ended so long after its start, and its fault, is killed and has failed."""
KINDS = ("kill", "stop", "term", "raise", "memory", "exit", "cut")
PHASES = ("start", "warm-up", "training", "validation", "save", "writing", "end")
SCHEDULES = ("paci", "1f1b", "zb-h1", "gpipe", "async-1f1b", "pipedream-2bw")


@dataclass(kw_only=True)
class Case:
    """One run and what came of it; ``problems`` is empty where it passed."""

    number: int
    launcher: str
    transport: str
    schedule: str
    stages: int
    phase: str
    kind: str
    rank: int
    at: int
    deadline_s: float
    took_s: float | None = None
    code: int | None = None
    said: str = ""
    standing: str = ""
    problems: list[str] = field(default_factory=list)


def draw(number: int, rng: random.Random, deadline_s: float) -> Case:
    """A random case; every phase and kind comes up equally often in the long run."""
    kind, phase = rng.choice(KINDS), rng.choice(PHASES)
    stages = rng.choice((2, 3))
    most = {"start": 1, "warm-up": 3, "training": 60, "validation": 8, "save": 3, "writing": 40, "end": 2}[phase]
    return Case(
        number=number,
        launcher=rng.choice(("train", "torchrun")),
        transport="gloo" if kind == "cut" else rng.choice(("gloo", "shm")),
        schedule=rng.choice(SCHEDULES),
        stages=stages,
        phase=phase,
        kind=kind,
        rank=rng.randrange(stages),
        at=4 + rng.randrange(most) if phase == "training" else rng.randrange(most),
        deadline_s=deadline_s,
    )


def command(case: Case, out: Path) -> list[str]:
    """What starts the run."""
    options = ["train", "--stages", str(case.stages), "--schedule", case.schedule, "--transport", case.transport]
    options += ["--steps", str(STEPS), "--batch-size", "4", "--seq-len", "8", "--out", str(out), "--save-interval", "3"]
    options += ["--eval-interval", "4", "--eval-batches", "2", "--transfer-timeout", str(case.deadline_s)]
    options += ["--grace-s", str(case.deadline_s)]
    if case.number % 2:
        options += ["--eval-drained"]
    if case.launcher == "train":
        return [sys.executable, str(STAGE), *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.stages)]
    return [*torchrun, str(STAGE), *options]


def play(case: Case, keep: bool = False) -> Case:
    """Run one case and note what is wrong with it."""
    marker = uuid.uuid4().hex
    shm_before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        place = Path(folder)
        (place / "tmp").mkdir()
        mark = place / "mark"
        fault = {"kind": case.kind, "rank": case.rank, "phase": case.phase, "at": case.at, "mark": str(mark)}
        environment = {**os.environ, "FAULT": json.dumps(fault), "FAULT_RUN": marker, "TMPDIR": str(place / "tmp")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (place / "said").open("w+") as said:
            run = subprocess.Popen(
                command(case, place / "out"), env=environment, stdout=said, stderr=said, start_new_session=True
            )
            ended_s = wait(run, mark, case)
            said.seek(0)
            case.said = said.read()
        case.code = run.returncode
        judge(case, mark, ended_s)
        leftovers(case, marker, shm_before, place / "tmp")
        checkpoint(case, place / "out")
        if keep:
            print(case.said, file=sys.stderr)
    return case


def wait(run: subprocess.Popen[str], mark: Path, case: Case) -> float:
    """Wait for the end; the monotonic time of it."""
    begin = time.monotonic()
    while run.poll() is None:
        if time.monotonic() - begin > HANG_S + 4 * case.deadline_s:
            case.problems.append("hangs")
            end_all(run.pid)
            run.wait()
        time.sleep(0.02)
    return time.monotonic()


def end_all(session: int) -> None:
    """Kill whatever is left of a run's session."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def judge(case: Case, mark: Path, ended_s: float) -> None:
    """Time, exit code, and whether the stage at fault is named."""
    if not mark.exists():
        case.problems.append("the fault never came")
        return
    struck = json.loads(mark.read_text())
    case.took_s, case.standing = round(ended_s - struck["time_s"], 2), struck["standing"]
    if case.took_s > case.deadline_s + MARGIN_S:
        case.problems.append(f"took {case.took_s} s")
    good = {"train": (143,) if case.kind == "term" else (1,), "torchrun": (1, 143, -15)}[case.launcher]
    if case.kind == "term" and f"step {STEPS}/{STEPS}" in case.said:
        good = (*good, 0)  # it came when there was nothing left to stop
    if case.code not in good:
        case.problems.append(f"exit code {case.code}")
    if case.kind != "term" and not named(case):
        case.problems.append("the stage at fault is not named")


def named(case: Case) -> bool:
    """Whether an error of paci-rt says that it was this stage."""
    lines = "\n".join(re.findall(r"paci-rt: .*(?:\n(?!paci-rt:|Traceback).*)*", case.said))
    stage = rf"\b(?:stage|rank) {case.rank}\b"
    words = {
        "kill": rf"{stage}[^;\n]*(?:killed by SIGKILL|is gone)",
        "stop": rf"{stage}[^;\n]*is stopped",
        "raise": rf"{stage}[^\n]*(?:made of cheese|failed)",
        "memory": rf"{stage}[^\n]*(?:no memory is left|failed)",
        "exit": rf"{stage}[^;\n]*(?:exit code 3|is gone)",
        "cut": stage,
    }
    if case.launcher == "torchrun" and case.kind in ("kill", "exit"):  # which torchrun itself may be the first to see
        cause = re.search(r"Root Cause.*?rank\s*: (\d+)", case.said, re.DOTALL)
        if cause is not None and int(cause[1]) == case.rank:
            return True
    return re.search(words[case.kind], lines) is not None


def leftovers(case: Case, marker: str, shm_before: set[str], tmp: Path) -> None:
    """Processes, shared memory and temporary files that are still there."""
    end = time.monotonic() + 2.0
    while left := processes(marker):
        if time.monotonic() > end:
            case.problems.append(f"processes left: {left}")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.05)
    shm = [name for name in set(os.listdir("/dev/shm")) - shm_before if "paci" in name]
    files = [name for name in os.listdir(tmp) if not name.startswith(("torchelastic", "torchinductor"))]
    if shm or files:
        case.problems.append(f"left behind: {', '.join(shm + files)}")


def processes(marker: str) -> list[int]:
    """Processes of the run that are still there, but for those that only wait to be collected."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if f"FAULT_RUN={marker}".encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state not in ("Z", "X"):
                    found.append(int(entry.name))
    return found


def checkpoint(case: Case, out: Path) -> None:
    """Whether the folder's checkpoint, if there is one, can be read to its end."""
    import torch

    from paci_rt.checkpoint import read_index

    if not (out / "index.json").exists():
        if any(out.glob("step-*.pt")) and case.phase in ("training", "end"):
            case.problems.append("checkpoint lost")
        return
    try:
        for file in read_index(out)["files"]:
            torch.load(out / file["file"], weights_only=True)
    except Exception as error:
        case.problems.append(f"checkpoint cannot be read: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--deadline", type=float, default=5.0, metavar="SECONDS", help="--transfer-timeout of the runs")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one run of the series, with its output")
    parser.add_argument("--kinds", help=f"only these of {','.join(KINDS)}")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cases = [draw(number, rng, args.deadline) for number in range(args.runs)]
    if args.kinds:
        cases = [case for case in cases if case.kind in args.kinds.split(",")]
    if args.only is not None:
        cases = [case for case in cases if case.number == args.only]
    done: list[Case] = []
    for case in cases:
        done.append(play(case, keep=args.only is not None))
        how = "ok" if not case.problems else "; ".join(case.problems)
        where = f"{case.launcher:8} {case.transport:4} {case.schedule:13} {case.stages}"
        print(
            f"{case.number:3}  {where}  {case.phase:10} {case.kind:6} stage {case.rank}  {case.took_s} s  {how}",
            flush=True,
        )
        if args.json:
            write(args, done)
    failed = [case for case in done if case.problems]
    print(f"{len(done) - len(failed)} of {len(done)} ended well")
    print("OK" if not failed else "FAILED")
    return 1 if failed else 0


def without_places(said: str) -> str:
    """Of files in ``said`` the names alone: where they lay tells nobody anything."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", said)


def write(args: argparse.Namespace, done: list[Case]) -> None:
    rows: list[dict[str, Any]] = []
    for case in done:
        row = asdict(case)
        row["said"] = without_places(case.said[-2000:]) if case.problems else ""
        rows.append(row)
    counts = {
        name: Counter(getattr(case, name) for case in done) for name in ("kind", "phase", "launcher", "transport")
    }
    good = sum(not case.problems for case in done)
    times = [case.took_s for case in done if case.took_s is not None]
    head = {"seed": args.seed, "runs": len(done), "ended_well": good, "longest_s": max(times, default=None)}
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps({**head, "counts": counts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
