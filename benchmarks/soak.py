"""A run that is delayed, killed and started again at random: its loss curve is that of a run that nobody disturbed.

    python benchmarks/soak.py --seconds 120 --seed 1 --json FILE

Rounds of ``paci-rt train --max-restarts`` until the time is over. Beside each, at random moments, a stage is stopped
for a moment (a delay) or killed. What must hold at the end of every round:
- losses, validations and parameters equal those of an undisturbed run at the same cadence of checkpoints, bit for bit;
- descriptors and memory of the launcher, which lives through all restarts, stay flat;
- no process, no shared memory and no temporary file is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults import ROOT, end_all, processes

STAGES = 2
OPTIONS = [
    "--stages",
    str(STAGES),
    "--batch-size",
    "4",
    "--seq-len",
    "16",
    "--save-interval",
    "5",
    "--eval-interval",
    "10",
]
ROUND_S = 300.0


@dataclass(kw_only=True)
class Round:
    """What was done to one run, and what is wrong with it; sizes are of the launcher, after its first start."""

    number: int
    schedule: str
    transport: str
    delays: int = 0
    kills: int = 0
    wall_s: float = 0.0
    handles: list[int] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def command(one: Round, steps: int, out: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "paci_rt", "train", *OPTIONS, "--steps", str(steps), "--schedule", one.schedule]
    return [*run, "--transport", one.transport, "--out", str(out), "--json", f"{out}.json", *more]


def outcome(out: Path) -> dict[str, Any]:
    """What must be equal: losses and validations by step, and the parameters."""
    found = json.loads(Path(f"{out}.json").read_text())
    return {
        "losses": [(point["step"], point["loss"]) for point in found["curve"]],
        "evals": [(point["step"], point["val_loss"]) for point in found["evals"]],
        "params_sha256": found["params_sha256"],
    }


def stages_of(launcher: int) -> list[int]:
    """The processes of a launcher that run stages."""
    found = []
    with suppress(OSError, ValueError):
        for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def measure(one: Round, launcher: int) -> None:
    """Note descriptors and memory of the launcher."""
    with suppress(OSError, IndexError):
        one.handles.append(len(os.listdir(f"/proc/{launcher}/fd")))
        pages = int(Path(f"/proc/{launcher}/statm").read_text().split()[1])
        one.resident_mib.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1))


def disturb(one: Round, run: subprocess.Popen[bytes], rng: random.Random, kills: int, deadline_s: float) -> None:
    """Delay and kill stages of ``run`` until it ends."""
    begin = time.monotonic()
    next_at = begin + rng.uniform(4, 8)
    while run.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if now - begin > ROUND_S:
            one.problems.append("hangs")
            end_all(run.pid)
        if now < next_at or not (stages := stages_of(run.pid)):
            continue
        victim = rng.choice(stages)
        with suppress(ProcessLookupError):
            if one.kills < kills and rng.random() < 0.5:
                if len(stages) == STAGES:  # a launcher that has not started all of them holds less
                    measure(one, run.pid)
                os.kill(victim, signal.SIGKILL)
                one.kills += 1
                next_at = now + rng.uniform(5, 10)
            else:
                os.kill(victim, signal.SIGSTOP)
                time.sleep(rng.uniform(0, deadline_s / 4))
                os.kill(victim, signal.SIGCONT)
                one.delays += 1
                next_at = time.monotonic() + rng.uniform(0.5, 2)


def play(one: Round, rng: random.Random, steps: int, place: Path) -> Round:
    """One undisturbed run and the same one disturbed, and whether they are equal."""
    deadline_s, kills, marker = 20.0, 3, uuid.uuid4().hex
    (place / "tmp").mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULT_RUN": marker}
    environment["TMPDIR"] = str(place / "tmp")
    shm_before = set(os.listdir("/dev/shm"))
    plain, disturbed = place / f"plain{one.number}", place / f"disturbed{one.number}"
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begin = time.monotonic()
    subprocess.run(command(one, steps, plain), check=True, timeout=ROUND_S, **quiet)
    more = ["--max-restarts", str(kills), "--transfer-timeout", str(deadline_s)]
    with (place / "said").open("wb") as said:
        streams = quiet | {"stderr": said}
        run = subprocess.Popen(command(one, steps, disturbed, *more), start_new_session=True, **streams)
        disturb(one, run, rng, kills, deadline_s)
    one.wall_s = round(time.monotonic() - begin, 1)
    if run.returncode != 0:
        one.problems.append(f"exit code {run.returncode}: {(place / 'said').read_text()[-500:]}")
    elif outcome(disturbed) != outcome(plain):
        one.problems.append("its curve or its parameters differ from the undisturbed run's")
    time.sleep(0.5)
    shm = [name for name in set(os.listdir("/dev/shm")) - shm_before if "paci" in name]
    files = [name for name in os.listdir(place / "tmp") if not name.startswith("torch")]
    left = [*map(str, processes(marker)), *shm, *files]
    if left:
        one.problems.append(f"left behind: {', '.join(left)}")
    for name, values, most in (("descriptors", one.handles, 4), ("MiB", one.resident_mib, 16)):
        if values and values[-1] - values[0] > most:
            one.problems.append(f"{name} of the launcher grow: {values}")
    return one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="no round begins after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="windows of a round")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rng, rounds, end = random.Random(args.seed), [], time.monotonic() + args.seconds
    while not rounds or time.monotonic() < end:
        schedule, transport = rng.choice(("paci", "1f1b", "zb-h1")), rng.choice(("shm", "gloo"))
        with tempfile.TemporaryDirectory(prefix="soak_") as folder:
            one = Round(number=len(rounds), schedule=schedule, transport=transport)
            rounds.append(play(one, rng, args.steps, Path(folder)))
        how = "ok" if not one.problems else "; ".join(one.problems)
        done = f"{one.delays} delays, {one.kills} kills, {one.wall_s} s"
        print(f"{one.number:3}  {schedule:6} {transport:4}  {done}  {how}", flush=True)
        if args.json:
            Path(args.json).write_text(
                json.dumps({"seed": args.seed, "rounds": [asdict(each) for each in rounds]}, indent=1) + "\n"
            )
    failed = [one for one in rounds if one.problems]
    print("OK" if not failed else "FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
