"""The schedules whose stages lie in a line or in a circle, and all of them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paci_rt import schedules
from paci_rt.pipelining.base import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineSchedule,
    register_with_torch,
)
from paci_rt.pipelining.in_a_v import (
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
)
from paci_rt.runtime.stage import LossFn, PipelineStage


class SchedulePACI(PipelineScheduleSingle):
    """Asynchronous 1F1B with a local update every ``n_microbatches`` (PACI, arXiv 2606.07881).

    Example:
        One stage is the whole pipeline here. Under torchrun every process makes the stage of its rank.

        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> optimizer = paci_rt.AdamW(stage.parameters(), lr=1e-3)
        >>> schedule = paci_rt.SchedulePACI(stage, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=optimizer)
        >>> losses = []
        >>> schedule.step(torch.ones(8, 4), target=torch.ones(8, 2), losses=losses).shape
        torch.Size([8, 2])
        >>> schedule.drain()
        >>> len(losses), schedule.stats()["windows"]
        (2, 1)
    """

    name = "paci"


class SchedulePACISplit(PipelineScheduleSingle):
    """PACI whose backwards come as I and W, so that a gradient leaves before W: hides links of up to half a W.

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> schedule = paci_rt.SchedulePACISplit(
        ...     stage, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.SGD(stage.parameters()), trace=True
        ... )
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 0I0 0W0 0F1 0I1 0W1 0U0'
    """

    name = "paci-split"


class ScheduleAsync1F1B(PipelineScheduleSingle):
    """Asynchronous 1F1B that updates after every backward; ``n_microbatches`` updates a ``step``.

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> schedule = paci_rt.ScheduleAsync1F1B(
        ...     stage, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.SGD(stage.parameters()), trace=True
        ... )
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 0B0 0U0 0F1 0B1 0U1'
    """

    name = "async-1f1b"


class Schedule1F1B(PipelineScheduleSingle):
    """1F1B with a flush before every update (PipeDream-Flush, arXiv 2006.09503).

    Example:
        Without an optimizer it leaves gradients in ``.grad``, like torch's schedule of that name:

        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> schedule = paci_rt.Schedule1F1B(stage, n_microbatches=2, loss_fn=nn.MSELoss())
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> stage.submod.weight.grad.shape
        torch.Size([2, 4])
    """

    name = "1f1b"


class ScheduleGPipe(PipelineScheduleSingle):
    """All forwards, then all backwards, then the update (GPipe, arXiv 1811.06965).

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> schedule = paci_rt.ScheduleGPipe(
        ...     stage, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.SGD(stage.parameters()), trace=True
        ... )
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 0F1 0B0 0B1 0U0'
    """

    name = "gpipe"


class ScheduleInterleaved1F1B(PipelineScheduleMulti):
    """1F1B over several stages per rank, with a flush; the first argument is the list of this rank's stages.

    Source: Narayanan et al., arXiv 2104.04473.

    Example:
        One rank with two stages:

        >>> stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, num_stages=2) for at in range(2)]
        >>> optimizers = [paci_rt.AdamW(stage.parameters()) for stage in stages]
        >>> schedule = paci_rt.ScheduleInterleaved1F1B(stages, 2, nn.MSELoss(), optimizer=optimizers)
        >>> schedule.step(torch.ones(8, 4), target=torch.ones(8, 4)).shape
        torch.Size([8, 4])
        >>> schedule.stats()["chunks"]
        2
    """

    name = "interleaved-1f1b"


class ScheduleInterleavedZeroBubble(PipelineScheduleMulti):
    """Interleaved 1F1B whose backwards come as I and W, which fills bubbles; the first argument is a list of stages.

    Source: Qi et al., arXiv 2401.10241, in torch's order.

    Example:
        One rank with two stages:

        >>> stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, num_stages=2) for at in range(2)]
        >>> schedule = paci_rt.ScheduleInterleavedZeroBubble(
        ...     stages, 2, nn.MSELoss(), optimizer=[paci_rt.SGD(stage.parameters()) for stage in stages], trace=True
        ... )
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1 1U0 0U0'
    """

    name = "interleaved-zb"


class ScheduleLoopedBFS(PipelineScheduleMulti):
    """Breadth first over several stages per rank: all micro-batches through one stage, then through the next.

    Source: Lamy-Poirier, arXiv 2211.05953. Each stage's backwards come in the order of its forwards, so that gradients
    keep a plain loop's bits; torch's come the other way round. The arguments after ``loss_fn`` are by position in
    torch's order for this class, which has no ``args_chunk_spec`` and ``kwargs_chunk_spec``; give those by keyword.

    Example:
        One rank with two stages:

        >>> stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, num_stages=2) for at in range(2)]
        >>> schedule = paci_rt.ScheduleLoopedBFS(
        ...     stages, 2, nn.MSELoss(), optimizer=[paci_rt.SGD(stage.parameters()) for stage in stages], trace=True
        ... )
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1 1U0 0U0'
    """

    name = "looped-bfs"

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        n_microbatches: int,
        loss_fn: LossFn | None = None,
        output_merge_spec: Any = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        defer_pp_recv: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            stages, n_microbatches, loss_fn, output_merge_spec=output_merge_spec, scale_grads=scale_grads, **options
        )


class ScheduleZBH1(PipelineScheduleSingle):
    """Zero bubble with 1F1B's memory, written by hand (ZB-H1, arXiv 2401.10241).

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> optimizer = paci_rt.AdamW(stage.parameters())
        >>> schedule = paci_rt.ScheduleZBH1(stage, 2, nn.MSELoss(), optimizer=optimizer, trace=True)
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 0I0 0W0 0F1 0I1 0W1 0U0'
    """

    name = "zb-h1"


class ScheduleZBH2(PipelineScheduleSingle):
    """Zero bubble with about twice that memory, written by hand (ZB-H2, arXiv 2401.10241).

    Example:
        The first of two stages runs two forwards ahead, not one as under ZB-H1:

        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4), nn.Linear(4, 2)], schedule=paci_rt.ScheduleZBH2.name, n_microbatches=4,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> pipeline.stats()["peak_in_flight"]
        {0: 3, 1: 1}
    """

    name = "zb-h2"


class ScheduleZB1P(PipelineScheduleSingle):
    """Zero bubble searched for ``costs`` under the memory of ``P`` micro-batches (arXiv 2401.10241).

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> costs = paci_rt.StepCosts(forward=(10,), input_grad=(10,), weight_grad=(5,), hop=0.5)
        >>> schedule = paci_rt.ScheduleZB1P(
        ...     stage, 2, nn.MSELoss(), optimizer=paci_rt.AdamW(stage.parameters()), costs=costs
        ... )
        >>> schedule.step(torch.ones(8, 4), target=torch.ones(8, 2)).shape
        torch.Size([8, 2])
    """

    name = "zb-1p"


class ScheduleZB2P(PipelineScheduleSingle):
    """Zero bubble searched for ``costs`` under the memory of ``2P`` micro-batches (arXiv 2401.10241).

    Example:
        The first of two stages holds the activations of 2P = 4 micro-batches:

        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4), nn.Linear(4, 2)], schedule=paci_rt.ScheduleZB2P.name, n_microbatches=4,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW, costs=paci_rt.StepCosts(hop=0.1),
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> pipeline.stats()["peak_in_flight"]
        {0: 4, 1: 1}
    """

    name = "zb-2p"


class SchedulePipeDream(PipelineScheduleSingle):
    """Asynchronous 1F1B with weight stashing, an update after every backward (PipeDream, arXiv 1806.03377).

    Example:
        The first of two stages keeps a second copy of its weights, 16 values and 4 biases in fp32:

        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4), nn.Linear(4, 2)], schedule=paci_rt.SchedulePipeDream.name, n_microbatches=4,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> pipeline.drain()
        >>> [pipeline.stats()["memory"][stage]["versions"] > 0 for stage in range(2)], pipeline.stats()["max_drift"]
        ([True, False], 0)
    """

    name = "pipedream"


class SchedulePipeDream2BW(PipelineScheduleSingle):
    """Asynchronous 1F1B with two weight versions, an update per window (PipeDream-2BW, arXiv 2006.09503).

    Example:
        >>> stage = paci_rt.PipelineStage(nn.Linear(4, 2), stage_index=0, num_stages=1)
        >>> optimizer = paci_rt.AdamW(stage.parameters())
        >>> schedule = paci_rt.SchedulePipeDream2BW(stage, 2, nn.MSELoss(), optimizer=optimizer)
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> memory = schedule.stats()["memory"][0]
        >>> memory["versions"] == memory["weights"]  # one more version of the weights
        True
    """

    name = "pipedream-2bw"


_CLASSES = {cls.name: cls for base in _PipelineSchedule.__subclasses__() for cls in base.__subclasses__()}


class _ScheduleForwardOnly(PipelineScheduleSingle):
    """Torch's schedule of that name: any schedule without a ``loss_fn`` does the same."""

    name = "gpipe"

    def __init__(
        self, stage: PipelineStage, n_microbatches: int, loss_fn: LossFn | None = None, **options: Any
    ) -> None:
        super().__init__(stage, n_microbatches, None, **options)

    def step(self, *args: Any, target: Any = None, losses: list[Any] | None = None, **options: Any) -> Any:
        if target is not None or losses is not None:
            raise RuntimeError("a forward-only schedule computes no loss: leave target and losses out")
        return super().step(*args, **options)


class _PipelineScheduleRuntime(PipelineScheduleMulti):
    """Torch's runtime for schedules from CSV files: there to be imported and compared with, and refused."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise ValueError("schedules are not read from CSV files: take one by get_schedule_class(name)")


_TORCHS: dict[str, type[_PipelineSchedule]] = {
    "interleaved1f1b": ScheduleInterleaved1F1B,
    "pipelineschedulesingle": PipelineScheduleSingle,
    "pipelineschedulemulti": PipelineScheduleMulti,
    "loopedbfs": ScheduleLoopedBFS,
    "interleavedzerobubble": ScheduleInterleavedZeroBubble,
    "zbvzerobubble": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
"""Names that torch has and that are not ours in lower case."""
_BY_CLASS = {cls.__name__.lower(): cls for cls in _CLASSES.values()}


def get_schedule_class(schedule_name: str) -> type[_PipelineSchedule]:
    """The schedule class of a name, in any case, as torch's function of that name.

    Args:
        schedule_name: one of :data:`paci_rt.SCHEDULES`, a name that torch's function takes, or the name of a class.

    Raises:
        ValueError: no schedule has that name; the message suggests the nearest.

    Example:
        >>> paci_rt.get_schedule_class("ZB-2p").__name__
        'ScheduleZB2P'
        >>> paci_rt.get_schedule_class("Interleaved1F1B").name
        'interleaved-1f1b'
        >>> paci_rt.get_schedule_class("pacy")
        Traceback (most recent call last):
        ValueError: unknown schedule 'pacy': did you mean 'paci'? ...
    """
    register_with_torch()
    torchs = _TORCHS.get(schedule_name.lower()) or _BY_CLASS.get(schedule_name.lower())
    return _CLASSES[schedules.get(schedule_name).name] if torchs is None else torchs


register_with_torch()
