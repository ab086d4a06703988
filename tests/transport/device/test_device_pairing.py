"""How the two ends of an edge of the transports for GPUs find each other."""

from __future__ import annotations

import re
import socket
import threading

import pytest

from paci_rt import native
from paci_rt.errors import PeerLostError, TransferTimeoutError, TransportError
from paci_rt.schedules.channel import Channel
from paci_rt.transport.device.sockets import Switchboard
from support.deadlines import deadline
from support.device_twin import Machine
from support.device_work import DOWN


def test_a_process_that_vanishes_is_noticed() -> None:
    machine = Machine(1)
    here, there = socket.socketpair()
    engine = native.core().DeviceEngine(0, 0, 4, deadline(20.0), machine.twin)
    engine.add_incoming(kind="F", sender=1, receiver=0, fd=here.detach(), backend="ipc")
    threading.Timer(0.1, there.close).start()
    with pytest.raises(PeerLostError, match="stage 1 is gone: it closed the connection without a word"):
        engine.connect()
    engine.close()


def test_what_is_not_of_paci_rt_is_refused() -> None:
    machine = Machine(1)
    here, there = socket.socketpair()
    engine = native.core().DeviceEngine(0, 0, 4, deadline(20.0), machine.twin)
    engine.add_outgoing(kind="F", sender=0, receiver=1, fd=here.detach(), backend="ipc")
    there.sendall(b"GET / HTTP/1.1\r\n" * 8)
    with pytest.raises(PeerLostError, match="what arrives is not of paci_rt"):
        engine.connect()
    engine.close()


@pytest.mark.slow
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
    engines = [
        native.core().DeviceEngine(device, device, 2 + device, deadline(20.0), machine.twin) for device in range(2)
    ]
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


def test_strangers_are_hung_up_on_and_connections_may_come_in_any_order() -> None:
    board = Switchboard(one_host=True, timeout_s=deadline(10.0))
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
