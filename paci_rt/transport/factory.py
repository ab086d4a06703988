"""The one place where a transport's name becomes a transport."""

from __future__ import annotations

import difflib
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

from paci_rt.errors import TransportError
from paci_rt.transport.base import DEFAULT_TIMEOUT_S, Transport
from paci_rt.transport.local import LocalTransport

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
        >>> check_transport("gluu", option="--transport")
        Traceback (most recent call last):
        ValueError: unknown --transport 'gluu': did you mean 'gloo'? choose from auto, local, gloo, ...
    """
    if name not in TRANSPORTS:
        near = difflib.get_close_matches(str(name), TRANSPORTS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {option} {name!r}: {hint}choose from {', '.join(TRANSPORTS)}")


def make_transport(
    name: str = "auto",
    *,
    group: dist.ProcessGroup | None = None,
    num_stages: int,
    chunks: int = 1,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    slots: int | None = None,
    events_dir: str | os.PathLike[str] | None = None,
    device: torch.device | None = None,
) -> Transport:
    """The transport called ``name`` for a pipeline of which this process has ``chunks`` of ``num_stages`` stages.

    A process with all stages has nobody to talk to and gets ``local``, whatever the name. ``auto`` is ``shm`` where
    all processes are on one host that allows it, else ``gloo``; for stages on GPUs it is ``nccl`` or, channel by
    channel, ``ipc`` where that was measured to be faster. All processes of ``group`` must call this, in the same
    order and with the same name.

    Args:
        name: one of ``TRANSPORTS``.
        num_stages: stages of the whole pipeline.
        chunks: stages of this process.
        group: process group of the pipeline's processes, None for the default group.
        timeout_s: deadline of every single wait for another stage, in seconds.
        slots: messages that fit into a channel before its next send waits; None is the transport's default.
        events_dir: folder for the last events of every channel, written when a wait ends badly; None is the system's
            folder for temporary files.
        device: where the stages of this process are; None is the CPU.

    Raises:
        ValueError: an unknown name, another argument that cannot work, or no ``torch.distributed``.
        TransportError: the transport cannot work here, or the processes ask for different ones.
        NcclError: ``nccl`` without an NCCL that works.

    Example:
        >>> from paci_rt.transport import make_transport
        >>> make_transport("auto", num_stages=1).name  # a process that has all stages
        'local'
        >>> make_transport("local", num_stages=2)
        Traceback (most recent call last):
        ValueError: transport 'local' is for all stages in one process, and this process has 1 of 2: ...
    """
    check_transport(name)
    if not timeout_s > 0:
        raise ValueError(f"transfer_timeout_s is {timeout_s!r}: give a number of seconds above 0")
    if chunks == num_stages:
        return LocalTransport(capacity=slots)
    if name == "local":
        raise ValueError(
            f"transport 'local' is for all stages in one process, and this process has {chunks} of {num_stages}: use "
            "paci_rt.LocalPipeline, or transport 'auto'"
        )
    if name == "gloo" and slots is not None:
        raise ValueError(f"slots is {slots}, and gloo's channels have no limit: leave it out, or use transport 'shm'")
    from paci_rt.transport.gloo import GlooTransport  # imports torch.distributed
    from paci_rt.transport.rendezvous import Meeting, check_group
    from paci_rt.transport.shm import SLOTS, ShmTransport

    check_group(group, num_stages, chunks, name)
    on_gpus = device is not None and device.type == "cuda"
    one_host = _agree(Meeting(group, timeout_s), name, on_gpus)
    if name in ON_GPUS or (name == "auto" and on_gpus):
        return _on_gpus(name, group, num_stages, chunks, device, DeviceSettings(timeout_s, slots, events_dir))
    if name == "shm" or (name == "auto" and one_host):
        try:
            return ShmTransport(
                group,
                num_stages=num_stages,
                chunks=chunks,
                timeout_s=timeout_s,
                slots=SLOTS if slots is None else slots,
                events_dir=events_dir,
            )
        except TransportError as error:  # the same on all processes
            if name == "shm":
                raise
            warnings.warn(f"transport 'auto' takes gloo: {error}", RuntimeWarning, stacklevel=2)
    return GlooTransport(group, num_stages=num_stages, chunks=chunks, timeout_s=timeout_s)


class DeviceSettings(NamedTuple):
    """What transports for GPUs are told beside what all are; None is their default."""

    timeout_s: float
    slots: int | None
    events_dir: str | os.PathLike[str] | None


def _on_gpus(
    name: str,
    group: dist.ProcessGroup | None,
    num_stages: int,
    chunks: int,
    device: torch.device | None,
    settings: DeviceSettings,
) -> Transport:
    import torch

    from paci_rt.transport.device.pairing import SLOTS, DeviceOptions
    from paci_rt.transport.ipc import IpcTransport
    from paci_rt.transport.nccl import NcclTransport

    timeout_s, slots, events_dir = settings
    options = DeviceOptions(timeout_s=timeout_s, slots=SLOTS if slots is None else slots, events_dir=events_dir)
    here = torch.device("cpu") if device is None else device
    if name == "ipc":
        return IpcTransport(group, num_stages=num_stages, chunks=chunks, device=here, options=options)
    measure = name == "auto"
    return NcclTransport(group, num_stages=num_stages, chunks=chunks, device=here, measure=measure, options=options)


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
