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

from paci_rt import native
from paci_rt.errors import NcclError, TransportError
from paci_rt.transport.device.backends import IPC, NCCL, REGISTERED
from paci_rt.transport.device.gpu import CudaHardware, GpuTransport
from paci_rt.transport.device.pairing import DeviceOptions

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


class NcclTransport(GpuTransport):
    """Stages on GPUs that NCCL connects; see ``GpuTransport`` for the other arguments.

    Args:
        register_buffers: stage messages in memory that NCCL's peers reach without copies of NCCL's own (2.23 or later).
        measure: where another way could be faster on this host (copies, registered buffers), measure all once at
            start-up and take the fastest, channel by channel; this is what ``auto`` is.

    Raises:
        TransportError: also where processes share a GPU and NCCL does not allow it, or the environment makes transfers
            wait for each other.
        NcclError: NCCL is absent or too old.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        register_buffers: bool = False,
        measure: bool = False,
        num_stages: int,
        device: torch.device,
        chunks: int = 1,
        placement: str | None = None,
        options: DeviceOptions | None = None,
    ) -> None:
        self._measure = measure
        self.name = "auto" if measure else "nccl"
        self.candidates = (REGISTERED if register_buffers else NCCL,)
        if measure:
            self.candidates = (NCCL, REGISTERED, IPC)
        options = options or DeviceOptions()
        super().__init__(
            group, num_stages=num_stages, device=device, chunks=chunks, placement=placement, options=options
        )
        channels, multiprocessors = 4 * chunks, self._engine.multiprocessors
        if options.max_ctas * channels > multiprocessors // 2:
            most = max(1, multiprocessors // (2 * channels))
            raise TransportError(
                f"max_ctas is {options.max_ctas}, and {channels} channels may wait on the GPU at the same time, which "
                f"has {multiprocessors} multiprocessors: give at most {most}, so that all fit beside the computation"
            )

    def _hardware_of(self, device: torch.device, channels: int) -> CudaHardware:
        hardware = super()._hardware_of(device, channels)
        hardware.nccl = _load(required=not self._measure)
        check_environment(channels, hardware.nccl)
        return hardware


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
