"""The transports for GPUs, ``nccl`` and ``ipc``, on the host twin and a fake NCCL that keeps NCCL's rules."""

from __future__ import annotations

import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt.errors import ScheduleError, StageError
from paci_rt.transport import Message
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.structure import take_apart
from support.deadlines import deadline, wait_until
from support.device_twin import Machine, TwinHardware
from support.device_work import BACKENDS, DOWN, UP, edges, exchange, fine, one, rank_of
from support.messages import check, message
from support.sanitizers import build
from support.toy import Run, loss_fn, make_optimizer, module, train, train_local


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ahead", "seed", "delay_us"), [(1, None, 0), (3, 7, 60)])
def test_random_messages_arrive_as_they_were_sent(backend: str, ahead: int, seed: int | None, delay_us: int) -> None:
    machine = Machine(2, max_delay_us=delay_us, seed=3)
    stats, _ = fine(machine.run(exchange(60, ahead, seed), backend=backend), machine)
    assert set(stats["backends"]) == {"F 0->1", "B 1->0"}
    if backend != "ipc":
        assert machine.nccl.issuing_threads == 1
        assert machine.nccl.matched > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_structures_travel_with_the_descriptions(backend: str) -> None:
    outputs = [{"x": torch.ones(2), "n": 1}, {"x": torch.ones(2), "n": 1}, (torch.ones(3), ["a" * 700, None]), {"n": 2}]

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        for at in range(3 * len(outputs)):
            tensors, structure = take_apart(outputs[at // 3])
            sent = Message(tensors, tuple(True for _ in tensors), structure if at % 3 else None)
            if rank_of(transport) == 0:
                transport.send(out, at, sent)
                continue
            got = transport.recv(back, at)
            hardware.synchronize()
            check(got, sent)
            assert got.structure == sent.structure and len(got.tensors) == len(tensors)

    machine = Machine(2)
    fine(machine.run(work, backend=backend), machine)


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
            hardware.launch(lambda: gate.wait(deadline(30)))
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
            assert sent.wait(deadline(20))
            got = [transport.recv(back, at).tensors[0] for at in range(12)]
            hardware.synchronize()
            assert [float(tensor[0]) for tensor in got] == list(range(12))

    fine(machine.run(work, backend=backend, options=DeviceOptions(timeout_s=deadline(20.0), slots=2)), machine)


def test_tensors_are_kept_until_they_have_left() -> None:
    machine, taken = Machine(2), threading.Event()

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            transport.send(out, 0, one(5.0))
            assert taken.wait(deadline(20))

            def nothing_held() -> bool:
                transport._outgoing[out].let_go()
                return transport.held_messages == 0

            wait_until(nothing_held, 10, "the message is still held")
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

    options = DeviceOptions(timeout_s=deadline(20.0), slots=2)
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
            leaving.wait(deadline(20))
            time.sleep(0.1)  # it says goodbye
            transport.send(out, 1, one(size=5000))
            wait_until(lambda: transport._outgoing[out].end.completed() >= 1, 20, "the message has not left")
            transport.flush()
        else:
            arrived = transport.recv(back, 0)
            hardware.synchronize()
            check(arrived, one())
            leaving.set()

    fine(machine.run(work, backend=backend, options=DeviceOptions(timeout_s=deadline(20.0), slots=1)), machine)


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
        recorded.wait(deadline(20))
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
            asked.wait(deadline(20))
        else:
            asked.wait(deadline(20))
            transport.recv(back, 0)
            hardware.record(True)
            with pytest.raises(ScheduleError, match="messages have not been taken, and a CUDA graph cannot"):
                transport.recv(back, 1)
            hardware.record(False)
            transport.recv(back, 1)
            transport.recv(back, 2)
        transport.flush()

    fine(machine.run(work, options=DeviceOptions(timeout_s=deadline(20.0), slots=2)), machine)


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


# --- threads ---


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("device"), "thread", "DEVICE_TSAN_PROGRAM")


@pytest.mark.parametrize("mode", ["nccl", "nccl-background", "nccl-registered", "ipc", "nccl-fails", "ipc-fails"])
@pytest.mark.slow
def test_no_race_is_in_the_engine(stress: Path, mode: str) -> None:
    done = subprocess.run([stress, mode, "5", "1"], capture_output=True, text=True, timeout=deadline(300))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{mode}: 5 rounds, 0 wrong" in done.stdout


@pytest.mark.parametrize("mode", ["nccl", "ipc"])
@pytest.mark.slow
def test_a_race_would_be_noticed(stress: Path, mode: str) -> None:
    lost = subprocess.run([stress, mode, "2", "1", "5"], capture_output=True, timeout=deadline(300))
    assert lost.returncode != 0, "a fifth of all waits was lost, and nobody noticed"
