"""A GPU of this process, and what the transports of GPUs have in common when they start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt import native
from paci_rt.errors import StageError, TransportError
from paci_rt.schedules import Placement
from paci_rt.transport import wire
from paci_rt.transport.device.backends import Candidate
from paci_rt.transport.device.hardware import find_hardware
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.rendezvous import Meeting, check_group


class CudaHardware:
    """A GPU of this process.

    Raises:
        TransportError: ``device`` is none, torch cannot use it, or the core was built without CUDA.
    """

    ops = None

    def __init__(self, device: torch.device, transport: str) -> None:
        if device.type != "cuda":
            raise TransportError(
                f"the {transport} transport is for stages on GPUs, and this one is on {device}: use transport 'shm' or "
                "'gloo', or put the stage on 'cuda'"
            )
        if not native.core().cuda:
            raise TransportError(
                f"the {transport} transport needs the CUDA half of paci_rt's native core, which was built without it: "
                "PACI_RT_CUDA=on pip install -e . in the source folder, where the CUDA toolkit is"
            )
        if not torch.cuda.is_available():
            raise TransportError(
                f"the {transport} transport needs a GPU that torch can use, and torch {torch.__version__} sees none: "
                "`paci-rt doctor` says what is missing"
            )
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self.index)
        self.nccl: Any = None
        self.identity = str(torch.cuda.get_device_properties(self.device).uuid)

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def empty(self, meta: wire.TensorMeta) -> Tensor:
        return torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    def check(self, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise StageError(
                f"a tensor on {tensor.device} cannot travel from a stage on {self.device}: move it there first"
            )


class GpuTransport(DeviceTransport):
    """Stages on the ranks of ``group`` that their placement says, each on a GPU.

    All processes of the group must construct their transports, in the same order; they meet there.

    Args:
        group: any process group, or None for the default group; only its store is used.
        num_stages: stages of the pipeline.
        device: the GPU of this process's stages.
        chunks: stages per process.
        placement: which of them, see :class:`paci_rt.schedules.Placement`.
        options: see :class:`~paci_rt.transport.device.pairing.DeviceOptions`.

    Raises:
        ValueError: an argument that cannot work, or ``torch.distributed`` is not initialised.
        TransportError: the core was built without CUDA, or the stages are not on GPUs that can reach each other.
        CudaError: the GPU cannot be used.
    """

    name: str
    candidates: Sequence[Candidate]

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_stages: int,
        device: torch.device,
        chunks: int = 1,
        placement: str | None = None,
        options: DeviceOptions | None = None,
    ) -> None:
        options = options or DeviceOptions()
        check_group(group, num_stages, chunks, self.name)
        meeting = Meeting(group, options.timeout_s)
        hardware = find_hardware(meeting, lambda: self._hardware_of(device, 4 * chunks))
        places = Placement(num_stages=num_stages, chunks=chunks, name=placement)
        super().__init__(self.name, meeting, hardware, candidates=self.candidates, options=options, places=places)

    def _hardware_of(self, device: torch.device, channels: int) -> CudaHardware:
        """The hardware behind ``device``, which ``channels`` channels are to share."""
        return CudaHardware(device, self.name)
