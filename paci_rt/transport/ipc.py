"""GPUs of one host, by copies: the sender writes into the receiver's memory through CUDA's handles for other processes.
Between two GPUs that is the work of copy engines, which leaves all multiprocessors to the computation."""

from __future__ import annotations

import torch
import torch.distributed as dist

from paci_rt.transport.device.backends import Candidate
from paci_rt.transport.device.hardware import find_hardware
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.nccl import CudaHardware
from paci_rt.transport.rendezvous import Meeting, check_group

IPC = Candidate("ipc")


class IpcTransport(DeviceTransport):
    """Stage ``i`` of a pipeline over ``P`` processes is on rank ``i mod P`` of ``group``; all on one host.

    All processes of the group must construct their transports, in the same order; they meet there.

    Args:
        group: any process group, or None for the default group; only its store is used.
        num_stages: stages of the pipeline.
        device: the GPU of this process's stages; several processes may share one.
        chunks: stages a process.
        options: see :class:`~paci_rt.transport.device.pairing.DeviceOptions`.

    Raises:
        ValueError: an argument that cannot work, or ``torch.distributed`` is not initialised.
        TransportError: the core was built without CUDA, or the stages are not on GPUs of one host.
        CudaError: the GPU cannot be used.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_stages: int,
        device: torch.device,
        chunks: int = 1,
        options: DeviceOptions | None = None,
    ) -> None:
        options = options or DeviceOptions()
        check_group(group, num_stages, chunks, "ipc")
        meeting = Meeting(group, options.timeout_s)
        super().__init__(
            "ipc",
            meeting,
            find_hardware(meeting, lambda: CudaHardware(device, "ipc")),
            num_stages=num_stages,
            chunks=chunks,
            candidates=(IPC,),
            options=options,
        )
