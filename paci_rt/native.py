"""The native core as Python sees it, and the only importer of ``paci_rt._C``.

Tensors cross the border as they are, and the core reads where they lie; devices, dtypes and streams are integers.
Importing this module never fails for want of the core: the first use does, with one sentence that says how to build it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paci_rt.errors import NativeCoreError

if TYPE_CHECKING:
    from types import ModuleType

    from paci_rt._C import Accumulator, Copier, Event, ShmIncoming, ShmOutgoing, ShmSegment, Stream, WeightGate
    from paci_rt._C import DeviceIncoming as DeviceIncoming  # for paci_rt.transport.device.transport
    from paci_rt._C import DeviceOutgoing as DeviceOutgoing

_core: ModuleType | None
_import_error: ImportError | None
try:
    from paci_rt import _C as _core
except ImportError as error:
    _core, _import_error = None, error
else:
    _import_error = None

CPU_DEVICE = -1
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_num_threads: int | None = None


def core() -> Any:
    """The module ``paci_rt._C``.

    Raises:
        NativeCoreError: it was not built, or was built for another Python.
    """
    if _core is None:
        raise NativeCoreError(
            f"the native core of paci_rt is not usable ({_import_error}): build it with `pip install -e .` in the "
            "source folder, which needs a C++17 compiler"
        ) from _import_error
    return _core


def testing() -> Any:
    """What only the tests use: a host twin of a GPU's streams, and a fake NCCL on it.

    Raises:
        NativeCoreError: the core was built without them, as wheels are.
    """
    parts = getattr(core(), "_testing", None)
    if parts is None:
        raise NativeCoreError(
            "this build of paci_rt has no host twin and no fake NCCL, which its tests need: "
            "PACI_RT_TESTING=on pip install -e . in the source folder"
        )
    return parts


def info() -> dict[str, Any]:
    """What was built: ``available``, ``error``, ``isa``, ``isas``, ``cuda`` (the CUDA half), ``cuda_runtime`` (its
    version), ``cuda_archs`` (what its device code was compiled for), ``threads``. Asks no driver: whether a GPU can be
    used is :func:`cuda_devices`' to say."""
    if _core is None:
        return {
            "available": False,
            "error": str(_import_error),
            "isa": None,
            "isas": [],
            "cuda": False,
            "cuda_runtime": None,
            "cuda_archs": [],
            "threads": get_num_threads(),
        }
    return {
        "available": True,
        "error": None,
        "isa": _core.isa(),
        "isas": _core.available_isas(),
        "cuda": _core.cuda,
        "cuda_runtime": _version(_core.cuda_runtime_version) if _core.cuda else None,
        "cuda_archs": list(_core.cuda_archs),
        "threads": get_num_threads(),
    }


def _version(number: int) -> str:
    """13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_devices() -> tuple[int, str]:
    """How many GPUs the core can use, and where there are none the reason and the remedy.

    Starts NVIDIA's driver up, which a process should not do before it forks, but creates no context on any device.
    """
    if _core is None:
        return 0, f"the native core is not usable: {_import_error}"
    found: tuple[int, str] = _core.cuda_devices()
    return found


def get_num_threads() -> int:
    """Threads that a native kernel may use: the number set here, else ``torch.get_num_threads()`` of this moment."""
    return _num_threads if _num_threads is not None else torch.get_num_threads()


def set_num_threads(threads: int | None) -> None:
    """Fix the number of threads of the native kernels; None follows ``torch.get_num_threads()`` again.

    Results do not depend on it.

    Raises:
        ValueError: ``threads`` is below 1.
    """
    global _num_threads
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: the native kernels need at least one")
    _num_threads = threads


def set_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels: ``"auto"`` or one of ``info()["isas"]``. Results do not change.

    Raises:
        ValueError: this CPU cannot run it.
    """
    core().select_isa(name)


def dtype_code(dtype: torch.dtype, what: str) -> int:
    """Code of a dtype at the border.

    Raises:
        ValueError: not fp32, bf16 or fp16; ``what`` names the tensor in the message.
    """
    code = DTYPE_CODES.get(dtype)
    if code is None:
        raise ValueError(f"{what} has dtype {dtype}: use torch.float32, torch.bfloat16 or torch.float16")
    return code


def device_code(device: torch.device, what: str) -> int:
    """Integer of a device at the border: -1 for the CPU, else the CUDA ordinal.

    Raises:
        ValueError: another kind of device, or CUDA where the core was built without it.
    """
    if device.type == "cpu":
        return CPU_DEVICE
    if device.type == "cuda" and core().cuda:
        return device.index if device.index is not None else torch.cuda.current_device()
    remedy = ", or build it again with PACI_RT_CUDA=on" if device.type == "cuda" else ""
    raise ValueError(
        f"{what} is on {device}, and this build of paci_rt works on the CPU only: move it to 'cpu'{remedy}"
    )


def stream_handle(stream: Any) -> int:
    """A stream as an integer: an int, anything with ``__cuda_stream__`` (a method or a tuple, version and handle), or a
    stream of torch before 2.10 or CuPy before 14, which have ``cuda_stream`` and ``ptr`` instead. All calls of the core
    take streams in these forms.

    Raises:
        TypeError: ``stream`` is neither.
    """
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is None and isinstance(getattr(stream, "cuda_stream", None), int):
        return int(stream.cuda_stream)
    # CuPy's arrays' memory has a ptr too, but nothing waits for events on it.
    if protocol is None and hasattr(stream, "wait_event") and isinstance(getattr(stream, "ptr", None), int):
        return int(stream.ptr)
    if protocol is None:
        raise TypeError(f"{stream!r} is no stream: pass an integer handle or an object with __cuda_stream__")
    pair = protocol() if callable(protocol) else protocol
    return int(pair[1])


def current_stream(device: torch.device) -> int:
    """Handle of the stream that torch gives its work to on a device; 0 on the CPU."""
    return 0 if device.type == "cpu" else int(torch.cuda.current_stream(device).cuda_stream)


def empty_flat(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat zeroed tensor of ``numel`` elements, aligned to 64 bytes, on large pages where the system has them."""
    tensor = torch.empty(numel, dtype=dtype, device=device)
    if device.type == "cpu":
        # Before the first touch: pages that exist already are not made large.
        core().advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor.zero_()


def make_accumulator(segments: Sequence[tuple[int, int]], numel: int, buffers: Sequence[Tensor]) -> Accumulator:
    """A native accumulator over fp32 tensors of ``numel`` elements, which it keeps alive and at their size."""
    device = device_code(buffers[0].device, "the accumulator")
    accumulator: Accumulator = core().Accumulator(list(segments), numel, list(buffers), device)
    return accumulator


def make_stream(device: torch.device, *, priority: int = 0) -> Stream:
    """A CUDA stream of the core's own, without an implicit order against others; it goes with the object.

    ``torch.cuda.ExternalStream(stream.handle)`` is the same stream for torch. A lower ``priority`` goes first.

    Raises:
        CudaError: no GPU is usable.
        ValueError: ``device`` is no CUDA device, or CUDA has none of this number.
    """
    stream: Stream = core().Stream(device_code(device, "the stream"), priority)
    return stream


def make_event(device: torch.device) -> Event:
    """A CUDA event without timing; raises as :func:`make_stream` does."""
    event: Event = core().Event(device_code(device, "the event"))
    return event


def make_weight_gate(buckets: int, device: torch.device) -> WeightGate:
    """Lets forwards wait for an update bucket by bucket; on the CPU, where nothing needs to wait, it only counts.

    ::

        gate.wait(bucket, stream)        # before a forward or backward reads the bucket's weights on this stream
        gate.claim(update_stream)        # before the update writes any
        gate.publish(bucket, update_stream)  # behind the bucket's update
    """
    gate: WeightGate = core().WeightGate(buckets, device_code(device, "the weights"))
    return gate


def make_shm_segment() -> ShmSegment:
    """Memory for what this process sends to others of its host.

    Raises:
        TransportError: the system has no such memory, or no more of it.
    """
    segment: ShmSegment = core().ShmSegment.create()
    return segment


def attach_shm_segment(pid: int, fd: int, token: int) -> ShmSegment:
    """Another process's segment, by what its own object says of itself; raises as :func:`make_shm_segment` does."""
    segment: ShmSegment = core().ShmSegment.attach(pid, fd, token)
    return segment


def make_copier() -> Copier:
    """A thread that copies large messages for the channels that it is given to."""
    copier: Copier = core().Copier()
    return copier


def make_shm_outgoing(
    channel: tuple[str, int, int], own: ShmSegment, peer: ShmSegment, *, copier: Copier | None = None, **options: Any
) -> ShmOutgoing:
    """Sending end of a channel between the makers of two segments; see ``csrc/p2p/shm_channel.hpp``.

    Args:
        channel: kind, sending and receiving stage.
        own, peer: segments of the two.
        copier: copies large messages; None leaves that to whoever sends.
        options: ``slots``, ``held`` and ``timeout_s``.
    """
    end: ShmOutgoing = core().ShmOutgoing(*channel, own=own, peer=peer, copier=copier, **options)
    return end


def make_shm_incoming(channel: tuple[str, int, int], peer: ShmSegment, *, slots: int, timeout_s: float) -> ShmIncoming:
    """Receiving end of a channel whose sender made ``peer``."""
    end: ShmIncoming = core().ShmIncoming(*channel, peer=peer, slots=slots, timeout_s=timeout_s)
    return end


def shm_memory_limit() -> tuple[int, str]:
    """Bytes that can still be allocated for messages, and the name of the limit that says so."""
    limit: tuple[int, str] = core().shm_memory_limit()
    return limit
