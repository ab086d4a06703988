"""GPUs over NCCL, on one host or several; and the choice between NCCL and copies where both can.

NCCL is neither linked nor bundled: the library that this process has loaded already (torch's) is used, else the one of
the ``nvidia-nccl`` wheel, else the system's. It must be 2.18 or later; what newer ones can do is used where there.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt import native
from paci_rt.errors import NcclError, StageError, TransportError
from paci_rt.transport import wire
from paci_rt.transport.device.backends import Candidate
from paci_rt.transport.device.hardware import find_hardware
from paci_rt.transport.device.pairing import DeviceOptions
from paci_rt.transport.device.transport import DeviceTransport
from paci_rt.transport.rendezvous import Meeting, check_group

NCCL = Candidate("nccl", nccl=True)
REGISTERED = Candidate("nccl", nccl=True, register=True)
LIBRARY = "libnccl.so.2"
DEFAULT_CONNECTIONS = 8
"""Queues between host and device where ``CUDA_DEVICE_MAX_CONNECTIONS`` does not say otherwise (CUDA's manual)."""


def library_candidates() -> list[str]:
    """Where NCCL may be, should this process not have loaded it: the wheel's file, then the system's name for it."""
    found = []
    try:
        spec = find_spec("nvidia.nccl")
    except (ImportError, ValueError):
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        library = Path(folder, "lib", LIBRARY)
        if library.is_file():
            found.append(str(library))
    return [*found, LIBRARY]


def load_nccl() -> Any:
    """NCCL as the native core sees it: ``path version version_text features unique_id() try_communicator()``.

    Raises:
        NcclError: there is none, or it is too old.
        NativeCoreError: the native core is absent.
    """
    return native.core().load_nccl(LIBRARY, library_candidates())


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


class NcclTransport(DeviceTransport):
    """Stage ``i`` of a pipeline over ``P`` processes is on rank ``i mod P`` of ``group``, each on a GPU.

    All processes of the group must construct their transports, in the same order; they meet there.

    Args:
        group: any process group, or None for the default group; only its store is used.
        num_stages: stages of the pipeline.
        device: the GPU of this process's stages.
        chunks: stages a process.
        register_buffers: stage messages in memory that NCCL's peers reach without copies of NCCL's own (2.23 or later).
        measure: where another way could be faster on this host (copies, registered buffers), measure all once at
            start-up and take the fastest, channel by channel; this is what ``auto`` is.
        options: see :class:`~paci_rt.transport.device.pairing.DeviceOptions`.

    Raises:
        ValueError: an argument that cannot work, or ``torch.distributed`` is not initialised.
        TransportError: the core was built without CUDA, a stage is not on a GPU, processes share a GPU where NCCL does
            not allow it, or the environment makes transfers wait for each other.
        NcclError: NCCL is absent or too old.
        CudaError: the GPU cannot be used.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_stages: int,
        device: torch.device,
        chunks: int = 1,
        register_buffers: bool = False,
        measure: bool = False,
        options: DeviceOptions | None = None,
    ) -> None:
        options = options or DeviceOptions()
        name = "auto" if measure else "nccl"
        check_group(group, num_stages, chunks, name)
        meeting = Meeting(group, options.timeout_s)

        def make() -> CudaHardware:
            hardware = CudaHardware(device, name)
            hardware.nccl = _load(required=not measure)
            check_environment(4 * chunks, hardware.nccl)
            return hardware

        super().__init__(
            name,
            meeting,
            find_hardware(meeting, make),
            num_stages=num_stages,
            chunks=chunks,
            candidates=_candidates(register_buffers, measure),
            options=options,
        )
        channels, multiprocessors = 4 * chunks, self._engine.multiprocessors
        if options.max_ctas * channels > multiprocessors // 2:
            most = max(1, multiprocessors // (2 * channels))
            raise TransportError(
                f"max_ctas is {options.max_ctas}, and {channels} channels may wait on the GPU at the same time, which "
                f"has {multiprocessors} multiprocessors: give at most {most}, so that all fit beside the computation"
            )


def _candidates(register_buffers: bool, measure: bool) -> tuple[Candidate, ...]:
    if measure:
        return NCCL, REGISTERED, Candidate("ipc")
    return (REGISTERED if register_buffers else NCCL,)


def _load(required: bool) -> Any:
    try:
        return load_nccl()
    except NcclError:
        if required:
            raise
        return None


def check_environment(channels: int, nccl: Any, environment: Any = None) -> None:
    """Whether streams are as independent as the engine needs them (``csrc/DESIGN.md``).

    Raises:
        TransportError: the environment makes transfers wait for each other.
    """
    environment = os.environ if environment is None else environment
    needed = channels + 2  # the computation and the update have streams of their own
    asked = environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    remedy = "set CUDA_DEVICE_MAX_CONNECTIONS=32 before the process starts"
    if asked.isdigit() and int(asked) < needed:
        raise TransportError(
            f"CUDA_DEVICE_MAX_CONNECTIONS={asked} makes {needed} streams share queues, where a transfer that waits for "
            f"the other side holds up one that the other side waits for: {remedy}"
        )
    if not asked and needed > DEFAULT_CONNECTIONS:
        warnings.warn(
            f"{needed} streams share CUDA's {DEFAULT_CONNECTIONS} queues, so one may hold another up: {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
    version = torch.version.cuda
    ordered = (
        environment.get("NCCL_LAUNCH_ORDER_IMPLICIT") == "1" and nccl is not None and nccl.features["launch_order"]
    )
    if ordered and version is not None and tuple(map(int, version.split(".")[:2])) < (12, 3):
        raise TransportError(
            f"NCCL_LAUNCH_ORDER_IMPLICIT=1 with CUDA {version} lets one transfer of a GPU run at a time, so both "
            "directions of an edge would wait for each other: unset it, or use CUDA 12.3 or later"
        )
