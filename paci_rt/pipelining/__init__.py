"""The schedules, with the interface of ``torch.distributed.pipelining``, and all stages in one process."""

from __future__ import annotations

from paci_rt.pipelining.base import PipelineScheduleMulti, PipelineScheduleSingle, register_with_torch
from paci_rt.pipelining.in_a_v import (
    ScheduleDualPipeV,
    SchedulePACIV,
    ScheduleVHalf,
    ScheduleVMin,
    ScheduleZBVZeroBubble,
)
from paci_rt.pipelining.local import LocalPipeline
from paci_rt.pipelining.schedules import (
    Schedule1F1B,
    ScheduleAsync1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    SchedulePACI,
    SchedulePACISplit,
    SchedulePipeDream,
    SchedulePipeDream2BW,
    ScheduleZB1P,
    ScheduleZB2P,
    ScheduleZBH1,
    ScheduleZBH2,
    _PipelineScheduleRuntime,
    _ScheduleForwardOnly,
    get_schedule_class,
)

__all__ = [
    "LocalPipeline",
    "PipelineScheduleMulti",
    "PipelineScheduleSingle",
    "Schedule1F1B",
    "ScheduleAsync1F1B",
    "ScheduleDualPipeV",
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
    "_PipelineScheduleRuntime",
    "_ScheduleForwardOnly",
    "get_schedule_class",
    "register_with_torch",
]
