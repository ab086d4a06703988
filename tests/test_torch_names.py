"""Torch's names, constructors and class relations."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import paci_rt
from paci_rt.schedules import FAMILIES


def positional(function: Any) -> list[tuple[str, Any]]:
    """Names and defaults of what may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.default) for one in parameters if one.kind in kinds]


def test_constructors_take_what_torchs_take_in_its_order() -> None:
    from torch.distributed import pipelining

    names = "1F1B GPipe Interleaved1F1B LoopedBFS InterleavedZeroBubble ZBVZeroBubble DualPipeV"
    for name in (f"Schedule{name}" for name in names.split()):
        assert positional(getattr(paci_rt, name)) == positional(getattr(pipelining, name))
    ours, theirs = positional(paci_rt.PipelineStage), positional(pipelining.PipelineStage)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert ours[4:] == theirs[4:] and ours[3] == ("device", "cpu")  # torch's device has no default
    theirs_step = inspect.signature(pipelining.Schedule1F1B.step).parameters
    assert list(inspect.signature(paci_rt.Schedule1F1B.step).parameters) == list(theirs_step)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("1F1B", "Schedule1F1B"),
        ("GPipe", "ScheduleGPipe"),
        ("Interleaved1F1B", "ScheduleInterleaved1F1B"),
        ("interleaved1f1b", "ScheduleInterleaved1F1B"),
        ("INTERLEAVED-1F1B", "ScheduleInterleaved1F1B"),
        ("LoopedBFS", "ScheduleLoopedBFS"),
        ("looped-bfs", "ScheduleLoopedBFS"),
        ("InterleavedZeroBubble", "ScheduleInterleavedZeroBubble"),
        ("interleaved-zb", "ScheduleInterleavedZeroBubble"),
        ("ZBVZeroBubble", "ScheduleZBVZeroBubble"),
        ("ScheduleZBVZeroBubble", "ScheduleZBVZeroBubble"),
        ("zb-v", "ScheduleZBVZeroBubble"),
        ("DualPipeV", "ScheduleDualPipeV"),
        ("ScheduleDualPipeV", "ScheduleDualPipeV"),
        ("DualPipe-V", "ScheduleDualPipeV"),
        ("Schedule1F1B", "Schedule1F1B"),
        ("v-half", "ScheduleVHalf"),
        ("PipelineScheduleSingle", "PipelineScheduleSingle"),
        ("PipelineScheduleMulti", "PipelineScheduleMulti"),
        ("paci", "SchedulePACI"),
        ("ZB-1P", "ScheduleZB1P"),
    ],
)
def test_names_resolve_in_any_case(name: str, ours: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        assert paci_rt.get_schedule_class(spelled).__name__ == ours
    assert paci_rt.get_schedule_class(schedule_name=name) is getattr(paci_rt, ours)


def test_every_schedule_is_single_or_multi_for_us_and_for_torch() -> None:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    for name in paci_rt.SCHEDULES:
        cls = paci_rt.get_schedule_class(name)
        several = FAMILIES[name].placement != "line"
        assert issubclass(cls, paci_rt.PipelineScheduleMulti) is issubclass(cls, PipelineScheduleMulti) is several
        assert issubclass(cls, paci_rt.PipelineScheduleSingle) is issubclass(cls, PipelineScheduleSingle) is not several
    stage = paci_rt.PipelineStage(nn.Linear(2, 2), 0, 1)
    schedule = paci_rt.Schedule1F1B(stage=stage, n_microbatches=2)
    assert isinstance(schedule, PipelineScheduleSingle) and isinstance(stage, PipelineStage)
    assert not isinstance(schedule, PipelineScheduleMulti)
    stages = [paci_rt.PipelineStage(nn.Linear(2, 2), at, 2) for at in range(2)]
    looped = paci_rt.ScheduleInterleaved1F1B(stages=stages, n_microbatches=2, defer_pp_recv=True)
    assert isinstance(looped, PipelineScheduleMulti) and looped._stages == stages
    assert (looped._num_stages, looped.pp_group_size, looped.rank, looped._n_microbatches) == (2, 1, 0, 2)
    for base in (paci_rt.PipelineScheduleSingle, paci_rt.PipelineScheduleMulti):
        with pytest.raises(TypeError, match=f"{base.__name__} is a base class"):
            base(stage, 2)


SCRIPT = """
import sys
import paci_rt
heavy = ("torch.distributed.pipelining", "torch.distributed.tensor", "torch.nn.attention.flex_attention")
assert not any(name in sys.modules for name in heavy), [name for name in heavy if name in sys.modules]
import torch
pipe = paci_rt.LocalPipeline([torch.nn.Linear(2, 2)], schedule="1f1b", n_microbatches=2)
pipe.step(torch.ones(4, 2))
assert not any(name in sys.modules for name in heavy)
from paci_rt import Pipe, SplitPoint, TensorChunkSpec, pipe_split, pipeline, sum_reducer
from torch.distributed import pipelining
assert (pipeline, Pipe, SplitPoint, pipe_split) == (
    pipelining.pipeline, pipelining.Pipe, pipelining.SplitPoint, pipelining.pipe_split
)
assert issubclass(paci_rt.Schedule1F1B, pipelining.schedules.PipelineScheduleSingle)
try:
    paci_rt.pipelin
except AttributeError as error:
    assert "no attribute 'pipelin'" in str(error)
else:
    raise AssertionError
"""


def test_torchs_frontend_is_imported_when_somebody_asks_for_it() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)


def test_what_means_nothing_here_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"dw_builder was given: .* leave it out"):
        paci_rt.PipelineStage(nn.Linear(2, 2), 0, 1, dw_builder=lambda: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"get_mesh was given: .* leave it out"):
        paci_rt.PipelineStage(nn.Linear(2, 2), 0, 1, get_mesh=lambda names: None)  # type: ignore[arg-type]


def two(**declared: Any) -> paci_rt.LocalPipeline:
    pipe = paci_rt.LocalPipeline(
        [nn.Linear(4, 6), nn.Linear(6, 2)], schedule="1f1b", n_microbatches=2, loss_fn=nn.functional.mse_loss
    )
    first = paci_rt.PipelineStage(nn.Linear(4, 6), 0, 2, "cpu", **declared)
    pipe.stages[0]._declared = first._declared
    return pipe


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"input_args": torch.ones(8, 4)}, r"stage 0 was given \[4, 4\] float32, and input_args says \[8, 4\] float32"),
        ({"input_args": (torch.ones(4, 4), torch.ones(1))}, r"input_args says \[4, 4\] float32, \[1\] float32"),
        ({"output_args": torch.ones(4, 5)}, r"stage 0 returned \[4, 6\] float32, and output_args says \[4, 5\]"),
        ({"output_args": torch.ones(4, 6, dtype=torch.bfloat16)}, r"output_args says \[4, 6\] bfloat16"),
    ],
)
def test_examples_are_compared_with_the_first_micro_batch(declared: Any, message: str) -> None:
    with pytest.raises(paci_rt.StageError, match=message):
        two(**declared).step(torch.ones(8, 4), target=torch.ones(8, 2))
    with pytest.raises(paci_rt.StageError, match=message):
        two(**declared).eval(torch.ones(8, 4))


def test_examples_that_fit_are_no_promise_for_later_batches() -> None:
    given = torch.ones(4, 4, device="meta"), [torch.ones(4, 6)]
    pipe = two(input_args=given[0], output_args=given[1], output_grads=(torch.ones(4, 6),), input_grads=(None,))
    for rows in (8, 5, 2):
        pipe.step(torch.ones(rows, 4), target=torch.ones(rows, 2))


def test_examples_that_are_none_are_named() -> None:
    make = paci_rt.PipelineStage
    with pytest.raises(paci_rt.StageError, match="input_args is a dict"):
        make(nn.Linear(4, 6), 0, 2, "cpu", {"x": torch.ones(2)})  # type: ignore[arg-type]
    with pytest.raises(paci_rt.StageError, match=r"output_args\[1\] is a NoneType"):
        make(nn.Linear(4, 6), 0, 2, "cpu", None, (torch.ones(2), None))
    with pytest.raises(ValueError, match=r"output_grads has the shapes \[\(3,\)\]"):
        make(nn.Linear(4, 6), 0, 2, "cpu", None, torch.ones(2), torch.ones(3))
