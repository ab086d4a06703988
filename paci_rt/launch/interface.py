"""Which network interface gloo listens on: loopback where all processes share it, else the one that reaches the others.

By itself gloo takes the interface that the host's own name resolves to. On many machines that is loopback, where no
other host can reach it; on others a public one, although all processes are on one host.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import json
import os
import socket
import struct
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from paci_rt.errors import TransportError

VARIABLE = "GLOO_SOCKET_IFNAME"
LOOPBACK_NAMES = ("lo", "lo0")
TIMEOUT_S = 300.0
"""How long a process waits for the others to start, where nothing else is said."""
_SIOCGIFCONF = 0x8912  # <linux/sockios.h>
_POLL_S = 0.01


def init_gloo(timeout_s: float | None = None) -> None:
    """``torch.distributed.init_process_group("gloo")`` under ``torchrun``, over the interface that reaches all
    processes.

    Where all of them share one loopback, gloo listens there. Between hosts each process takes the interface from which
    it reaches ``MASTER_ADDR``; that host itself, the one from which it reaches another host. ``GLOO_SOCKET_IFNAME``
    overrides the choice, and is set to it for groups that are made later.

    Args:
        timeout_s: how long to wait for the other processes; None is 300 s, and torch's own deadlines afterwards.

    Raises:
        TransportError: no interface reaches the others, or some did not come in time.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from paci_rt import launch
        >>> names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        >>> with mock.patch.dict(os.environ, names):  # as torchrun sets them, with a port
        ...     launch.init_gloo()
        ...     print(os.environ["GLOO_SOCKET_IFNAME"], torch.distributed.get_world_size())
        ...     torch.distributed.destroy_process_group()
        lo 1
    """
    limits: dict[str, Any] = {} if timeout_s is None else {"timeout": timedelta(seconds=timeout_s)}
    store, rank, size = next(rendezvous("env://", **limits))
    take_interface(store, rank, size, TIMEOUT_S if timeout_s is None else timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, **limits)


def take_interface(store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
    """Set ``GLOO_SOCKET_IFNAME`` to what :func:`choose` finds, unless somebody has set it.

    Args:
        store: where the processes of the run meet.

    Raises:
        TransportError: as :func:`init_gloo`.
    """
    own = os.environ.get(VARIABLE, "")
    exchange = dist.PrefixStore("paci_rt/interface", store)
    master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) or 1)
    name = choose(exchange, rank, size, master, timeout_s)  # all of them, since others may need our address
    if not own and name is not None:
        os.environ[VARIABLE] = name


def choose(store: dist.Store, rank: int, size: int, master: tuple[str, int], timeout_s: float) -> str | None:
    """The interface of this process; None leaves it to gloo, where the system does not say which interfaces there are.

    Args:
        store: for this exchange alone.
        master: a name or address, and a port that need not be open.

    Raises:
        TransportError: as :func:`init_gloo`.
    """
    own = address_towards(*master)
    told = {"network": network(), "address": own, "host": socket.gethostname()}
    everyone = _exchange(store, rank, size, told, timeout_s)
    others = [one for one in everyone if one["network"] != told["network"]]
    if not others:
        return next((name for _, name in socket.if_nameindex() if name in LOOPBACK_NAMES), None)
    if own is None or ipaddress.ip_address(own).is_loopback:  # the host's own name, which means loopback here
        reachable = [one["address"] for one in others if one["address"] is not None]
        found = [address_towards(one, master[1]) for one in reachable if not ipaddress.ip_address(one).is_loopback]
        own = next((one for one in found if one is not None and not ipaddress.ip_address(one).is_loopback), None)
    if own is None and os.environ.get(VARIABLE, ""):
        return None  # the user knows better
    if own is None:
        hosts = ", ".join(sorted({one["host"] for one in others}))
        raise TransportError(
            f"no network interface of host {told['host']} reaches the other hosts ({hosts}): set MASTER_ADDR to an "
            f"address of the first host that they reach, or name the interface in {VARIABLE}"
        )
    return interface_of(own)


def _exchange(store: dist.Store, rank: int, size: int, value: Any, timeout_s: float) -> list[Any]:
    """Values of all processes, by rank."""
    keys = [str(one) for one in range(size)]
    store.set(keys[rank], json.dumps(value))
    until = time.monotonic() + timeout_s
    while not store.check(keys):
        if time.monotonic() > until:
            missing = ", ".join(key for key in keys if not store.check([key]))
            raise TransportError(
                f"the processes of rank {missing} did not start within {timeout_s:g} s: start torchrun on all hosts, "
                "with the same --nnodes and --master-addr"
            )
        time.sleep(_POLL_S)
    return [json.loads(store.get(key)) for key in keys]


def network() -> str:
    """What processes have in common that share a loopback: the boot of the host, and the network namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()


def address_towards(host: str, port: int) -> str | None:
    """The address from which this host sends to ``host``; nothing is sent. None if there is no way."""
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0]).partition("%")[0]
    return None


def interface_of(address: str) -> str | None:
    """The name of the interface that has ``address``; None if the system does not tell."""
    wanted = ipaddress.ip_address(address)
    with suppress(OSError):
        for name, other in [*_ipv4(), *_ipv6()]:
            if other == wanted:
                return name
    return None


def _ipv4() -> list[tuple[str, ipaddress.IPv4Address]]:
    """Interfaces and their addresses, second ones too."""
    room = array.array("B", bytes(40 * 512))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("iL", len(room), room.buffer_info()[0])
        used = struct.unpack("iL", fcntl.ioctl(asking.fileno(), _SIOCGIFCONF, request))[0]
    entries = [room[at : at + 40].tobytes() for at in range(0, used, 40)]
    names = [entry[:16].partition(b"\0")[0].decode().partition(":")[0] for entry in entries]
    return [(name, ipaddress.IPv4Address(entry[20:24])) for name, entry in zip(names, entries, strict=True)]


def _ipv6() -> list[tuple[str, ipaddress.IPv6Address]]:
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return []
    fields = [line.split() for line in lines]
    return [(one[5], ipaddress.IPv6Address(int(one[0], 16))) for one in fields]
