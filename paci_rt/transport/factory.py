"""The one place where a transport's name becomes a transport."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from paci_rt.errors import TransportError
from paci_rt.transport.base import DEFAULT_TIMEOUT_S, Transport, check_timeout
from paci_rt.transport.local import LocalTransport
from paci_rt.wording import unknown

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from paci_rt.transport.rendezvous import Meeting

TRANSPORTS = ("auto", "local", "gloo", "shm", "nccl", "ipc")
ON_GPUS = ("nccl", "ipc")


def check_transport(name: str, option: str = "transport") -> None:
    """Raise ValueError, with ``option`` as its name, unless there is such a transport.

    Args:
        name: one of ``TRANSPORTS``.
        option: what the message calls it.

    Raises:
        ValueError: there is no such transport; the message suggests the nearest.

    Example:
        >>> from paci_rt.transport import check_transport
        >>> check_transport("gloo")
        >>> check_transport("glooo", option="--transport")
        Traceback (most recent call last):
        ValueError: unknown --transport 'glooo': did you mean 'gloo'? choose from auto, local, gloo, ...
    """
    if name not in TRANSPORTS:
        raise unknown(option, name, TRANSPORTS)


def make_transport(
    name: str = "auto",
    *,
    group: dist.ProcessGroup | None = None,
    num_stages: int,
    chunks: int = 1,
    placement: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    slots: int | None = None,
    events_dir: str | os.PathLike[str] | None = None,
    device: torch.device | None = None,
) -> Transport:
    """The transport called ``name`` for a pipeline of which this process has ``chunks`` of ``num_stages`` stages.

    A process with all stages gets ``local``. ``auto`` is ``shm`` where all processes are on one host that allows it,
    else ``gloo``; for stages on GPUs ``nccl`` or, channel by channel, ``ipc`` where that was measured to be faster.
    All processes of ``group`` must call this, in the same order and with the same name.

    Args:
        name: one of ``TRANSPORTS``.
        num_stages: stages of the whole pipeline.
        chunks: stages of this process.
        placement: which: see :class:`paci_rt.schedules.Placement`; a schedule's is ``get(name).placement``.
        group: process group of the pipeline's processes, None for the default group.
        timeout_s: deadline of every single wait for another stage, in seconds.
        slots: messages that fit into a channel before its next send waits; None is the transport's default.
        events_dir: folder for each channel's last events, written when a wait ends badly; None is the system's for
            temporary files, empty writes none.
        device: where the stages of this process are; None is the CPU.

    Raises:
        ValueError: an unknown name, another argument that cannot work, or no ``torch.distributed``.
        TransportError: the transport cannot work here, or the processes ask for different ones; of NCCL, an NcclError.

    Example:
        >>> paci_rt.transport.make_transport("auto", num_stages=1).name  # a process that has all stages
        'local'
        >>> paci_rt.transport.make_transport("local", num_stages=2)
        Traceback (most recent call last):
        ValueError: transport 'local' is for all stages in one process, and this process has 1 of 2: ...
    """
    check_transport(name)
    check_timeout(timeout_s, "transfer_timeout_s")
    if chunks == num_stages:
        return LocalTransport(capacity=slots)
    _check_between_processes(name, slots, num_stages, chunks)
    from paci_rt.transport.rendezvous import Meeting, check_group  # imports torch.distributed

    check_group(group, num_stages, chunks, name)
    on_gpus = device is not None and device.type == "cuda"
    one_host = _agree(Meeting(group, timeout_s), name, on_gpus)
    place, options = _Place(group, num_stages, chunks, placement), _Options(timeout_s, slots, events_dir)
    if name in ON_GPUS or (name == "auto" and on_gpus):
        return _between_gpus(name, place, device, options)
    if name == "shm":
        return _shm(place, options)
    if name == "auto" and one_host:
        try:
            return _shm(place, options)
        except TransportError as error:  # the same on all processes
            warnings.warn(f"transport 'auto' takes gloo: {error}", RuntimeWarning, stacklevel=2)
    return _gloo(place, options)


def _check_between_processes(name: str, slots: int | None, num_stages: int, chunks: int) -> None:
    if name == "local":
        raise ValueError(
            f"transport 'local' is for all stages in one process, and this process has {chunks} of {num_stages}: use "
            "paci_rt.LocalPipeline, or transport 'auto'"
        )
    if name == "gloo" and slots is not None:
        raise ValueError(f"slots is {slots}, and gloo's channels have no limit: leave it out, or use transport 'shm'")


class _Place(NamedTuple):
    """Which stages are where; the arguments that all transports between processes take."""

    group: dist.ProcessGroup | None
    num_stages: int
    chunks: int
    placement: str | None


class _Options(NamedTuple):
    """What users may choose; ``slots`` and ``events_dir`` are None for the transport's default."""

    timeout_s: float
    slots: int | None
    events_dir: str | os.PathLike[str] | None

    def given(self) -> dict[str, Any]:
        """The options that are not left to the transport."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def _gloo(place: _Place, options: _Options) -> Transport:
    from paci_rt.transport.gloo import GlooTransport

    return GlooTransport(**place._asdict(), timeout_s=options.timeout_s, events_dir=options.events_dir)


def _shm(place: _Place, options: _Options) -> Transport:
    from paci_rt.transport.shm import ShmTransport

    return ShmTransport(**place._asdict(), **options.given())


def _between_gpus(name: str, place: _Place, device: torch.device | None, options: _Options) -> Transport:
    import torch

    from paci_rt.transport.device.pairing import DeviceOptions
    from paci_rt.transport.ipc import IpcTransport
    from paci_rt.transport.nccl import NcclTransport

    where = {**place._asdict(), "device": torch.device("cpu") if device is None else device}
    chosen = DeviceOptions(**options.given())
    if name == "ipc":
        return IpcTransport(**where, options=chosen)
    return NcclTransport(**where, measure=name == "auto", options=chosen)


def _agree(meeting: Meeting, name: str, on_gpus: bool) -> bool:
    """Make sure that all processes ask for the same transport; whether they are on one host."""
    from paci_rt.transport.rendezvous import host_identity, hosts_by_name

    told = meeting.exchange("transport", {"name": name, "gpu": on_gpus, "host": host_identity()})
    names = [member["name"] for member in told]
    if len(set(names)) > 1:
        asked = ", ".join(f"rank {rank} {asked!r}" for rank, asked in enumerate(names))
        raise TransportError(f"the processes ask for different transports ({asked}): give all the same")
    places = [member["gpu"] for member in told]
    if len(set(places)) > 1:
        where = ", ".join(f"rank {rank} {'a GPU' if gpu else 'the CPU'}" for rank, gpu in enumerate(places))
        raise TransportError(f"some stages are on GPUs and some are not ({where}): put all on 'cuda' or all on 'cpu'")
    return len(hosts_by_name([member["host"] for member in told])) == 1
