"""What the transports for GPUs say and do when something goes wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from paci_rt import native
from paci_rt.errors import PeerLostError, ScheduleError, TransferTimeoutError
from paci_rt.schedules.channel import Channel
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from support.deadlines import deadline, wait_until
from support.device_twin import Machine, TwinHardware
from support.device_work import BACKENDS, DOWN, SHORT, UP, edges, failing, fine, one, rank_of


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
    assert took_s < deadline(8.0)
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
    machine, over = Machine(2), threading.Event()

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 0:
            for at in range(4):
                transport.send(out, at, one())
            transport.flush()
            over.wait(deadline(20))
        else:
            try:
                for at in range(5):
                    transport.recv(back, at)
            finally:
                over.set()

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
    assert took_s < deadline(8.0)
    assert machine.nccl.aborts == 4 and machine.nccl.misuse == ""
    assert all(isinstance(error, (TransferTimeoutError, PeerLostError)) for error in results), results
    assert any("has not arrived" in str(error) or "has not left" in str(error) for error in results)


def test_a_receiver_that_takes_nothing_is_named() -> None:
    machine, over = Machine(2), threading.Event()

    def work(transport: DeviceTransport, hardware: TwinHardware) -> None:
        out, back = edges(transport)
        transport.open([back])
        if rank_of(transport) == 1:
            over.wait(deadline(20))
            wait_until(transport.flush, 20, "the other side's failure has not arrived")  # raises when it has
            return
        try:
            for at in range(6):
                transport.send(out, at, one())
            transport.flush()
        finally:
            over.set()

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
    assert took_s < deadline(8.0)
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
        start.wait(deadline(20))
        if rank == 3:
            raise ZeroDivisionError("by chance")
        transport.recv(incoming[-1], 0)

    results, took_s = failing(machine, work, options=DeviceOptions(timeout_s=deadline(60.0)))
    assert took_s < deadline(8.0)
    assert isinstance(results[3], ZeroDivisionError)
    for error in results[:3]:
        assert isinstance(error, PeerLostError)
        assert error.origin == "rank 3 failed: ZeroDivisionError: by chance"


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
    assert took_s < deadline(10.0)
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
    engine = native.core().DeviceEngine(0, 0, 4, deadline(20.0), twin)
    for backend, said in (("pigeon", "unknown backend pigeon"), ("nccl", "a unique id of 0 bytes is not")):
        here, there = socket.socketpair()
        with there, pytest.raises(ValueError, match=said):
            engine.add_outgoing(kind="F", sender=0, receiver=1, fd=here.detach(), backend=backend)
