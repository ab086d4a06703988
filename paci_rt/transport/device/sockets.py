"""Connections between the processes of a pipeline, on one host or across hosts.

Both ends of a channel tell each other small things over them (``csrc/p2p/control_link.hpp``). There is one listening
socket per process and one connection per channel.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import time
from typing import Any

from paci_rt.errors import TransportError
from paci_rt.schedules.channel import Channel

LOOPBACK = "127.0.0.1"
MAX_GREETING_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")


class Switchboard:
    """This process's listening socket. ``connect`` and ``accept`` name channels, so they may come in any order.

    Args:
        one_host: all processes are on this host, so that the loopback interface will do.
        timeout_s: how long one connection may take, in seconds.
    """

    def __init__(self, *, one_host: bool, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._token = secrets.token_hex(16)
        self._waiting: dict[tuple[Channel, str], tuple[socket.socket, dict[str, Any]]] = {}
        self._listener = socket.create_server((LOOPBACK if one_host else own_address(), 0), backlog=128)

    @property
    def address(self) -> list[Any]:
        """What others need to connect: host, port and a token that strangers do not know. JSON-ready."""
        host, port = self._listener.getsockname()[:2]
        return [host, port, self._token]

    def connect(self, address: list[Any], channel: Channel, topic: str, greeting: dict[str, Any]) -> int:
        """The socket of a new connection to the process at ``address``, which hears ``greeting``.

        Raises:
            TransportError: no process listens there.
        """
        host, port, token = address
        try:
            link = socket.create_connection((host, port), timeout=self._timeout_s)
            head = {"token": token, "channel": list(channel), "topic": topic, "greeting": greeting}
            data = json.dumps(head).encode()
            link.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise TransportError(
                f"channel {channel.name}: no connection to {host}:{port} ({error}): see that the process of stage "
                f"{channel.receiver} still runs, and that a firewall lets processes of the run connect to each other"
            ) from error
        return link.detach()

    def accept(self, channel: Channel, topic: str) -> tuple[int, dict[str, Any]]:
        """The socket of the connection that the sender of ``channel`` makes, and its greeting.

        Raises:
            TransportError: it does not come in time.
        """
        deadline = time.monotonic() + self._timeout_s
        key = (channel, topic)
        while key not in self._waiting:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TransportError(
                    f"channel {channel.name}: stage {channel.sender} has not connected within {self._timeout_s:g} "
                    "s: look for what holds it up, or raise transfer_timeout_s"
                )
            self._listener.settimeout(min(left_s, 0.5))  # signals are seen in between
            try:
                link, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._greet(link)
        link, greeting = self._waiting.pop(key)
        return link.detach(), greeting

    def _greet(self, link: socket.socket) -> None:
        """Read who has connected, and close connections of strangers."""
        link.settimeout(10.0)
        try:
            (size,) = _LENGTH.unpack(_read(link, _LENGTH.size))
            head = json.loads(_read(link, min(size, MAX_GREETING_BYTES)))
            known = hmac.compare_digest(head["token"], self._token)
            kind, sender, receiver = head["channel"]
            key = (Channel(kind, sender, receiver), head["topic"])
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            link.close()
            return
        self._waiting[key] = link, head["greeting"]

    def close(self) -> None:
        self._listener.close()
        for link, _ in self._waiting.values():
            link.close()
        self._waiting.clear()


def own_address() -> str:
    """This host's address as the others of the run see it: of the interface towards ``MASTER_ADDR``."""
    master = os.environ.get("MASTER_ADDR", "")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master or socket.gethostname(), 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise TransportError(
            f"this host's own address is not known (MASTER_ADDR={master!r}: {error}): set MASTER_ADDR to the host of "
            "rank 0, as torchrun does"
        ) from error


def _read(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = link.recv(count - len(data))
        if not piece:
            raise OSError("closed")
        data += piece
    return data
