"""Which interface gloo listens on, reports that arrive at rank 0, and one clock for several hosts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from paci_rt.errors import TransportError
from paci_rt.launch import Context, interface, reports
from paci_rt.trace import Event
from paci_rt.train import clocks

LOOPBACK = next(name for _, name in socket.if_nameindex() if name in interface.LOOPBACK_NAMES)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that wait for each other; an error in place of a result."""
    results: list[Any] = [None] * len(calls)

    def run(at: int) -> None:
        try:
            results[at] = calls[at]()
        except Exception as error:
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


class Host:
    """What one process sees: its network, its addresses towards others, and the interfaces that have them."""

    def __init__(self, network: str, routes: dict[str, str], interfaces: dict[str, str]) -> None:
        self.network, self.routes, self.interfaces = network, routes, interfaces


def chosen(monkeypatch: pytest.MonkeyPatch, master: str, hosts: list[Host]) -> list[Any]:
    store, of_thread = dist.HashStore(), threading.local()

    monkeypatch.setattr(interface, "network", lambda: of_thread.host.network)
    monkeypatch.setattr(interface, "address_towards", lambda name, _port: of_thread.host.routes.get(name))
    monkeypatch.setattr(interface, "interface_of", lambda address: of_thread.host.interfaces[address])

    def process(rank: int) -> Any:
        of_thread.host = hosts[rank]
        return interface.choose(store, rank, len(hosts), (master, 29500), 10.0)

    return at_once(*[lambda rank=rank: process(rank) for rank in range(len(hosts))])


def test_the_interface_that_reaches_the_first_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(interface.VARIABLE, raising=False)
    first = Host("a", {"10.0.0.1": "10.0.0.1", "10.0.0.2": "10.0.0.1"}, {"10.0.0.1": "eth1"})
    second = Host("b", {"10.0.0.1": "10.0.0.2"}, {"10.0.0.2": "ib0"})
    assert chosen(monkeypatch, "10.0.0.1", [first, second, second]) == ["eth1", "ib0", "ib0"]
    # The first host's own name is loopback there, as distributions write it into /etc/hosts.
    first = Host("a", {"head": "127.0.1.1", "10.0.0.2": "10.0.0.1"}, {"10.0.0.1": "eth1", "127.0.1.1": "lo"})
    second = Host("b", {"head": "10.0.0.2"}, {"10.0.0.2": "ib0"})
    assert chosen(monkeypatch, "head", [first, second]) == ["eth1", "ib0"]
    assert chosen(monkeypatch, "head", [first, first, second]) == ["eth1", "eth1", "ib0"]
    six = Host("b", {"head": "fd00::2"}, {"fd00::2": "eth0"})
    first = Host("a", {"head": "::1", "fd00::2": "fd00::1"}, {"fd00::1": "eth7"})
    assert chosen(monkeypatch, "head", [first, six]) == ["eth7", "eth0"]


def test_one_network_is_loopback_whatever_the_host_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host("a", {"head": "10.0.0.1"}, {"10.0.0.1": "eth0"})
    assert chosen(monkeypatch, "head", [host, host]) == [LOOPBACK, LOOPBACK]


def test_where_no_interface_reaches_the_others_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(interface.VARIABLE, raising=False)
    first = Host("a", {"head": "127.0.0.1"}, {})
    lost = Host("b", {}, {})
    results = chosen(monkeypatch, "head", [first, lost])
    assert all(isinstance(one, TransportError) for one in results)
    assert "no network interface of host" in str(results[1]) and "set MASTER_ADDR" in str(results[1])
    monkeypatch.setenv(interface.VARIABLE, "eth5")
    assert chosen(monkeypatch, "head", [first, lost]) == [None, None]


def test_a_process_that_does_not_come_is_named() -> None:
    with pytest.raises(TransportError, match=r"the processes of rank 1, 2 did not start within 0\.1 s"):
        interface.choose(dist.HashStore(), 0, 3, ("127.0.0.1", 1), 0.1)


def test_addresses_and_interfaces_of_this_host() -> None:
    assert interface.address_towards("127.0.0.1", 29500) == "127.0.0.1"
    assert interface.interface_of("127.0.0.1") == LOOPBACK
    assert interface.interface_of("203.0.113.77") is None
    assert interface.address_towards("no-such-host.invalid", 1) is None
    for name, address in interface._ipv4():
        assert name in [one for _, one in socket.if_nameindex()]
        assert interface.interface_of(str(address)) is not None


def on_rank(rank: int, group: Any, port: int) -> tuple[list[Any], int]:
    """Reports of two processes, through a store as torchrun has one."""
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=30), wait_for_workers=True)
    seen: list[Any] = []
    with reports.at_rank_0(Context(rank, 2, on_report=seen.append), store) as ctx:
        assert (ctx.rank, ctx.world_size) == (rank, 2)
        for step in range(50):
            if rank == 1:
                ctx.report({"kind": "step", "step": step, "loss": 0.5})
        if rank == 0:
            ctx.report({"kind": "own"})
    alive = sum(thread.name == "paci-rt reports" for thread in threading.enumerate())
    dist.barrier(group)
    return seen, alive


def test_reports_arrive_at_rank_0_in_their_order(workers: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (first, alive), (second, also) = workers.run(on_rank, 2, port)
    assert [one["step"] for one in first if one["kind"] == "step"] == list(range(50))
    assert {"kind": "own"} in first
    assert second == []
    assert (alive, also) == (0, 0)


def test_what_one_process_has_stays_there() -> None:
    seen: list[Any] = []
    own = Context(local=True, on_report=seen.append)
    with reports.at_rank_0(own) as ctx:
        assert ctx is own


def offset_on_rank(rank: int, group: Any, apart: bool) -> float:
    def now() -> float:
        return time.perf_counter() - 123.0 * rank

    identity = (lambda: f"host {rank}") if apart else clocks.clock_identity
    return clocks.offset_to_first(30.0, group, now=now, identity=identity)


def test_clocks_of_several_hosts_are_brought_together(workers: Any) -> None:
    offsets = workers.run(offset_on_rank, 3, True)
    assert offsets[0] == 0.0
    assert offsets[1:] == pytest.approx([123.0, 246.0], abs=0.05)
    assert workers.run(offset_on_rank, 3, False) == [0.0, 0.0, 0.0]  # one host has one clock, to the bit
    event = Event(1, "1F0", 10.0, 10.5, 3)
    assert clocks.shifted([event], 0.0) == (event,)
    assert clocks.shifted([event], 2.5) == (Event(1, "1F0", 12.5, 13.0, 3),)
