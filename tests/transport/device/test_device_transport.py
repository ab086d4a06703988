"""The transports for GPUs, ``nccl`` and ``ipc``, on the host twin and a fake NCCL that keeps NCCL's rules."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt import native
from paci_rt.errors import PeerLostError, ScheduleError, StageError, TransferTimeoutError, TransportError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import Message
from paci_rt.transport.device.backends import Candidate, Measured, choose
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.sockets import Switchboard
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.nccl import NCCL, REGISTERED, check_environment
from support.device_twin import Machine, TwinHardware
from support.messages import check, message
from support.sanitizers import build
from support.toy import Run, loss_fn, make_optimizer, module, train, train_local

DOWN, UP = Channel("F", 0, 1), Channel("B", 1, 0)
BACKENDS = ["nccl", "registered", "ipc"]
SHORT = DeviceOptions(timeout_s=1.0)
Work = Callable[[DeviceTransport, TwinHardware], Any]


def one(value: float = 1.0, size: int = 8) -> Message:
    return Message((torch.full((size,), value),), (False,))


def rank_of(transport: DeviceTransport) -> int:
    return transport._rank


def edges(transport: DeviceTransport) -> tuple[Any, Any]:
    """What this rank of two sends on and receives on."""
    return (DOWN, UP) if rank_of(transport) == 0 else (UP, DOWN)


def exchange(count: int, ahead: int, seed: int | None = None) -> Work:
    """Rank 0 sends, rank 1 answers, with ``ahead`` messages on their way, as in a pipeline."""

    def work(transport: DeviceTransport, hardware: TwinHardware) -> dict[str, Any]:
        out, back = edges(transport)
        rng = random.Random(f"{seed} {rank_of(transport)}")
        transport.open([back])
        arrived = []
        for at in range(count + ahead):
            if seed is not None:
                time.sleep(rng.choice((0.0, 0.0, 0.001, 0.003)))
            if rank_of(transport) == 0:
                if at < count:
                    transport.send(out, at, message(at))
                if at >= ahead:
                    arrived.append((1000 + at - ahead, transport.recv(back, at - ahead)))
            elif at < count:
                arrived.append((at, transport.recv(back, at)))
                transport.send(out, at, message(1000 + at))
        transport.flush()
        hardware.synchronize()
        for number, got in arrived:
            check(got, message(number))
        assert transport.held_messages == 0
        return transport.stats()

    return work


def fine(results: list[Any], machine: Machine) -> list[Any]:
    """The results of all ranks, none of which has failed; and nothing is left, and no rule of NCCL was broken."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    if machine.nccl is not None:
        assert machine.nccl.misuse == ""
        assert (machine.nccl.alive, machine.nccl.aborts, machine.nccl.registered) == (0, 0, 0)
    machine.transports.clear()
    assert machine.twin.allocated == 0
    assert machine.twin.misuse == ""
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ahead", "seed", "delay_us"), [(1, None, 0), (3, 7, 60)])
def test_random_messages_arrive_as_they_were_sent(backend: str, ahead: int, seed: int | None, delay_us: int) -> None:
    machine = Machine(2, max_delay_us=delay_us, seed=3)
    stats, _ = fine(machine.run(exchange(60, ahead, seed), backend=backend), machine)
    assert set(stats["backends"]) == {"F 0->1", "B 1->0"}
    if backend != "ipc":
        assert machine.nccl.issuing_threads == 1
        assert machine.nccl.matched > 100


def test_calls_that_nccl_issues_in_the_background_are_waited_for() -> None:
    machine = Machine(2)
    machine.nccl.set_background(3)
    fine(machine.run(exchange(20, 2)), machine)


def test_small_sends_may_end_unmatched() -> None:
    machine = Machine(2)
    machine.nccl.set_eager_bytes(1 << 14)
    fine(machine.run(exchange(40, 3, 5)), machine)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend: str) -> None:
    """The sender's device is held up; its thread and the receiver's go on, and the bytes of later count."""
    machine, gate, ended = Machine(2), threading.Event(), {}

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            tensor = torch.zeros(1000)
            hardware.launch(lambda: gate.wait(30))
            hardware.launch(partial(tensor.fill_, 3.0))
            transport.send(out, 0, Message((tensor,), (True,)))
            del tensor
            assert transport.held_messages == 1
        else:
            got = transport.recv(back, 0)
            seen = []
            hardware.launch(lambda: seen.append(float(got.tensors[0][0])))
            time.sleep(0.05)
            assert seen == []
            ended["receiver"] = not gate.is_set()
            gate.set()
            hardware.synchronize()
            assert seen == [3.0]

    fine(machine.run(work, backend=backend), machine)
    assert ended == {"receiver": True}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fast_sender_neither_waits_nor_overruns_nor_blocks_its_device(backend: str) -> None:
    machine, sent = Machine(2), threading.Event()

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            for at in range(12):
                transport.send(out, at, one(float(at)))
            time.sleep(0.1)
            hardware.synchronize()  # as torch.cuda.synchronize() would: only what has a slot is on the device
            assert transport.held_messages >= 12 - 2
            sent.set()
            transport.flush()
            assert transport.held_messages == 0
        else:
            assert sent.wait(20)
            got = [transport.recv(back, at).tensors[0] for at in range(12)]
            hardware.synchronize()
            assert [float(tensor[0]) for tensor in got] == list(range(12))

    fine(machine.run(work, backend=backend, options=DeviceOptions(timeout_s=20.0, slots=2)), machine)


def test_tensors_are_kept_until_they_have_left() -> None:
    machine, taken = Machine(2), threading.Event()

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            transport.send(out, 0, one(5.0))
            assert taken.wait(20)
            deadline = time.monotonic() + 10
            while transport.held_messages and time.monotonic() < deadline:
                transport._outgoing[out].let_go()
            assert transport.held_messages == 0
        else:
            got = transport.recv(back, 0)
            hardware.synchronize()
            assert float(got.tensors[0][0]) == 5.0
            taken.set()

    fine(machine.run(work), machine)


def test_ring_memory_grows_to_the_largest_message_and_no_further() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> int:
        out, back = edges(transport)
        transport.open([back])
        for at in range(40):
            size = 4096 if at > 20 else 1024
            if rank_of(transport) == 0:
                transport.send(out, at, one(float(at), size))
            else:
                transport.recv(back, at)
        transport.flush()
        hardware.synchronize()
        return int(transport.stats()["ring_bytes"])

    options = DeviceOptions(timeout_s=20.0, slots=2)
    used = machine.run(work, options=options)[1]
    assert used == 2 * 4 * (1024 + 4096), "both slots in both sizes: the first ones are given back at the end"
    used = machine.run(work, backend="ipc", options=options)[1]
    assert used == 2 * (2 << 20), "what other processes open has blocks of CUDA's allocator to itself"
    fine([], machine)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_receiver_may_leave_before_the_last_message_arrives(backend: str) -> None:
    machine, leaving = Machine(2), threading.Event()

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            transport.send(out, 0, one())
            transport.flush()
            leaving.wait(20)
            time.sleep(0.1)  # it says goodbye
            transport.send(out, 1, one(size=5000))
            deadline = time.monotonic() + 20
            while transport._outgoing[out].end.completed() < 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            transport.flush()
        else:
            arrived = transport.recv(back, 0)
            hardware.synchronize()
            check(arrived, one())
            leaving.set()

    fine(machine.run(work, backend=backend, options=DeviceOptions(timeout_s=20.0, slots=1)), machine)


# --- when something goes wrong ---


def failing(machine: Machine, work: Work, **options: Any) -> tuple[list[Any], float]:
    start = time.monotonic()
    results = machine.run(work, **options)
    return results, time.monotonic() - start


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_message_that_never_comes_is_diagnosed_and_ends_both_sides(backend: str, tmp_path: Path) -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        for at in range(3):
            if rank_of(transport) == 0:
                transport.send(out, at, one())
            else:
                transport.recv(back, at)
        transport.recv(back, 3 if rank_of(transport) == 1 else 0)

    options = DeviceOptions(timeout_s=1.0, events_dir=tmp_path)
    results, took_s = failing(machine, work, backend=backend, options=options)
    assert took_s < 8.0
    timeouts = [error for error in results if isinstance(error, TransferTimeoutError)]
    lost = [error for error in results if isinstance(error, PeerLostError)]
    assert timeouts and len(timeouts) + len(lost) == 2
    for error in timeouts:
        text = str(error)
        assert re.search(r"action (1RECV_F3|0RECV_B0) timed out after 1\.\d+ s: slot \d is still empty", text)
        assert re.search(r"edge (F 0->1 \(activations from stage 0|B 1->0 \(gradients from stage 1)", text)
        assert "last completed sequence number: sender" in text and "raise transfer_timeout_s" in text
        written = json.loads(Path(text.rpartition(": ")[2]).read_text())
        events = {record["event"] for channel in written["channels"] for record in channel["events"]}
        assert {"open", "timeout"} <= events
    for error in lost:
        assert "timed out" in error.origin


def test_numbers_of_both_sides_are_in_the_message() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            for at in range(4):
                transport.send(out, at, one())
            transport.flush()
            time.sleep(3)
        else:
            for at in range(5):
                transport.recv(back, at)

    results, _ = failing(machine, work, options=SHORT)
    assert isinstance(results[1], TransferTimeoutError)
    assert re.search(r"micro-batch 4, slot 0, 64 bytes; .* sender 3, receiver 3", str(results[1]))


def test_a_link_that_is_down_ends_both_sides_within_the_deadline() -> None:
    """The transfer is issued on both sides and never matched: only the watchdogs can see that."""
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        machine.nccl.hold(True)
        if rank_of(transport) == 0:
            transport.send(out, 0, one())
            transport.flush()
        else:
            transport.recv(back, 0)
            hardware.synchronize()  # hangs until the communicator is aborted
            for _ in range(500):
                transport.flush()
                time.sleep(0.01)

    results, took_s = failing(machine, work, options=SHORT)
    assert took_s < 8.0
    assert machine.nccl.aborts == 4 and machine.nccl.misuse == ""
    assert all(isinstance(error, (TransferTimeoutError, PeerLostError)) for error in results), results
    assert any("has not arrived" in str(error) or "has not left" in str(error) for error in results)


def test_a_receiver_that_takes_nothing_is_named() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 1:
            time.sleep(4)
            transport.flush()
            return
        for at in range(6):
            transport.send(out, at, one())
        transport.flush()

    results, _ = failing(machine, work, options=DeviceOptions(timeout_s=1.0, slots=4))
    assert isinstance(results[0], TransferTimeoutError)
    assert re.search(r"0SEND_F4 timed out .* slot 0 is still full; .*Look for what holds stage 1 up", str(results[0]))
    assert isinstance(results[1], PeerLostError)


@pytest.mark.parametrize("result", [6, 1])
def test_asynchronous_errors_of_nccl_end_the_run(result: int) -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        _out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            machine.nccl.break_all(result)
        transport.recv(back, 0)

    results, took_s = failing(machine, work)
    assert took_s < 8.0
    assert all(isinstance(error, PeerLostError) for error in results)
    assert all(f"NCCL reports fake error {result}" in error.origin for error in results)


def test_a_failure_reaches_every_rank_with_its_origin() -> None:
    machine, start = Machine(4), threading.Barrier(4)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        rank = rank_of(transport)
        incoming = ([Channel("F", rank - 1, rank)] if rank else []) + (
            [Channel("B", rank + 1, rank)] if rank < 3 else []
        )
        transport.open(incoming)
        start.wait(20)
        if rank == 3:
            raise ZeroDivisionError("by chance")
        transport.recv(incoming[-1], 0)

    results, took_s = failing(machine, work, options=DeviceOptions(timeout_s=60.0))
    assert took_s < 8.0
    assert isinstance(results[3], ZeroDivisionError)
    for error in results[:3]:
        assert isinstance(error, PeerLostError)
        assert error.origin == "rank 3 failed: ZeroDivisionError: by chance"


def test_a_process_that_vanishes_is_noticed() -> None:
    machine = Machine(1)
    here, there = socket.socketpair()
    engine = native.core().DeviceEngine(0, 0, 4, 20.0, machine.twin)
    engine.add_incoming(kind="F", sender=1, receiver=0, fd=here.detach(), backend="ipc")
    threading.Timer(0.1, there.close).start()
    with pytest.raises(PeerLostError, match="stage 1 is gone: it closed the connection without a word"):
        engine.connect()
    engine.close()


def test_what_is_not_of_paci_rt_is_refused() -> None:
    machine = Machine(1)
    here, there = socket.socketpair()
    engine = native.core().DeviceEngine(0, 0, 4, 20.0, machine.twin)
    engine.add_outgoing(kind="F", sender=0, receiver=1, fd=here.detach(), backend="ipc")
    there.sendall(b"GET / HTTP/1.1\r\n" * 8)
    with pytest.raises(PeerLostError, match="what arrives is not of paci_rt"):
        engine.connect()
    engine.close()


def test_a_connection_that_nobody_answers_times_out() -> None:
    machine = Machine(1)
    here, there = socket.socketpair()
    engine = native.core().DeviceEngine(0, 0, 4, 0.3, machine.twin)
    engine.add_outgoing(kind="F", sender=0, receiver=1, fd=here.detach(), backend="ipc")
    with pytest.raises(TransferTimeoutError, match=r"edge F 0->1 was not connected within 0\.3 s: see whether stage 1"):
        engine.connect()
    engine.close()
    there.close()


def test_both_sides_need_the_same_slots() -> None:
    machine = Machine(1)
    engines = [native.core().DeviceEngine(device, device, 2 + device, 20.0, machine.twin) for device in range(2)]
    here, there = socket.socketpair()
    engines[0].add_outgoing(kind="F", sender=0, receiver=1, fd=here.detach(), backend="ipc")
    engines[1].add_incoming(kind="F", sender=0, receiver=1, fd=there.detach(), backend="ipc")
    said = []
    for engine in engines:
        with pytest.raises((ValueError, PeerLostError)) as caught:
            engine.connect()
        said.append(str(caught.value))
    assert any(re.search(r"edge F 0->1: slots is [23] here and [23] on the other side", text) for text in said)
    for engine in engines:
        engine.close()


def test_a_message_out_of_order_is_named_and_ends_the_run() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            transport.send(out, 7, one())
            transport.recv(back, 0)
        else:
            transport.recv(back, 8)

    results, _ = failing(machine, work)
    assert isinstance(results[1], ScheduleError)
    assert "message 7 (sequence 0) arrived where message 8 was due" in str(results[1])
    assert isinstance(results[0], PeerLostError) and "message 7" in results[0].origin


def test_waiting_for_somebody_who_has_closed() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        __, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 1:
            transport.recv(back, 0)

    results, took_s = failing(machine, work)
    assert took_s < 10.0
    assert isinstance(results[1], PeerLostError)
    assert "stage 0 has closed its transport without sending this message" in str(results[1])


def test_an_end_that_was_not_opened() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        with pytest.raises(ScheduleError, match="channel F 0->1 was not opened on the side that sends"):
            transport.send(DOWN, 0, one())
        with pytest.raises(ScheduleError, match="channel B 1->0 was not opened on the side that receives"):
            transport.recv(UP, 0)

    fine(machine.run(work), machine)


def test_the_constructor_takes_no_nonsense() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        DeviceOptions(slots=0)
    with pytest.raises(ValueError, match="timeout_s is -1"):
        DeviceOptions(timeout_s=-1)
    with pytest.raises(ValueError, match="max_ctas is 65"):
        DeviceOptions(max_ctas=65)
    twin = native.testing().HostTwin()
    engine = native.core().DeviceEngine(0, 0, 4, 20.0, twin)
    for backend, said in (("pigeon", "unknown backend pigeon"), ("nccl", "a unique id of 0 bytes is not")):
        here, there = socket.socketpair()
        with there, pytest.raises(ValueError, match=said):
            engine.add_outgoing(kind="F", sender=0, receiver=1, fd=here.detach(), backend=backend)


# --- CUDA graphs ---


def test_messages_within_a_recorded_graph() -> None:
    machine, recorded = Machine(2), threading.Barrier(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        hardware.record(True)
        if rank_of(transport) == 1:
            with pytest.raises(StageError, match="has carried no message yet"):
                transport.recv(back, 0)
        hardware.record(False)
        if rank_of(transport) == 0:
            transport.send(out, 0, one(1.0))
            transport.flush()
        else:
            transport.recv(back, 0)
        recorded.wait(20)
        hardware.record(True)
        if rank_of(transport) == 0:
            tensor = torch.zeros(8)
            hardware.launch(lambda: tensor.fill_(6.0))
            transport.send(out, 1, Message((tensor,), (False,)))
            transport.flush()
            hardware.launch(lambda: tensor.fill_(-1.0))  # behind the join, as memory that is used again
        else:
            got, seen = transport.recv(back, 1), []
            hardware.launch(lambda: seen.append(float(got.tensors[0][0])))
            hardware.synchronize()
            assert seen == [6.0]
        hardware.record(False)
        hardware.synchronize()

    fine(machine.run(work), machine)
    assert machine.nccl.issuing_threads == 2  # who records, and the engine's own


def test_a_graph_does_not_overtake_messages() -> None:
    machine, asked = Machine(2), threading.Barrier(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            for at in range(3):
                transport.send(out, at, one())
            time.sleep(0.2)  # two of them are issued, as many as there are slots
            hardware.record(True)
            with pytest.raises(ScheduleError, match="1 messages wait for a free slot of the receiver, and a CUDA"):
                transport.send(out, 3, one())
            hardware.record(False)
            asked.wait(20)
        else:
            asked.wait(20)
            transport.recv(back, 0)
            hardware.record(True)
            with pytest.raises(ScheduleError, match="messages have not been taken, and a CUDA graph cannot"):
                transport.recv(back, 1)
            hardware.record(False)
            transport.recv(back, 1)
            transport.recv(back, 2)
        transport.flush()

    fine(machine.run(work, options=DeviceOptions(timeout_s=20.0, slots=2)), machine)


def test_graphs_hold_no_transfers_of_other_processes_events() -> None:
    machine = Machine(2)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        hardware.record(True)
        with pytest.raises(ScheduleError, match="a CUDA graph cannot hold transfers of the ipc backend"):
            transport.send(out, 0, one())
        hardware.record(False)

    fine(machine.run(work, backend="ipc"), machine)


# --- what moves the bytes ---


def test_the_faster_way_is_measured_and_reported() -> None:
    machine = Machine(2)
    stats = fine(machine.run(exchange(20, 2), backend="measured"), machine)
    for one_side in stats:
        for edge, rows in one_side["measured"].items():
            assert [row["name"] for row in rows] == ["nccl", "nccl registered", "ipc"]
            best = min(rows, key=lambda row: row["small_us"] + row["large_us"])
            taken = one_side["backends"][edge]
            assert taken.replace(" (registered buffers)", " registered") == best["name"]
    assert stats[0]["backends"] == stats[1]["backends"]


def test_a_way_that_does_not_work_is_reported_and_not_taken() -> None:
    machine = Machine(2)
    machine.nccl.set_init_result(1)
    stats, _ = fine(machine.run(exchange(20, 2), backend="measured"), machine)
    assert set(stats["backends"].values()) == {"ipc"}
    failed = stats["measured"]["F 0->1"][0]
    assert failed["small_us"] is None
    assert "ncclCommInitRankConfig failed with ncclUnhandledCudaError (1)" in failed["error"]
    assert "no GPU is usable here" in failed["error"]


def test_choosing() -> None:
    both = [NCCL, Candidate("ipc")]
    assert choose(both, [], DOWN) == NCCL
    assert choose(both, [Measured("nccl", 9.0, 90.0), Measured("ipc", 20.0, 60.0)], DOWN).backend == "ipc"
    with pytest.raises(TransportError, match=r"channel F 0->1: nothing moves bytes .*nccl: no; ipc: neither"):
        choose(both, [Measured("nccl", None, None, "no"), Measured("ipc", None, None, "neither")], DOWN)


def facts(**changed: Any) -> dict[str, Any]:
    return {"host": "a", "process": 1, "device": "GPU-1", "nccl": 23203, "shares_gpus": False, **changed}


def test_obstacles_name_the_remedy() -> None:
    other = facts(device="GPU-2", process=2)
    assert NCCL.obstacle(facts(), other) == REGISTERED.obstacle(facts(), other) == ""
    assert "within one host" in Candidate("ipc").obstacle(facts(), facts(host="b"))
    assert Candidate("ipc").obstacle(facts(), facts(process=2)) == ""
    assert "pip install nvidia-nccl" in NCCL.obstacle(facts(nccl=0), other)
    assert "from 2.23 on" in REGISTERED.obstacle(facts(nccl=22105), other)
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in NCCL.obstacle(facts(), facts(process=2))
    assert "allows from 2.30 on" in NCCL.obstacle(facts(nccl=22703), facts(process=2, shares_gpus=True))
    assert NCCL.obstacle(facts(shares_gpus=True), facts(process=2, shares_gpus=True)) == ""


def test_ranks_on_one_gpu_are_told_what_to_do() -> None:
    machine = Machine(2, shared=True)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        with pytest.raises(TransportError, match=r"channel B 1->0: both processes are on one GPU \(twin device 0\)"):
            transport.open([edges(transport)[1]])

    fine(machine.run(work), machine)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, "CUDA_DEVICE_MAX_CONNECTIONS=1 makes 6 streams share queues"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, ""),
        ({}, ""),
    ],
)
def test_the_environment_must_not_tie_streams_together(environment: dict[str, str], said: str) -> None:
    if said:
        with pytest.raises(TransportError, match=said):
            check_environment(4, None, environment)
    else:
        check_environment(4, None, environment)
    with pytest.warns(RuntimeWarning, match="18 streams share CUDA's 8 queues"):
        check_environment(16, None, {})


# --- stages of one process, and whole pipelines ---


@pytest.mark.parametrize(("backend", "taken"), [("nccl", "self-nccl"), ("ipc", "self-copy")])
def test_two_stages_of_one_process(backend: str, taken: str) -> None:
    machine = Machine(1)

    def work(transport: DeviceTransport, hardware: TwinHardware) -> dict[str, Any]:
        transport.open([UP])
        transport.open([DOWN])
        assert not transport.ready(DOWN)
        for at in range(30):
            transport.send(DOWN, at, message(at))
            assert transport.ready(DOWN)
            got = transport.recv(DOWN, at)
            transport.send(UP, at, got)
            back = transport.recv(UP, at)
            hardware.synchronize()
            check(back, message(at))
        transport.flush()
        return transport.stats()

    (stats,) = fine(machine.run(work, backend=backend, chunks=2), machine)
    assert stats["backends"] == {"F 0->1": taken, "B 1->0": taken}


class OnTheHost:
    """A transport whose messages are there when ``recv`` returns, since this machine's stages compute on the host."""

    def __init__(self, inner: DeviceTransport, hardware: TwinHardware) -> None:
        self._inner, self._hardware = inner, hardware

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def recv(self, channel: Any, index: int) -> Message:
        arrived = self._inner.recv(channel, index)
        self._hardware.synchronize()
        return arrived


PIPELINES = [
    (Run(schedule="paci", stages=3, accumulation=2, slack=1, wide=True), 1, "nccl"),
    (Run(schedule="1f1b", stages=4, accumulation=6), 1, "ipc"),
    (Run(schedule="zb-h1", stages=3, accumulation=4, wide=True), 1, "registered"),
    (Run(schedule="interleaved-1f1b", stages=4, accumulation=4, chunks=2), 2, "nccl"),
]


@pytest.mark.parametrize(("run", "chunks", "backend"), PIPELINES)
def test_pipelines_train_to_the_same_bits(run: Run, chunks: int, backend: str) -> None:
    ranks = run.stages // chunks
    machine = Machine(ranks, max_delay_us=20, seed=1)

    modules = [module(at, run) for at in range(run.stages)]  # here, since threads share the random generator

    def work(transport: DeviceTransport, hardware: TwinHardware) -> dict[str, Any]:
        here = range(rank_of(transport), run.stages, ranks)
        stages = [paci_rt.PipelineStage(modules[at], at, run.stages, "cpu") for at in here]
        schedule = paci_rt.get_schedule_class(run.schedule)(
            stages if chunks > 1 else stages[0],
            run.accumulation,
            loss_fn,
            optimizer=[make_optimizer(run.optimizer, stage.parameters()) for stage in stages],
            slack=run.slack,
            buffers=run.buffers,
            lookahead=run.lookahead,
            transport=OnTheHost(transport, hardware),
        )
        return train(schedule, run)

    results = fine(machine.run(work, backend=backend, chunks=chunks), machine)
    local = train_local(run)
    for result in results:
        for name, value in result["params"].items():
            assert torch.equal(value, local["params"][name]), name
    assert results[-1]["losses"] == local["losses"]


# --- connections ---


def test_strangers_are_hung_up_on_and_connections_may_come_in_any_order() -> None:
    board = Switchboard(one_host=True, timeout_s=10.0)
    host, port, token = board.address
    stranger = socket.create_connection((host, port))
    stranger.sendall(b"\x05\x00\x00\x00hello")
    fds = [
        board.connect([host, port, token], channel, "data", {"for": list(channel)})
        for channel in (DOWN, Channel("F", 2, 3))
    ]
    with pytest.raises(TransportError, match="no connection to"):
        board.connect([host, 1, token], DOWN, "data", {})
    other = board.connect([host, port, "guess"], Channel("F", 4, 5), "data", {})
    for channel in (Channel("F", 2, 3), DOWN):
        fd, greeting = board.accept(channel, "data")
        assert greeting == {"for": list(channel)}
        socket.socket(fileno=fd).close()
    assert stranger.recv(1) == b""
    for fd in (*fds, other):
        socket.socket(fileno=fd).close()
    stranger.close()
    board.close()
    late = Switchboard(one_host=True, timeout_s=0.2)
    with pytest.raises(TransportError, match=r"channel F 0->1: stage 0 has not connected within 0\.2 s"):
        late.accept(DOWN, "data")
    late.close()


# --- threads ---


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("device"), "thread", "DEVICE_TSAN_PROGRAM")


@pytest.mark.parametrize("mode", ["nccl", "nccl-background", "nccl-registered", "ipc", "nccl-fails", "ipc-fails"])
def test_no_race_is_in_the_engine(stress: Path, mode: str) -> None:
    done = subprocess.run([stress, mode, "5", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{mode}: 5 rounds, 0 wrong" in done.stdout


@pytest.mark.parametrize("mode", ["nccl", "ipc"])
def test_a_race_would_be_noticed(stress: Path, mode: str) -> None:
    lost = subprocess.run([stress, mode, "2", "1", "5"], capture_output=True, timeout=300)
    assert lost.returncode != 0, "a fifth of all waits was lost, and nobody noticed"
