"""Bubble-free pipeline-parallel training on stock PyTorch.

Importing this package touches no GPU, no NCCL and no environment variable.

Examples in docstrings begin after ``import torch``, ``from torch import nn`` and ``import paci_rt``. Those of
:mod:`paci_rt.kernels` also have a CUDA ``device``. The tests run them, interpreting kernels on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paci_rt import hf
from paci_rt.check import CutReport, check_against
from paci_rt.errors import (
    AccumulatorStateError,
    ActionError,
    CheckpointError,
    CheckpointWriteError,
    DisagreementError,
    DriftBoundError,
    NativeCoreError,
    NonFiniteError,
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
from paci_rt.optim import SGD, AdamW, Lion, Muon, NAdam
from paci_rt.pipelining import (
    LocalPipeline,
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleAsync1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    SchedulePACI,
    SchedulePACISplit,
    SchedulePACIV,
    SchedulePipeDream,
    SchedulePipeDream2BW,
    ScheduleVHalf,
    ScheduleVMin,
    ScheduleZB1P,
    ScheduleZB2P,
    ScheduleZBH1,
    ScheduleZBH2,
    ScheduleZBVZeroBubble,
    get_schedule_class,
    register_with_torch,
)
from paci_rt.runtime.loss_scale import LossScaler
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
    "CheckpointError",
    "CheckpointWriteError",
    "CutReport",
    "DisagreementError",
    "DriftBoundError",
    "Lion",
    "LocalPipeline",
    "LossScaler",
    "Muon",
    "NAdam",
    "NativeCoreError",
    "NonFiniteError",
    "OptimizerOwnedError",
    "PaciError",
    "ParityError",
    "PeerLostError",
    "PipelineScheduleMulti",
    "PipelineScheduleSingle",
    "PipelineStage",
    "Schedule1F1B",
    "ScheduleAsync1F1B",
    "ScheduleDualPipeV",
    "ScheduleError",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "SchedulePACI",
    "SchedulePACISplit",
    "SchedulePACIV",
    "SchedulePipeDream",
    "SchedulePipeDream2BW",
    "ScheduleVHalf",
    "ScheduleVMin",
    "ScheduleZB1P",
    "ScheduleZB2P",
    "ScheduleZBH1",
    "ScheduleZBH2",
    "ScheduleZBVZeroBubble",
    "StageError",
    "StageFailed",
    "StepCosts",
    "TiedWeight",
    "TransferTimeoutError",
    "TransportError",
    "TritonMissingError",
    "check_against",
    "get_schedule_class",
    "hf",
    "params_sha256",
    "plan_slack",
]

_ELSEWHERE = {
    **dict.fromkeys(("Pipe", "SplitPoint", "pipe_split", "pipeline"), "torch.distributed.pipelining"),
    **dict.fromkeys(("TensorChunkSpec", "sum_reducer"), "torch.distributed.pipelining.microbatch"),
    "_ScheduleForwardOnly": "paci_rt.pipelining",
}
"""Names that code for ``torch.distributed.pipelining`` imports from there, and that are torch's own here too."""

if TYPE_CHECKING:
    from torch.distributed.pipelining import Pipe as Pipe
    from torch.distributed.pipelining import SplitPoint as SplitPoint
    from torch.distributed.pipelining import pipe_split as pipe_split
    from torch.distributed.pipelining import pipeline as pipeline
    from torch.distributed.pipelining.microbatch import TensorChunkSpec as TensorChunkSpec
    from torch.distributed.pipelining.microbatch import sum_reducer as sum_reducer
else:

    def __getattr__(name: str) -> Any:
        """Torch's own frontend and chunk specs, imported where somebody asks for them: that takes seconds."""
        if name not in _ELSEWHERE:
            raise AttributeError(f"module 'paci_rt' has no attribute {name!r}")
        import importlib

        found = getattr(importlib.import_module(_ELSEWHERE[name]), name)
        register_with_torch()
        return found
