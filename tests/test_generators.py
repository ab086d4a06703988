"""A run with random numbers that was killed and goes on equals one that was never killed."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint
from paci_rt.runtime.generators import check_generators, collect_generators
from support.deadlines import deadline

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 6


class Noisy(nn.Module):
    """Dropout, and noise from Python's and NumPy's generators, as augmentations have it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.dropout, self.kind = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), kind

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        if not self.training:
            return x
        if self.kind == "python":
            return x * (0.5 + random.random()) + 0.01 * random.gauss(0.0, 1.0)
        if self.kind == "numpy":
            return x * float(np.random.rand()) + 0.01 * float(np.random.randn())
        return self.dropout(x)


class Stage(nn.Module):
    def __init__(self, kind: str, numbers: range) -> None:
        super().__init__()
        for at in numbers:
            torch.manual_seed(at)
            self.add_module(f"layer{at}", Noisy(kind))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def local(kind: str, schedule: str = "1f1b", cuts: tuple[int, ...] = (0, 1, 3)) -> paci_rt.LocalPipeline:
    stages: list[nn.Module] = [Stage(kind, range(one, two)) for one, two in pairwise(cuts)]
    return paci_rt.LocalPipeline(
        stages, schedule=schedule, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=lambda p: paci_rt.AdamW(p, lr=1e-2)
    )


def seed() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def train(pipe: Any, windows: range) -> None:
    for window in windows:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(window))
        args = (x,) if pipe.has_first else ()
        pipe.step(*args, target=x.flip(0) if pipe.has_last else None, return_outputs=False)


def sha(pipe: Any) -> str:
    pipe.drain()
    return paci_rt.params_sha256(pipe.named_parameters())


@pytest.mark.parametrize("schedule", ["1f1b", "paci", "zb-h1"])
@pytest.mark.parametrize("kind", ["torch", "python", "numpy"])
def test_a_resumed_run_draws_what_the_other_one_draws(tmp_path: Path, kind: str, schedule: str) -> None:
    seed()
    never = local(kind, schedule)
    train(never, range(3))
    checkpoint.save(tmp_path, never)
    train(never, range(3, 6))
    resumed = local(kind, schedule)
    seed()  # as a script does before it builds anything
    checkpoint.load(tmp_path, resumed)
    train(resumed, range(3, 6))
    assert sha(resumed) == sha(never)
    # And it is the generators that make it so: without them another run comes out.
    other = local(kind, schedule)
    seed()
    before = [torch.get_rng_state().tolist(), random.getstate()]
    checkpoint.load(tmp_path, other, optimizer=False)
    assert [torch.get_rng_state().tolist(), random.getstate()] == before
    checkpoint.load(tmp_path, other)
    seed()
    train(other, range(3, 6))
    assert sha(other) != sha(never)


def test_other_processes_keep_their_own(tmp_path: Path) -> None:
    seed()
    saved = local("torch")
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    for cuts in ((0, 3), (0, 1, 2, 3)):  # one stage and three: not the two that were saved together
        resumed = local("torch", cuts=cuts)
        seed()
        before = torch.get_rng_state()
        checkpoint.load(tmp_path, resumed)
        assert torch.equal(torch.get_rng_state(), before), cuts
        assert sha(resumed) == sha(saved)


RUN = """
import random, sys, time
sys.path[:0] = [sys.argv[1] + "/tests", sys.argv[1]]
import torch
from paci_rt import checkpoint
from test_generators import local, seed, sha, train
folder, first, last = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seed()
pipe = local("torch", "paci")
if first:
    checkpoint.load(folder, pipe)
for window in range(first, 8):
    train(pipe, range(window, window + 1))
    if (window + 1) % 2 == 0:
        checkpoint.save(folder, pipe)
    if window + 1 == last:
        print("there", flush=True)
        time.sleep(600)
print(sha(pipe))
"""


def test_killed_and_resumed_equals_never_killed(tmp_path: Path) -> None:
    def start(folder: str, first: int, last: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(ROOT), str(tmp_path / folder), str(first), str(last)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    never, killed = start("never", 0, 0), start("killed", 0, 5)
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "there\n"
    finally:
        killed.kill()
        killed.communicate(timeout=deadline(20))
    again = start("killed", checkpoint.read_index(tmp_path / "killed")["windows"], 0)
    try:
        (one, _), (two, _) = (process.communicate(timeout=deadline(120)) for process in (never, again))
    finally:
        never.kill()
        again.kill()
    assert len(one) == 65 and one == two


def on_rank(rank: int, group: Any, folder: str) -> None:
    def schedule() -> Any:
        stage = paci_rt.PipelineStage(Stage("torch", range(rank, rank + 1)), rank, 2, group=group)
        return paci_rt.SchedulePACI(stage, 2, nn.MSELoss(), optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2))

    torch.manual_seed(rank)
    never = schedule()
    torch.manual_seed(100 + rank)
    train(never, range(3))
    checkpoint.save(folder, never, group=group)
    train(never, range(3, 6))
    resumed = schedule()
    checkpoint.load(folder, resumed, group=group)
    train(resumed, range(3, 6))
    assert sha(resumed) == sha(never)
    torch.distributed.barrier(group)


def test_each_process_has_its_own(tmp_path: Path, workers: Any) -> None:
    workers.run(on_rank, 2, str(tmp_path))
    alone = local("torch", cuts=(0, 1, 2))
    before = torch.get_rng_state()
    checkpoint.load(tmp_path, alone)  # two processes are one now
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch", torch.zeros(3, dtype=torch.uint8)),
        ("torch", None),
        ("python", [3, [1, 2], None]),
        ("python", "x"),
        ("numpy", [torch.zeros(3), 1, 0, 0.0]),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(key: str, value: Any) -> None:
    state = {**collect_generators([]), key: value}
    before = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    with pytest.raises(ValueError, match="the state of random generators cannot be used"):
        check_generators(state, [])
    assert [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()] == before
