"""How the two ends of a channel between devices come to agree on what moves its bytes, and get connected."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paci_rt import native
from paci_rt.errors import PaciError, TransportError
from paci_rt.schedules import Placement
from paci_rt.schedules.channel import Channel
from paci_rt.transport.base import DEFAULT_TIMEOUT_S, check_slots, check_timeout
from paci_rt.transport.device.backends import Candidate, Measured, choose
from paci_rt.transport.device.hardware import Gathering, Hardware
from paci_rt.transport.device.probe import receive_probe, send_probe
from paci_rt.transport.device.sockets import Switchboard
from paci_rt.transport.rendezvous import host_identity, hosts_by_name

SLOTS = 4
"""Messages of a channel that may have been issued and not taken. Each slot grows to the largest message it has held."""
MAX_CTAS = 4
"""Thread blocks that NCCL may use for a transfer: what a compute kernel cannot have meanwhile."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What users choose.

    Attributes:
        timeout_s: deadline of every single wait, in seconds.
        slots: see ``SLOTS``.
        max_ctas: see ``MAX_CTAS``; 0 leaves it to NCCL.
        priority: of the channels' streams; lower numbers go first, and -1 is before torch's default.
        events_dir: folder for the last events of every channel, written when a wait ends badly; None is the system's
            folder for temporary files.
    """

    timeout_s: float = DEFAULT_TIMEOUT_S
    slots: int = SLOTS
    max_ctas: int = MAX_CTAS
    priority: int = -1
    events_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_slots(self.slots)
        check_timeout(self.timeout_s)
        if not isinstance(self.max_ctas, int) or not 0 <= self.max_ctas <= 64:
            raise ValueError(f"max_ctas is {self.max_ctas!r}: give 1 to 64 thread blocks, or 0 to leave it to NCCL")


class Pairing:
    """This process's side of all connections.

    The sender of a channel decides and tells the receiver in its greeting: ``backend``, ``register`` (buffers with
    NCCL), ``unique_id`` (of the communicator, in hexadecimal), ``measured``.

    Args:
        gathering: all processes of the pipeline, which meet here.
        places: which stages are where; None is one a process.
        candidates: what may move the bytes, in order of preference; where several can, they are measured.
    """

    def __init__(
        self,
        gathering: Gathering,
        hardware: Hardware,
        *,
        candidates: Sequence[Candidate],
        options: DeviceOptions,
        places: Placement | None = None,
    ) -> None:
        self.rank = gathering.rank
        self._places = Placement(num_stages=gathering.size) if places is None else places
        self._hardware, self._options = hardware, options
        self._candidates = tuple(candidates)
        hosts = gathering.exchange("host", host_identity())
        one_host = len(hosts_by_name(hosts)) == 1
        self._switchboard = Switchboard(one_host=one_host, timeout_s=max(60.0, options.timeout_s))
        facts = {
            "host": [hosts[self.rank]["boot"], hosts[self.rank]["pids"]],
            "process": os.getpid(),
            "device": hardware.identity,
            "nccl": 0 if hardware.nccl is None else hardware.nccl.version,
            "shares_gpus": os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1",
            "address": self._switchboard.address,
        }
        self._facts = gathering.exchange("device", facts)

    def make_engine(self) -> Any:
        """A native engine for this process's device."""
        options, hardware = self._options, self._hardware
        return native.core().DeviceEngine(hardware.index, self.rank, options.slots, options.timeout_s, hardware.ops)

    def rank_of(self, stage: int) -> int:
        rank: int = self._places.rank_of(stage)
        return rank

    def within(self, channel: Channel) -> bool:
        """Whether both ends are here."""
        return self.rank_of(channel.sender) == self.rank_of(channel.receiver)

    def greeting_within(self) -> dict[str, Any]:
        """For a channel between two stages of this process."""
        by_nccl = any(one.nccl for one in self._candidates) and self._hardware.nccl is not None
        return self._greeting(Candidate("self-nccl", nccl=True) if by_nccl else Candidate("self-copy"), [])

    def prepare(self, channel: Channel) -> dict[str, Any]:
        """Measure where there is a choice, which takes both ends. Returns the greeting on the side of the sender.

        Raises:
            TransportError: nothing moves bytes between the two processes; the message has the remedies.
        """
        sender, receiver = (self._facts[self.rank_of(stage)] for stage in (channel.sender, channel.receiver))
        obstacles = [one.obstacle(sender, receiver) for one in self._candidates]
        possible = [one for one, obstacle in zip(self._candidates, obstacles, strict=True) if not obstacle]
        if not possible:
            raise TransportError(f"channel {channel.name}: " + "; ".join(obstacles))
        measured = [self._measure(channel, one) for one in possible] if len(possible) > 1 else []
        if self.rank_of(channel.sender) != self.rank:
            return {}
        return self._greeting(choose(possible, measured, channel), measured)

    def _greeting(self, candidate: Candidate, measured: Sequence[Measured]) -> dict[str, Any]:
        return {
            "backend": candidate.backend,
            "register": candidate.register,
            "unique_id": self._hardware.nccl.unique_id().hex() if candidate.nccl else "",
            "measured": [list(one) for one in measured],
        }

    def _measure(self, channel: Channel, candidate: Candidate) -> Measured:
        """Times of one candidate over an engine of its own, which both ends make and end."""
        engine, topic = self.make_engine(), f"probe {candidate.name}"
        try:
            if self.rank_of(channel.sender) == self.rank:
                end = self.add_outgoing(engine, channel, self._greeting(candidate, []), topic)
                engine.connect()
                return send_probe(candidate, end, self._hardware)
            end, _ = self.add_incoming(engine, channel, topic)
            engine.connect()
            return receive_probe(candidate, end, self._hardware)
        except PaciError as error:
            return Measured(candidate.name, None, None, str(error).splitlines()[0])
        finally:
            engine.close()

    def add_outgoing(self, engine: Any, channel: Channel, greeting: dict[str, Any], topic: str = "data") -> Any:
        """Connect to the receiver and add the sending end to ``engine``."""
        address = self._facts[self.rank_of(channel.receiver)]["address"]
        fd = self._switchboard.connect(address, channel, topic, greeting)
        return engine.add_outgoing(**self.lane(channel, fd, greeting))

    def add_incoming(self, engine: Any, channel: Channel, topic: str = "data") -> tuple[Any, dict[str, Any]]:
        """Wait for the sender to connect and add the receiving end to ``engine``; the end and the greeting."""
        fd, greeting = self._switchboard.accept(channel, topic)
        return engine.add_incoming(**self.lane(channel, fd, greeting)), greeting

    def lane(self, channel: Channel, fd: int, greeting: dict[str, Any]) -> dict[str, Any]:
        """What the native engine has to know of a channel's end."""
        return {
            **channel._asdict(),
            "fd": fd,
            "backend": greeting["backend"],
            "nccl": self._hardware.nccl,
            "unique_id": bytes.fromhex(greeting["unique_id"]),
            "max_ctas": self._options.max_ctas,
            "register_buffers": greeting["register"],
            "priority": self._options.priority,
        }

    def close(self) -> None:
        self._switchboard.close()
