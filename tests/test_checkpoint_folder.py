"""The folder of a checkpoint: one run at a time, no links, the user's permissions, and what a full disk leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt import checkpoint
from paci_rt.runtime import folder_lock
from paci_rt.runtime.checkpoint_index import digest_of
from support.deadlines import deadline
from support.stateful import cut, flat, pipeline, train

ROOT = Path(__file__).resolve().parents[1]


def saved_in(folder: Path, windows: int = 2, **options: Any) -> paci_rt.LocalPipeline:
    pipe = pipeline(sizes=[1, 2])
    train(pipe, range(windows))
    checkpoint.save(folder, pipe, **options)
    return pipe


def loaded(folder: Path) -> Any:
    pipe = pipeline(sizes=[1, 2])
    checkpoint.load(folder, pipe)
    return flat(pipe.state_dict())


# ---------------------------------------------------------------------------------------------------- one run at a time

HOLDER = """
import sys
sys.path[:0] = [sys.argv[2] + "/tests", sys.argv[2]]
from paci_rt import checkpoint
from support.stateful import pipeline
pipe = pipeline(sizes=[1, 2])
with checkpoint.hold(sys.argv[1], pipe):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder ``tmp_path / "a"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a"), str(ROOT)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=deadline(20))


def test_a_folder_in_use_is_refused_and_a_dead_run_holds_nothing(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pipe = tmp_path / "a", pipeline(sizes=[1, 2])
    words = (
        rf"a is in use by process {holder.pid} on host {socket.gethostname()} since .*: wait until that run has ended"
    )
    with pytest.raises(paci_rt.CheckpointError, match=words), checkpoint.hold(folder, pipe):
        pass
    with pytest.raises(paci_rt.CheckpointError, match=words):
        checkpoint.save(folder, pipe)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    holder.kill()
    holder.wait(timeout=deadline(20))
    assert (folder / ".lock").exists()  # left by it, and no matter
    with checkpoint.hold(folder, pipe):
        checkpoint.save(folder, pipe)
        assert (folder / ".lock").exists()
    assert not (folder / ".lock").exists()
    assert checkpoint.verify(folder)["windows"] == 0


def test_train_refuses_a_folder_in_use_in_one_line(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from paci_rt import cli

    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    argv = ["train", "--steps", "3", "--batch-size", "2", "--accumulation", "2", "--seq-len", "16", "--data", str(text)]
    for transport in ("local", "auto"):
        assert cli.main([*argv, "--transport", transport, "--out", str(tmp_path / "a")]) == 2
        _out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert f"is in use by process {holder.pid}" in line
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_a_lock_whose_file_was_removed_by_its_holder_is_taken_anew(tmp_path: Path) -> None:
    first = folder_lock.FolderLock(tmp_path)
    second = folder_lock.FolderLock(tmp_path)  # of the same process: the same
    second.release()
    assert (tmp_path / ".lock").exists()
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []
    third = folder_lock.FolderLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    third.release()


def test_a_fork_neither_has_nor_keeps_the_lock(tmp_path: Path) -> None:
    lock = folder_lock.FolderLock(tmp_path)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready[0], 1)  # the parent has let go
        try:
            folder_lock.FolderLock(tmp_path).release()
            os.write(done[1], b"y")
        except BaseException:
            os.write(done[1], b"n")
        os._exit(0)
    lock.release()
    folder_lock.FolderLock(tmp_path).release()  # although the child lives
    os.write(ready[1], b"x")
    assert os.read(done[0], 1) == b"y"
    os.waitpid(child, 0)
    for end in (*ready, *done):
        os.close(end)


def test_where_the_file_system_has_no_locks_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", no_locks)
    with pytest.warns(RuntimeWarning, match=r"cannot be locked \(No locks available\): make sure that no other run"):
        saved_in(tmp_path)
    assert checkpoint.verify(tmp_path)["windows"] == 2


SAVER = """
import sys, time
sys.path[:0] = [sys.argv[2] + "/tests", sys.argv[2]]
import paci_rt
from paci_rt import checkpoint
from support.stateful import pipeline
pipe, saved, until = pipeline(sizes=[1, 2]), 0, time.monotonic() + 3
while time.monotonic() < until:
    try:
        checkpoint.save(sys.argv[1], pipe, extra={"by": sys.argv[3]}, keep=2)
        saved += 1
    except paci_rt.CheckpointError as error:
        assert "is in use by" in str(error), error
print(saved)
"""


def test_two_runs_that_save_at_once_never_mix(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVER, str(tmp_path / "a"), str(ROOT)]
    savers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "xy"]
    try:
        counts = [int(process.communicate(timeout=deadline(120))[0]) for process in savers]
    finally:
        for process in savers:
            process.kill()
    assert [process.returncode for process in savers] == [0, 0]
    assert min(counts) > 0
    assert checkpoint.verify(tmp_path / "a")["extra"]["by"] in "xy"
    assert len([path for path in (tmp_path / "a").iterdir() if path.suffix == ".pt"]) == 2


# --------------------------------------------------------------------------------------------------------- a full disk


def check_nothing_happened(folder: Path, names: list[str], state: Any) -> None:
    assert sorted(path.name for path in folder.iterdir()) == names
    assert loaded(folder) == state


def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        pipe = saved_in(folder / "a")
        names, state = sorted(path.name for path in (folder / "a").iterdir()), flat(pipe.state_dict())
        train(pipe, range(2, 4))
        with pytest.raises(OSError, match=r"stage 0: .*: No space left on device: make room, or choose another folder"):
            checkpoint.save(folder / "a", pipe)
        check_nothing_happened(folder / "a", names, state)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_file_that_may_not_be_so_large(tmp_path: Path) -> None:
    pipe = saved_in(tmp_path)
    names, state = sorted(path.name for path in tmp_path.iterdir()), flat(pipe.state_dict())
    train(pipe, range(2, 4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"stage 0: .*: File too large: make room.*what was saved before is intact"):
            checkpoint.save(tmp_path, pipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_nothing_happened(tmp_path, names, state)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_fails_late_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    pipe = saved_in(tmp_path)
    names, state = sorted(path.name for path in tmp_path.iterdir()), flat(pipe.state_dict())
    train(pipe, range(2, 4))
    real, calls = getattr(os, call), []

    def fails(*args: Any) -> Any:
        calls.append(args)
        # fsync is called for a file and then for its folder
        if len(calls) == (2 * at - 1 if call == "fsync" else at):
            raise OSError(122, "Disk quota exceeded")
        return real(*args)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="Disk quota exceeded: make room, or choose another folder; what was saved"):
        checkpoint.save(tmp_path, pipe)
    monkeypatch.undo()
    check_nothing_happened(tmp_path, names, state)


# ------------------------------------------------------------------------------------------------------- several hosts


def on_rank(rank: int, group: Any, schedule_of: Any, folder: str) -> None:
    stage = paci_rt.PipelineStage(cut("batch-norm", [1, 1, 1])[rank], rank, 3, group=group)
    pipe = paci_rt.Schedule1F1B(stage, 2, torch.nn.MSELoss(), optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2))
    train(pipe, range(1))
    schedule_of(rank, pipe, group, folder)


def own_disks(rank: int, pipe: Any, group: Any, folder: str) -> None:
    """Each rank has a folder of its own under one name."""
    from paci_rt.runtime import checkpoint_files

    folder_lock.SEEN_S = checkpoint_files.LATE_S = 0.3  # type: ignore[misc,attr-defined]
    place = f"{folder}/{rank}/a"
    words = r"rank 0 on host \S+ does not see what rank 1 on host \S+ writes to .*: give a folder on a file system that"
    with pytest.raises(paci_rt.CheckpointError, match=words), checkpoint.hold(place, pipe, group=group):
        raise AssertionError("held")
    assert not Path(place).exists()
    with pytest.raises(OSError, match=r"was written by another process and cannot be seen here: choose a folder on a"):
        checkpoint.save(place, pipe, group=group)  # without hold
    assert not Path(place).exists()
    # Copies of different checkpoints are noticed too.
    local = pipeline(sizes=[1, 1, 1])
    train(local, range(1 + rank))
    checkpoint.save(place, local)
    with pytest.raises(paci_rt.CheckpointError, match="the processes see different checkpoints"):
        checkpoint.load(place, pipe, group=group)


def shared_disk(rank: int, pipe: Any, group: Any, folder: str) -> None:
    with checkpoint.hold(folder, pipe, group=group):
        checkpoint.save(folder, pipe, group=group)
        before = sorted(path.name for path in Path(folder).glob("[!.]*"))
        torch.distributed.barrier(group)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
        try:
            with pytest.raises(OSError, match=r"stage 1: .*File too large"):
                checkpoint.save(folder, pipe, group=group)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        torch.distributed.barrier(group)
        assert sorted(path.name for path in Path(folder).glob("[!.]*")) == before
    if rank == 1:
        path = Path(folder) / checkpoint.read_index(folder)["files"][1]["file"]
        raw = bytearray(path.read_bytes())
        raw[-30] ^= 1
        path.write_bytes(raw)
    torch.distributed.barrier(group)
    state, random_state = flat(pipe.state_dict()), torch.get_rng_state()
    with pytest.raises(paci_rt.CheckpointError, match=r"stage-1-of-3.*is damaged: its bytes do not have the hash"):
        checkpoint.load(folder, pipe, group=group)
    assert flat(pipe.state_dict()) == state
    assert torch.equal(torch.get_rng_state(), random_state)


def test_folders_that_rank_0_cannot_see_are_refused_at_the_start(tmp_path: Path, workers: Any) -> None:
    workers.run(on_rank, 3, own_disks, str(tmp_path))


def test_a_disk_that_is_full_for_one_and_damage_that_one_sees_end_all(tmp_path: Path, workers: Any) -> None:
    workers.run(on_rank, 3, shared_disk, str(tmp_path / "a"))


# ------------------------------------------------------------------------------------------------ links and permissions


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.txt", tmp_path / "a"
    mine.write_text("mine")
    folder.mkdir()
    for name in ("index.json", ".index.json.part", "index-00000002.json", "step-00000009-stage-0-of-2-x.pt"):
        (folder / name).symlink_to(mine)
    saved_in(folder, keep=2)
    assert mine.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
    checkpoint.verify(folder)
    (folder / ".lock").symlink_to(mine)
    with pytest.raises(OSError, match=r"cannot write the checkpoint: stage 0: .*symbolic links"):
        saved_in(folder)
    assert mine.read_text() == "mine"
    (tmp_path / "link").symlink_to(folder)  # a link to the folder is the user's own
    (folder / ".lock").unlink()
    saved_in(tmp_path / "link")
    assert checkpoint.verify(tmp_path / "link")["windows"] == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644)])
def test_files_have_the_permissions_that_the_user_chose(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        saved_in(tmp_path / "a", keep=2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {mode}


def test_events_in_the_shared_folder_are_private_and_cannot_be_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    from paci_rt.transport.diagnosis import dump_events

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        path = Path(dump_events("shm", 3, ValueError("x"), []).rpartition("channels: ")[2])
        assert path.parent == tmp_path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text())["rank"] == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 2
    assert all(name.startswith(f"paci_rt_events_rank3_{os.getpid()}-") and len(name) > 45 for name in names)


def test_a_save_cut_off_at_any_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """Killed, again and again, while it saves as fast as it can."""
    command = [sys.executable, "-c", SAVER, str(tmp_path / "a"), str(ROOT), "z"]
    for wait_s in (0.0, 0.03, 0.11):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + deadline(60)
            before = None
            while time.monotonic() < until and before in (None, stamp(tmp_path / "a")):
                before = before or stamp(tmp_path / "a")
                time.sleep(0.01)
            time.sleep(wait_s)
        finally:
            process.kill()
            process.wait(timeout=deadline(20))
        assert checkpoint.verify(tmp_path / "a")["extra"] == {"by": "z"}
    saved_in(tmp_path / "a")
    assert len(list((tmp_path / "a").iterdir())) == 3


def stamp(folder: Path) -> Any:
    try:
        return (folder / "index.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_train_refuses_a_damaged_checkpoint_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paci_rt import cli

    text, folder = tmp_path / "text.txt", tmp_path / "a"
    text.write_text("To be, or not to be, that is the question. " * 200)
    argv = ["train", "--batch-size", "2", "--accumulation", "2", "--seq-len", "16", "--data", str(text)]
    argv += ["--eval-batches", "1", "--eval-interval", "0"]
    assert cli.main([*argv, "--steps", "3", "--transport", "local", "--out", str(folder), "--save-interval", "1"]) == 0
    names = ["index-00000002.json", "index-00000003.json", "index.json"]
    assert sorted(path.name for path in folder.glob("index*.json")) == names
    part = folder / checkpoint.read_index(folder)["files"][1]["file"]
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 3] ^= 32
    part.write_bytes(raw)

    def visible() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}

    before = visible()
    capsys.readouterr()
    for transport in ("local", "auto"):
        command = [*argv, "--steps", "5", "--transport", transport, "--resume", str(folder), "--out", str(folder)]
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{part} is damaged: its bytes do not have the hash that the index says" in line
        assert f"the checkpoint after 2 updates in {folder / 'index-00000002.json'} is whole" in line
        assert visible() == before
    older = str(folder / "index-00000002.json")
    assert cli.main([*argv, "--steps", "5", "--transport", "local", "--resume", older, "--out", str(folder)]) == 0
    assert checkpoint.verify(folder)["windows"] == 5
    index = json.loads((folder / "index.json").read_text())
    for saved in (None, [], {}, {"model": 3}, {"model": "gpt-tiny"}):
        index["extra"] = {"config": saved}
        index["sha256"] = digest_of(index)
        (folder / "index.json").write_text(json.dumps(index))
        assert cli.main([*argv, "--steps", "9", "--resume", str(folder)]) == 2
        assert "this checkpoint was not written by paci-rt train" in capsys.readouterr().err


def gathered_on_rank(rank: int, pipe: Any, group: Any, folder: str) -> None:
    from paci_rt.runtime import checkpoint_collect

    checkpoint_collect.CHUNK_BYTES = 1000
    place = Path(f"{folder}/{rank}/a")
    with checkpoint.hold(place, pipe, group=group, gathered=True):
        checkpoint.save(place, pipe, group=group, gathered=True, keep=2)
        train(pipe, range(1, 2))
        checkpoint.save(place, pipe, group=group, gathered=True, keep=2)
        torch.distributed.barrier(group)
        assert place.exists() == (rank == 0)
        if rank == 0:
            assert checkpoint.verify(place)["windows"] == 2
            assert checkpoint.verify(place / "index-00000001.json")["windows"] == 1
            before = sorted(path.name for path in place.iterdir())
            size = max(path.stat().st_size for path in place.glob("*-of-3-*.pt")) - 100
            # The disk is full once its own part is written.
            write = checkpoint_collect.replacing

            def full(path: Path) -> Any:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, -1))
                return write(path)

            checkpoint_collect.replacing = full
        try:
            with pytest.raises(OSError, match=r"stage file of rank 1: .*File too large: make room.* is intact"):
                checkpoint.save(place, pipe, group=group, gathered=True, keep=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        torch.distributed.barrier(group)
        assert place.exists() == (rank == 0)
        if rank == 0:
            checkpoint_collect.replacing = write
            assert sorted(path.name for path in place.iterdir()) == before
    torch.distributed.barrier(group)
    if rank:  # the copy that a user makes
        shutil.copytree(f"{folder}/0/a", place)
    torch.distributed.barrier(group)
    state = flat(pipe.state_dict())
    train(pipe, range(2, 3))
    checkpoint.load(place, pipe, group=group)
    assert flat(pipe.state_dict()) == state


def test_without_a_common_file_system_the_first_process_writes_all(tmp_path: Path, workers: Any) -> None:
    workers.run(on_rank, 3, gathered_on_rank, str(tmp_path))
    alone = pipeline(sizes=[3])
    train(alone, range(2))
    other = pipeline(sizes=[3])
    checkpoint.load(tmp_path / "0" / "a", other)
    assert sorted(other.state_dict()["params"]) == sorted(alone.state_dict()["params"])
