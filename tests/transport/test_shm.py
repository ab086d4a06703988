"""Channels in memory that the processes of a host share: lifetimes, deadlines, lost neighbours, limits."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt import native
from paci_rt.errors import PeerLostError, ScheduleError, StageError, TransferTimeoutError, TransportError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import Message, make_transport
from paci_rt.transport.shm import ShmTransport, why_unusable
from support.deadlines import deadline
from support.marks import slow
from support.pool import WorkerPool
from support.processes import processes
from support.sanitizers import build
from support.toy import Run, loss_fn, make_optimizer, module, train_local, train_rank

DOWN, UP = Channel("F", 0, 1), Channel("B", 1, 0)
LARGE = 300_000  # fp32 elements, beyond what is copied by whoever sends


def of(*tensors: torch.Tensor) -> Message:
    return Message(tuple(tensors), (True,) * len(tensors))


def pair(group: Any, rank: int, **options: Any) -> ShmTransport:
    transport = ShmTransport(group, num_stages=2, **options)
    transport.open([UP if rank == 0 else DOWN])
    return transport


def test_this_machine_can_do_it() -> None:
    assert why_unusable() == ""


# --- lifetimes ---


def keeps_everything(rank: int, group: Any) -> Any:
    """The receiver keeps more than may be held; the sender never waits for it."""
    transport = pair(group, rank, slots=2, held=3)
    if rank == 0:
        for at in range(20):
            transport.send(DOWN, at, of(torch.full((LARGE,), float(at))))
        transport.recv(UP, 0)
        return transport.allocated_bytes
    kept = [transport.recv(DOWN, at).tensors[0] for at in range(20)]
    held = transport.held_messages
    assert all(tensor is not None and float(tensor[0]) == float(tensor[-1]) == at for at, tensor in enumerate(kept))
    kept[5].add_(1)  # type: ignore[union-attr]  # what was received may be written to
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept if tensor is not None)
    del kept
    transport.send(UP, 0, of(torch.zeros(1)))
    return held, transport.held_messages


def test_a_receiver_that_keeps_everything_starves_nobody(workers: WorkerPool) -> None:
    allocated, (held, afterwards) = workers.run(keeps_everything, 2)
    assert (held, afterwards) == (3, 0)
    assert allocated <= (2 + 3 + 1) * 4 * LARGE + (4 << 20)  # as many buffers as credits and held messages


def changes_after(rank: int, group: Any) -> Any:
    """A large tensor is kept by the transport until it has been copied, and not longer."""
    transport = pair(group, rank)
    if rank == 0:
        transport.send(DOWN, 0, of(torch.arange(LARGE, dtype=torch.float32)))
        torch.zeros(LARGE)  # would take the tensor's memory, were it free
        transport.flush()
        return [len(outgoing.held) for outgoing in transport._outgoing.values()]
    time.sleep(0.05)
    tensor = transport.recv(DOWN, 0).tensors[0]
    return bool(torch.equal(tensor, torch.arange(LARGE, dtype=torch.float32)))  # type: ignore[arg-type]


def test_tensors_stay_until_they_have_been_copied(workers: WorkerPool) -> None:
    assert workers.run(changes_after, 2) == [[0], True]


def early_leaver(rank: int, group: Any) -> float | None:
    """The sender is through, and has gone, before the receiver looks for its message."""
    transport = ShmTransport(group, num_stages=2)
    if rank == 0:
        transport.open([UP])
        transport.send(DOWN, 0, of(torch.full((4,), 7.0)))
        transport.close()
        return None
    time.sleep(0.3)
    transport.open([DOWN])
    tensor = transport.recv(DOWN, 0).tensors[0]
    assert tensor is not None
    return float(tensor[3])


def test_a_message_outlives_its_sender(workers: WorkerPool) -> None:
    assert workers.run(early_leaver, 2) == [None, 7.0]


def small_behind_large(rank: int, group: Any) -> list[int]:
    transport = pair(group, rank)
    if rank == 0:
        for at in range(30):
            transport.send(DOWN, at, of(torch.full((LARGE if at % 3 == 0 else 4,), at)))
        transport.flush()
        return []
    tensors = [transport.recv(DOWN, at).tensors[0] for at in range(30)]
    return [int(tensor[-1]) for tensor in tensors if tensor is not None]


def test_small_messages_do_not_overtake_large_ones(workers: WorkerPool) -> None:
    assert workers.run(small_behind_large, 2)[1] == list(range(30))


# --- mistakes ---


def mistakes(rank: int, group: Any) -> list[str]:
    transport = pair(group, rank, timeout_s=deadline(20.0))
    if rank == 0:
        transport.send(DOWN, 7, of(torch.zeros(1)))
        transport.recv(UP, 0)
        said = []
        for make in (lambda: pair(group, rank, slots=0), lambda: pair(group, rank, held=-1)):
            with pytest.raises(ValueError, match=r"is 0|is -1") as refused:
                make()
            said.append(str(refused.value))
        with pytest.raises(StageError, match="meta"):
            transport.send(DOWN, 8, of(torch.zeros(1, device="meta")))
        return said
    with pytest.raises(ScheduleError, match=r"message 7 \(sequence 0\) arrived where message 8 \(sequence 0\) was due"):
        transport.recv(DOWN, 8)
    transport.send(UP, 0, of(torch.zeros(1)))
    return []


def test_mistakes_are_named(workers: WorkerPool) -> None:
    assert workers.run(mistakes, 2)[0] == [
        "slots is 0: a channel holds at least 1 message",
        "held is -1: the receiver keeps 0 messages or more",
    ]


def disagree(rank: int, group: Any) -> str:
    with pytest.raises(TransportError, match="ask for different transports") as refused:
        make_transport(("shm", "gloo")[rank], group=group, num_stages=2)
    return str(refused.value)


def test_processes_must_ask_for_the_same_transport(workers: WorkerPool) -> None:
    assert set(workers.run(disagree, 2)) == {
        "the processes ask for different transports (rank 0 'shm', rank 1 'gloo'): give all the same"
    }


def out_of_memory(inbox: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    try:
        segment = native.make_shm_segment()
        peer = native.attach_shm_segment(segment.pid, segment.fd, segment.token)
        end = native.make_shm_outgoing(DOWN, segment, peer, slots=1, held=0, timeout_s=1.0)
        large = torch.empty(1 << 26)
        end.send(0, paci_rt.transport.wire.pack_metas(paci_rt.transport.wire.describe(of(large))), [large])
        inbox.send("no error")
    except Exception as error:
        inbox.send(f"{type(error).__name__}: {error}")


def test_a_message_beyond_the_limit_is_an_error_with_its_name() -> None:
    context = processes()
    here, there = context.Pipe()
    process = context.Process(target=out_of_memory, args=(there,))
    process.start()
    assert here.poll(deadline(60))
    said = here.recv()
    process.join(deadline(20))
    assert said.startswith("TransportError: ") and "bytes on edge F 0->1" in said, said


# --- deadlines and lost neighbours ---


def late(rank: int, group: Any, folder: str) -> str:
    transport = pair(group, rank, timeout_s=0.5 if rank == 1 else deadline(30.0), events_dir=folder)
    if rank == 0:
        transport.send(DOWN, 4, of(torch.zeros(10)))
        start = time.monotonic()
        with pytest.raises(PeerLostError) as lost:
            transport.recv(UP, 4)
        assert time.monotonic() - start < deadline(10)
        return str(lost.value)
    transport.recv(DOWN, 4)
    with pytest.raises(TransferTimeoutError) as timed_out:
        transport.recv(DOWN, 5)
    transport.fail(timed_out.value)
    return str(timed_out.value)


def test_a_deadline_names_everything_and_ends_the_neighbour_too(workers: WorkerPool, tmp_path: Path) -> None:
    lost, timed_out = workers.run(late, 2, str(tmp_path))
    for words in (
        "action 1RECV_F5 timed out after 0.5",
        "edge F 0->1 (activations from stage 0 to stage 1)",
        "micro-batch 5",
        "slot 1",
        "last completed sequence number: sender 0, receiver 0",
        "raise transfer_timeout_s",
    ):
        assert words in timed_out, timed_out
    assert lost.startswith("action 0RECV_B4 lost the connection to stage 1") and "1RECV_F5 timed out" in lost
    written = [json.loads(file.read_text()) for file in sorted(tmp_path.iterdir())]
    assert {one["rank"] for one in written} == {0, 1}
    (receiver,) = [one for one in written if one["rank"] == 1]
    (channel,) = [one for one in receiver["channels"] if one["edge"] == "F 0->1"]
    assert [event["event"] for event in channel["events"]][-3:] == ["take", "wait", "timeout"]
    assert channel["taken"] == 0 and channel["side"] == "receiver"


def full(rank: int, group: Any) -> str:
    transport = pair(group, rank, timeout_s=0.5, slots=2, held=0)
    if rank == 1:
        transport.recv(DOWN, 0)
        time.sleep(deadline(1.5))
        return ""
    for at in range(2):
        transport.send(DOWN, at, of(torch.zeros(100)))
    time.sleep(deadline(0.2))  # one of them has been taken
    transport.send(DOWN, 2, of(torch.zeros(100)))
    with pytest.raises(TransferTimeoutError, match="still holds message 1") as timed_out:
        transport.send(DOWN, 3, of(torch.zeros(100)))
    transport.fail(timed_out.value)
    return str(timed_out.value)


def test_a_sender_without_credits_says_which_slot_is_full(workers: WorkerPool) -> None:
    said = workers.run(full, 2)[0]
    assert "action 0SEND_F3 timed out" in said and "edge F 0->1" in said


def chain(rank: int, size: int, store: str, victim: int, outbox: Any) -> None:
    """A pipeline whose stage ``victim`` is killed in the middle."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    run = Run(schedule="paci", stages=size, accumulation=2)
    stage = paci_rt.PipelineStage(module(rank, run), rank, size, "cpu")
    optimizer = make_optimizer("adamw", stage.parameters())
    schedule = paci_rt.SchedulePACI(
        stage, 2, loss_fn, optimizer=optimizer, transport="shm", transfer_timeout_s=deadline(60.0)
    )
    start = time.monotonic()
    try:
        for step in range(200):
            if rank == victim and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            args = (torch.randn(4, 16),) if rank == 0 else ()
            schedule.step(*args, target=torch.zeros(4, dtype=torch.int64) if rank == size - 1 else None)
        outbox.send("finished")
    except Exception as error:
        start_of = time.monotonic() - start
        outbox.send((type(error).__name__, str(error), start_of))


def shared_memory() -> set[str]:
    names = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    return {name for name in names if "paci" in name}


@pytest.mark.parametrize("victim", [1, slow(2)])
def test_a_killed_stage_ends_all_others_soon_and_leaves_nothing(tmp_path: Path, victim: int) -> None:
    before = shared_memory()
    context = processes()
    pipes = [context.Pipe() for _ in range(3)]
    stages = [
        context.Process(target=chain, args=(rank, 3, str(tmp_path / "store"), victim, pipes[rank][1]))
        for rank in range(3)
    ]
    for process in stages:
        process.start()
    for rank, (here, _) in enumerate(pipes):
        if rank == victim:
            continue
        assert here.poll(deadline(100)), f"rank {rank} hangs"
        name, said, seconds = here.recv()
        assert name == "PeerLostError" and f"stage {victim}" in said, said
        assert seconds < deadline(40)  # far from the deadline of 60
    for process in stages:
        process.join(deadline(30))
        process.kill()
    assert stages[victim].exitcode == -signal.SIGKILL
    assert shared_memory() == before


# --- pipelines ---


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize(
    "run",
    [
        Run(schedule="paci", stages=4, accumulation=4, lookahead=True, wide=True),
        slow(Run(schedule="paci-split", stages=3, accumulation=3, slack=2)),
        slow(Run(schedule="1f1b", stages=3, accumulation=4, eval_every=2)),
        slow(Run(schedule="interleaved-1f1b", stages=6, accumulation=6, chunks=2, wide=True)),
        slow(Run(schedule="interleaved-zb", stages=6, accumulation=6, chunks=2, wide=True)),
        slow(Run(schedule="looped-bfs", stages=6, accumulation=6, chunks=2, wide=True)),
        slow(Run(schedule="zb-2p", stages=4, accumulation=8)),
    ],
    ids=lambda run: run.schedule,
)
def test_pipelines_over_every_transport_equal_local(workers: WorkerPool, run: Run, transport: str) -> None:
    ranks = workers.run(train_rank, run.stages // run.chunks, replace(run, transport=transport))
    local = train_local(run)
    params = {name: value for done in ranks for name, value in done["params"].items()}
    assert params.keys() == local["params"].keys()
    assert all(torch.equal(params[name], local["params"][name]) for name in params)
    assert ranks[-1]["losses"] == local["losses"]
    assert {done["stats"]["transport"] for done in ranks} == {transport}


# --- under the sanitizers ---


def stress(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}  # one report is enough
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=deadline(300), env=options)


@pytest.mark.parametrize(("sanitizer", "variable"), [("thread", "P2P_TSAN_PROGRAM"), ("address", "P2P_ASAN_PROGRAM")])
@pytest.mark.slow
def test_stress_is_clean(tmp_path: Path, sanitizer: str, variable: str) -> None:
    program = build(tmp_path, sanitizer, variable)
    for mode in ("threads", "processes"):
        done = stress(program, mode, "20", str(random.getrandbits(32)))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == "20 rounds, 0 wrong messages\n"


@pytest.mark.parametrize(
    "broken",
    [
        "-DPACI_RT_P2P_PUBLISH=std::memory_order_relaxed",
        "-DPACI_RT_P2P_RETURN=std::memory_order_relaxed",
        "-DPACI_RT_P2P_CREDITS(slots)=((slots)+2)",
    ],
)
@pytest.mark.slow
def test_stress_notices_what_is_broken(tmp_path: Path, broken: str) -> None:
    program = build(tmp_path, "thread", "P2P_TSAN_PROGRAM", f"P2P_BREAK='{broken}'")
    assert stress(program, "threads", "40", "3").returncode != 0, "the stress program cannot fail"
