"""The launcher: results, reports, and a clean end whatever happens.

Every run below has a ``timeout_s``: without the supervision that is tested here it would end in TimeoutError.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paci_rt import launch
from paci_rt.errors import ActionError, PeerLostError, StageFailed
from paci_rt.launch.child import describe
from support.deadlines import deadline, wait_until
from support.marks import slow

LIMIT_S = 90.0


def wait_for_peer(ctx: launch.Context) -> None:
    dist.recv(torch.zeros(1), src=(ctx.rank + 1) % ctx.world_size)


def add_ranks(ctx: launch.Context, scale: int) -> tuple[torch.Tensor, int, int]:
    total = torch.full((300_000,), float(ctx.rank * scale))
    dist.all_reduce(total)
    for step in range(3):
        ctx.report({"rank": ctx.rank, "step": step})
    return total, torch.get_num_threads(), os.getpid()


def end_badly(ctx: launch.Context, how: str, path: str = "") -> None:
    ctx.report({"pid": os.getpid()})
    if ctx.rank == 0:
        try:
            wait_for_peer(ctx)
        except RuntimeError as error:
            raise PeerLostError("0RECV_B7", "stage 1 is gone") from error
    if how == "raise":
        raise ValueError("weights are made of cheese")
    if how == "action":
        raise ActionError("1B3", "action 1B3 failed: ZeroDivisionError: no") from ZeroDivisionError("no")
    if how == "exit":
        sys.exit(3)
    if how == "quiet exit":
        os._exit(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "unpicklable":
        raise type("Local", (Exception,), {})("cannot travel")
    if how == "close first":  # the neighbour notices before the cause is told
        dist.destroy_process_group()
        time.sleep(1.0)
        raise ValueError("the cause")
    if how == "hang":
        wait_for_peer(ctx)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), 30, f"of {pids} some are alive")


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_results_reports_threads_and_port():
    reports: list[dict] = []
    port = free_port()
    results = launch.run(
        add_ranks, 2, (5,), threads=2, port=port, on_report=reports.append, timeout_s=deadline(LIMIT_S)
    )
    for total, threads, _ in results:
        assert torch.equal(total, torch.full((300_000,), 5.0))
        assert threads == 2
    for rank in range(2):
        assert [r["step"] for r in reports if r["rank"] == rank] == [0, 1, 2]
    assert not any(is_alive(pid) for _, _, pid in results)
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("how", "cause", "words"),
    [
        slow("raise", "ValueError", "stage 1: ValueError: weights are made of cheese"),
        slow("action", "ZeroDivisionError", "stage 1: action 1B3 failed"),
        slow("exit", "SystemExit", "stage 1: sys.exit(3) was called"),
        slow("quiet exit", "exit code 0", "stage 1 ended with exit code 0 before its work was done"),
        ("kill", "SIGKILL", "stage 1 was killed by SIGKILL"),
        slow("unpicklable", "Local", "cannot travel"),
        slow("close first", "ValueError", "stage 1: ValueError: the cause"),
    ],
)
def test_first_cause(how, cause, words):
    reports: list[dict] = []
    with pytest.raises(StageFailed) as caught:
        launch.run(end_badly, 2, (how,), on_report=reports.append, timeout_s=deadline(LIMIT_S))
    assert (caught.value.rank, caught.value.cause) == (1, cause)
    assert words in str(caught.value)
    if how in ("kill", "quiet exit"):
        assert "stage 0 stopped at 0RECV_B7" in str(caught.value)
    else:
        assert "end_badly" in caught.value.remote_traceback
    assert not any(is_alive(report["pid"]) for report in reports)


@pytest.mark.slow
def test_timeout_and_failing_report():
    pids: list[int] = []
    with pytest.raises(TimeoutError, match="stages still running: 0, 1"):
        launch.run(end_badly, 2, ("hang",), on_report=lambda r: pids.append(r["pid"]), timeout_s=3)

    def refuse(report: dict) -> None:
        pids.append(report["pid"])
        raise KeyError("not today")

    with pytest.raises(KeyError, match="not today"):
        launch.run(end_badly, 2, ("hang",), on_report=refuse, timeout_s=deadline(LIMIT_S))
    assert pids and not any(map(is_alive, pids))


SCRIPT = """
import os, sys, time
from paci_rt import launch

def work(ctx):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, whatever the others write
    if sys.argv[1] == "busy":
        while True:
            pass
    import torch, torch.distributed as dist
    dist.recv(torch.zeros(1), src=1 - ctx.rank)

if __name__ == "__main__":
    print("starting", flush=True)
    try:
        launch.run(work, 2)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
"""


@contextmanager
def started_script(tmp_path: Path, mode: str) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script), mode], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as launcher:
        try:
            yield launcher
        finally:
            launcher.kill()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["waiting", "busy"])
def test_children_die_with_their_launcher(tmp_path, mode):
    with started_script(tmp_path, mode) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "starting\n"
        pids = [int(launcher.stdout.readline()) for _ in range(2)]
        launcher.kill()
        wait_until_gone(pids)


@pytest.mark.parametrize("when", ["while starting", "while working"])
@pytest.mark.slow
def test_ctrl_c_reaches_the_whole_group(tmp_path, when):
    with started_script(tmp_path, "waiting") as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "starting\n"
        pids = []
        if when == "while working":
            pids = [int(launcher.stdout.readline()) for _ in range(2)]
        else:
            time.sleep(0.3)
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        out, err = launcher.communicate(timeout=deadline(60))
    assert (launcher.returncode, out, err) == (130, "interrupted\n", "")
    wait_until_gone(pids)
    # also those that were still starting
    wait_until(lambda: not group_exists(launcher.pid), 30, "processes of the group are left")


def test_bad_arguments():
    with pytest.raises(ValueError, match="world_size is 0"):
        launch.run(add_ranks, 0)
    with pytest.raises(ValueError, match="threads is 0"):
        launch.run(add_ranks, 1, threads=0)
    with pytest.raises(ValueError, match="port is 70000"):
        launch.run(add_ranks, 1, port=70000)
    with pytest.raises(ValueError, match="top level of a module"):
        launch.run(lambda ctx: None, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            launch.run(add_ranks, 1, port=port)


def test_consequences_are_told_from_causes():
    assert describe(0, PeerLostError("0F1", "stage 1 is gone")).secondary
    wrapped = ActionError("0F1", "action 0F1 failed")
    wrapped.__cause__ = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:9")
    assert describe(0, wrapped).secondary
    own = describe(1, ValueError("shapes do not match"))
    assert not own.secondary and own.action == "" and own.message == "stage 1: ValueError: shapes do not match"
    assert describe(0, wrapped).action == "0F1"


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from paci_rt import launch\n"
        "def work(ctx, scale):\n"
        "    ctx.report({'rank': ctx.rank})\n"
        "    return ctx.rank * scale\n"
        "if __name__ == '__main__':\n"
        "    assert launch.under_torchrun()\n"
        "    seen = []\n"
        "    results = launch.run_under_torchrun(work, (7,), on_report=seen.append)\n"
        "    if results is not None:\n"
        "        print('RESULTS', results, seen)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=deadline(LIMIT_S))
    assert done.returncode == 0, done.stderr
    assert "RESULTS [0, 7] [{'rank': 0}]" in done.stdout
    assert not launch.under_torchrun()
