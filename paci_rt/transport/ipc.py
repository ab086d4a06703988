"""GPUs of one host, by copies: the sender writes into the receiver's memory through CUDA's handles for other processes.

Between two GPUs that is the work of copy engines, which leaves all multiprocessors to the computation.
"""

from __future__ import annotations

from paci_rt.transport.device.backends import IPC
from paci_rt.transport.device.gpu import GpuTransport


class IpcTransport(GpuTransport):
    """Stages on GPUs of one host; several may share a GPU. See ``GpuTransport`` for the arguments."""

    name = "ipc"
    candidates = (IPC,)
