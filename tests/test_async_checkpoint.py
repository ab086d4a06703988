"""Checkpoints that a thread writes while training goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paci_rt
from paci_rt import checkpoint
from paci_rt.errors import CheckpointError, CheckpointWriteError
from paci_rt.runtime import checkpoint_files
from support.deadlines import deadline, wait_until
from test_checkpoint import pipeline, sha, train


class Gate:
    """Holds writers in front of their first byte until it is opened, or lets them fail there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self.came, self.error = threading.Event(), threading.Event(), None
        write = checkpoint_files.write_part

        def held(*args: Any, **options: Any) -> Any:
            self.came.set()
            assert self._open.wait(deadline(60))
            if self.error is not None:
                raise self.error
            return write(*args, **options)

        monkeypatch.setattr(checkpoint_files, "write_part", held)

    def open(self, error: Exception | None = None) -> None:
        self.error = error
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.open()


@pytest.fixture(autouse=True)
def no_writer_left() -> Iterator[None]:
    yield
    wait_until(lambda: not [one for one in threading.enumerate() if one.name == "paci-rt checkpoint"], 20, "writers")


def contents(folder: Path) -> list[tuple[str, str]]:
    """Hashes of the files of a checkpoint, with their stages."""
    index = checkpoint.verify(folder)
    assert not list(folder.glob(".*")), "something is left"
    return [
        (file["file"].rsplit("-", 1)[0], hashlib.sha256((folder / file["file"]).read_bytes()).hexdigest())
        for file in index["files"]
    ]


@pytest.mark.parametrize("kind", ["adamw", "muon", "torch-adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["1f1b", "paci", "zb-h1"])
def test_the_bits_are_those_of_a_blocking_save(tmp_path: Path, gate: Gate, kind: str, schedule: str) -> None:
    gate.open()
    one, other = pipeline([1, 3], kind, schedule), pipeline([1, 3], kind, schedule)
    for pipe in (one, other):
        train(pipe, range(3))
    torch.manual_seed(5)
    checkpoint.save(tmp_path / "now", one, extra={"step": 3})
    torch.manual_seed(5)
    saving = checkpoint.save(tmp_path / "beside", other, extra={"step": 3}, blocking=False)
    assert saving is not None
    torch.rand(100)  # the generators are those of the moment
    train(other, range(3, 6))
    train(one, range(3, 6))
    saving.wait()
    assert saving.windows == 3
    assert contents(tmp_path / "now") == contents(tmp_path / "beside")
    assert sha(one) == sha(other)  # and it changes nothing of what is trained


def test_what_is_written_is_the_moment_of_the_call(tmp_path: Path, gate: Gate) -> None:
    """All that training changes while the writer has not begun: weights, state, buffers, extra state, rates."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), [0]
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.calls[0] += 1
            self.seen += 1
            return self.linear(x)

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}  # live

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    def make() -> paci_rt.LocalPipeline:
        torch.manual_seed(0)
        return paci_rt.LocalPipeline(
            [Counts(), nn.Linear(4, 2)],
            n_microbatches=2,
            loss_fn=nn.MSELoss(),
            optimizer=lambda params: torch.optim.AdamW([param for _, param in params]),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        )

    pipe, extra = make(), {"list": [1]}
    x, y = torch.randn(4, 4), torch.randn(4, 2)
    pipe.step(x, target=y)
    wanted = pipe.state_dict()
    saving = checkpoint.save(tmp_path, pipe, extra=extra, blocking=False)
    extra["list"].append(2)
    for _ in range(3):
        pipe.step(x, target=y)
    gate.open()
    assert saving is not None
    saving.wait()
    loaded = make()
    assert checkpoint.load(tmp_path, loaded) == {"list": [1]}
    found = loaded.state_dict()
    for kind in ("params", "buffers"):
        assert all(torch.equal(found[kind][name], value) for name, value in wanted[kind].items()), kind
    assert found["extra_state"] == {"_extra_state": {"calls": [2]}}
    assert [record["lr_scheduler"]["state"]["last_epoch"] for record in found["optimizers"]] == [1, 1]
    assert all(
        torch.equal(found["optimizer"][name][key], value)
        for name, state in wanted["optimizer"].items()
        for key, value in state.items()
    )


def test_the_one_before_stays_until_the_new_one_is_whole(tmp_path: Path, gate: Gate) -> None:
    gate.open()
    pipe = pipeline([2, 2])
    checkpoint.save(tmp_path, pipe)
    gate._open.clear()
    train(pipe, range(2))
    saving = checkpoint.save(tmp_path, pipe, blocking=False)
    assert saving is not None
    assert gate.came.wait(deadline(20))
    train(pipe, range(2, 4))
    assert checkpoint.verify(tmp_path)["windows"] == 0
    assert not saving.done()
    with pytest.raises(TimeoutError, match=r"after 2 updates was not whole within 0\.01 s"):
        saving.wait(0.01)
    gate.open()
    saving.wait()
    assert checkpoint.verify(tmp_path)["windows"] == 2


def test_a_second_save_waits_for_the_first_and_that_is_counted(tmp_path: Path, gate: Gate) -> None:
    pipe = pipeline([2, 2])
    first = checkpoint.save(tmp_path, pipe, blocking=False, keep=3)
    train(pipe, range(1))
    threading.Timer(0.3, gate.open).start()
    second = checkpoint.save(tmp_path, pipe, blocking=False, keep=3)
    assert first is not None
    assert second is not None
    assert first.done()
    assert first.waited_s == 0
    assert 0.05 < second.waited_s < 30
    train(pipe, range(1, 2))
    checkpoint.save(tmp_path, pipe, keep=3)  # a blocking one waits too
    assert second.done()
    assert pipe.stats()["saving_wait_s"] >= second.waited_s
    names = sorted(path.name for path in tmp_path.glob("index-*.json"))
    assert names == [f"index-{at:08d}.json" for at in range(3)]


def test_the_memory_of_the_snapshot_is_counted_while_it_is_held(tmp_path: Path, gate: Gate) -> None:
    pipe = pipeline([2, 2])
    train(pipe, range(1))
    before = pipe.stats()
    assert [parts["snapshot"] for parts in before["memory"].values()] == [0, 0]
    saving = checkpoint.save(tmp_path, pipe, blocking=False)
    assert saving is not None
    now = pipe.stats()
    state = pipe.state_dict()
    for at, parts in now["memory"].items():
        names = pipe.state_names()["params"][at]
        tensors = [state["params"][name] for name in names]
        tensors += [one for name in names for one in state["optimizer"][name].values() if isinstance(one, torch.Tensor)]
        least = sum(one.nbytes for one in tensors)
        assert least <= parts["snapshot"] <= least + 20_000  # the generators' state
        assert parts["snapshot"] == saving.snapshot_bytes[at]
        assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    assert now["peak_bytes"] == before["peak_bytes"] + max(saving.snapshot_bytes.values())  # of a rank
    gate.open()
    saving.wait()
    assert pipe.stats()["memory"][0]["snapshot"] > 0  # a peak
    pipe.reset_stats()
    assert [parts["snapshot"] for parts in pipe.stats()["memory"].values()] == [0, 0]


@pytest.mark.parametrize("where", ["step", "save", "close", "hold", "wait"])
def test_an_error_of_the_writer_comes_once(tmp_path: Path, gate: Gate, where: str) -> None:
    gate.open()
    pipe = pipeline([2, 2])
    checkpoint.save(tmp_path, pipe)
    gate._open.clear()
    train(pipe, range(1))
    text = (
        r"cannot write the checkpoint: stage 0: .*No space left on device: make room.*; what was saved before is intact"
    )
    fails = pytest.raises(CheckpointWriteError, match=text)
    full = OSError(28, os.strerror(28))
    if where == "hold":
        with fails, checkpoint.hold(tmp_path, pipe):
            checkpoint.save(tmp_path, pipe, blocking=False)
            gate.open(full)
    else:
        saving = checkpoint.save(tmp_path, pipe, blocking=False)
        assert saving is not None
        gate.open(full)
        wait_until(saving.done, 20, "the writer ends")
        with fails:
            {
                "step": lambda: train(pipe, range(1, 2)),
                "save": lambda: checkpoint.save(tmp_path, pipe),
                "close": pipe.close,
                "wait": saving.wait,
            }[where]()
    assert checkpoint.verify(tmp_path)["windows"] == 0
    assert contents(tmp_path)
    if where != "close":
        gate.open()
        train(pipe, range(1, 3))  # it was told, and training may go on
        checkpoint.save(tmp_path, pipe)
        assert checkpoint.verify(tmp_path)["windows"] == 3
    pipe.close()


def test_a_folder_that_goes_away_meanwhile(tmp_path: Path, gate: Gate) -> None:
    pipe, folder = pipeline([2, 2]), tmp_path / "run"
    saving = checkpoint.save(folder, pipe, blocking=False)
    assert saving is not None
    assert gate.came.wait(deadline(20))
    shutil.rmtree(folder)
    gate.open()
    with pytest.raises(CheckpointError, match="No such file or directory; what was saved before is intact"):
        saving.wait()
    assert not folder.exists()
    checkpoint.save(folder, pipe)
    checkpoint.verify(folder)


def test_another_run_cannot_have_the_folder_meanwhile(tmp_path: Path, gate: Gate) -> None:
    import subprocess
    import sys

    pipe = pipeline([2, 2])
    saving = checkpoint.save(tmp_path, pipe, blocking=False)
    code = (
        "import sys, pathlib; from paci_rt.runtime.folder_lock import FolderLock; FolderLock(pathlib.Path(sys.argv[1]))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.run(argv, capture_output=True, text=True, timeout=deadline(60))
    assert "is in use by process" in other.stderr
    gate.open()
    assert saving is not None
    saving.wait()
    assert not (tmp_path / ".lock").exists()


def test_a_failure_of_training_does_not_lose_what_is_being_written(tmp_path: Path, gate: Gate) -> None:
    pipe = pipeline([2, 2])
    train(pipe, range(1))

    def run() -> None:
        with checkpoint.hold(tmp_path, pipe):
            checkpoint.save(tmp_path, pipe, blocking=False)
            threading.Timer(0.2, gate.open).start()
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run()
    assert checkpoint.verify(tmp_path)["windows"] == 1


@pytest.mark.parametrize("value", [1, 0, None, "no"])
def test_blocking_is_true_or_false(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=f"blocking is {value!r}: give True or False"):
        checkpoint.save(tmp_path / "new", pipeline([2]), blocking=value)
    assert not (tmp_path / "new").exists()


def test_gathered_ones_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give blocking=True"):
        checkpoint.save(tmp_path / "new", pipeline([2]), blocking=False, gathered=True)


def test_what_is_wrong_at_the_call_is_said_at_the_call(tmp_path: Path) -> None:
    pipe = pipeline([2, 2])
    with torch.no_grad():
        next(iter(pipe.stages[1].parameters())).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="is not finite"):
        checkpoint.save(tmp_path / "new", pipe, blocking=False)
    with pytest.raises(OSError, match="Not a directory"):
        checkpoint.save("/dev/null/folder", pipeline([2]), blocking=False)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path / "new", pipeline([2]), extra={"x": object()}, blocking=False)
    assert list(tmp_path.iterdir()) == []


def on_rank(rank: int, group: Any, folder: str, schedule: str, fails: int | None) -> Any:
    """Saves of three processes; the writer of rank ``fails`` finds the disk full."""
    from test_checkpoint import cut, halving, loss_fn, make_optimizer

    stage = paci_rt.PipelineStage(cut([1, 2, 1])[rank], rank, 3, group=group)
    optimizer = make_optimizer("adamw", stage.parameters())
    pipe = paci_rt.get_schedule_class(schedule)(stage, 2, loss_fn, optimizer=optimizer, lr_scheduler=halving(optimizer))
    train(pipe, range(2))
    checkpoint.save(folder, pipe, group=group)
    train(pipe, range(2, 4))
    write = checkpoint_files.write_part

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.05 * rank)
        if rank == fails:
            raise OSError(28, os.strerror(28))
        return write(*args, **options)

    checkpoint_files.write_part = slowly
    try:
        saving = checkpoint.save(folder, pipe, group=group, blocking=False)
        assert saving is not None
        if fails is None:
            train(pipe, range(4, 6))
            saving.wait(60)
        else:
            with pytest.raises(CheckpointError, match=f"stage {fails}: .*No space left on device"):
                saving.wait(60)
            train(pipe, range(4, 6))
    finally:
        checkpoint_files.write_part = write
    last = sha(pipe)
    checkpoint.load(folder, pipe, group=group)
    train(pipe, range(4 if fails is None else 2, 6))
    again = sha(pipe)
    pipe.close()
    return last, again


@pytest.mark.parametrize("schedule", ["1f1b", "paci"])
def test_processes_write_beside_training(tmp_path: Path, workers: Any, schedule: str) -> None:
    for last, again in workers.run(on_rank, 3, str(tmp_path), schedule, None):
        assert last == again
    assert checkpoint.verify(tmp_path)["windows"] == 4


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_full_disk_of_one_process_is_an_error_on_all(tmp_path: Path, workers: Any, fails: int) -> None:
    workers.run(on_rank, 3, str(tmp_path), "1f1b", fails)
    assert checkpoint.verify(tmp_path)["windows"] == 2
    assert len(list(tmp_path.glob("*.pt"))) == 3
    assert json.loads((tmp_path / "index.json").read_text())["windows"] == 2
