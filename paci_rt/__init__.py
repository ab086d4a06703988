"""Bubble-free pipeline-parallel training on stock PyTorch.

Importing this package touches no GPU, no NCCL and no environment variable.

Examples in docstrings begin after ``import torch``, ``from torch import nn`` and ``import paci_rt``. Those of
:mod:`paci_rt.kernels` also have a CUDA ``device``. The tests run them, interpreting kernels on the CPU.
"""

from __future__ import annotations

from paci_rt.check import CutReport, check_against
from paci_rt.errors import (
    AccumulatorStateError,
    ActionError,
    DriftBoundError,
    NativeCoreError,
    OptimizerOwnedError,
    PaciError,
    ParityError,
    PeerLostError,
    ScheduleError,
    StageError,
    StageFailed,
    TransferTimeoutError,
    TransportError,
    TritonMissingError,
)
from paci_rt.local_pipeline import LocalPipeline
from paci_rt.optim import SGD, AdamW, Lion, Muon, NAdam
from paci_rt.pipelining import (
    Schedule1F1B,
    ScheduleAsync1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    SchedulePACI,
    SchedulePACISplit,
    SchedulePipeDream,
    SchedulePipeDream2BW,
    ScheduleZB1P,
    ScheduleZB2P,
    ScheduleZBH1,
    ScheduleZBH2,
    get_schedule_class,
)
from paci_rt.runtime.stage import PipelineStage
from paci_rt.runtime.state_dict import params_sha256
from paci_rt.schedules import FAMILIES, StepCosts, plan_slack
from paci_rt.schedules.lowering import TiedWeight

__version__ = "0.1.0"

SCHEDULES = tuple(FAMILIES)
"""Names of all schedules."""

__all__ = [
    "SCHEDULES",
    "SGD",
    "AccumulatorStateError",
    "ActionError",
    "AdamW",
    "CutReport",
    "DriftBoundError",
    "Lion",
    "LocalPipeline",
    "Muon",
    "NAdam",
    "NativeCoreError",
    "OptimizerOwnedError",
    "PaciError",
    "ParityError",
    "PeerLostError",
    "PipelineStage",
    "Schedule1F1B",
    "ScheduleAsync1F1B",
    "ScheduleError",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "SchedulePACI",
    "SchedulePACISplit",
    "SchedulePipeDream",
    "SchedulePipeDream2BW",
    "ScheduleZB1P",
    "ScheduleZB2P",
    "ScheduleZBH1",
    "ScheduleZBH2",
    "StageError",
    "StageFailed",
    "StepCosts",
    "TiedWeight",
    "TransferTimeoutError",
    "TransportError",
    "TritonMissingError",
    "check_against",
    "get_schedule_class",
    "params_sha256",
    "plan_slack",
]
