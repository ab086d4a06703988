"""Where a run computes: what ``--device`` may say, and which device each process gets."""

from __future__ import annotations

import os
import re

import torch

from paci_rt import native
from paci_rt.errors import TritonMissingError
from paci_rt.optim.backend import usable
from paci_rt.wording import shown

CPU_TRANSPORTS = ("gloo", "shm")
"""Transports whose messages lie in the CPU's memory."""


def resolve(device: str, transport: str, stages: int) -> tuple[str, str]:
    """Device and transport with ``auto`` replaced where it depends on GPUs.

    Raises:
        ValueError: what cannot work here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and native.cuda_devices()[0] > 0 else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", device):
        name = device if device.isprintable() and len(device) < 40 else shown(device)
        raise ValueError(f"--device {name}: give cpu, cuda, cuda:N or auto")
    if device == "cpu":
        return device, transport
    try:
        usable(torch.device(device))
    except (ValueError, TritonMissingError) as error:
        raise ValueError(f"--device {device}: {error}; or use --device cpu") from None
    if transport == "auto" and (stages == 1 or ":" in device or torch.cuda.device_count() == 1):
        transport = "local"
    if transport in CPU_TRANSPORTS:
        raise ValueError(
            f"--transport {transport} carries messages between CPUs: with --device {device} use "
            "--transport nccl or ipc, one GPU per stage, or local, which runs all stages on one"
        )
    return device, transport


def of_process(device: str, rank: int) -> torch.device:
    """Where the stages of a process run: ``cuda`` is one GPU of the host for each."""
    if device != "cuda":
        return torch.device(device)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return torch.device("cuda", local_rank % torch.cuda.device_count())
