"""Schedules whose stages are placed in a V: rank ``r`` of ``P`` holds stages ``r`` and ``2P-1-r``."""

from __future__ import annotations

from paci_rt.pipelining.base import PipelineScheduleMulti


class ScheduleZBVZeroBubble(PipelineScheduleMulti):
    """Zero bubble in a V, in torch's order of that name (ZB-V, arXiv 2405.15362); the first argument is a list of
    stages.

    The first rank has the first and the last stage, so it takes inputs and targets and holds losses and outputs.

    Example:
        One rank with two stages:

        >>> stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, num_stages=2) for at in range(2)]
        >>> schedule = paci_rt.ScheduleZBVZeroBubble(
        ...     stages, 2, nn.MSELoss(), optimizer=[paci_rt.SGD(stage.parameters()) for stage in stages], trace=True
        ... )
        >>> _ = schedule.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> " ".join(event.action for event in schedule.events)
        '0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1 1U0 0U0'
    """

    name = "zb-v"


class ScheduleDualPipeV(PipelineScheduleMulti):
    """DualPipe cut in half, in torch's order of that name; the first argument is a list of stages.

    Source: DeepSeek-AI, arXiv 2412.19437. Where that runs the forward of one micro-batch and the backward of another
    at the same time, here one runs after the other, and backwards come as I and W.

    Example:
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4) for _ in range(4)], schedule=paci_rt.ScheduleDualPipeV.name, n_microbatches=4,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> pipeline.stats()["peak_rank_in_flight"]  # pieces of two ranks
        {0: 5, 1: 5}
    """

    name = "dualpipe-v"


class ScheduleVHalf(PipelineScheduleMulti):
    """Split backwards in a V with about half of 1F1B's activations, the same on all ranks (arXiv 2405.15362).

    Example:
        Four ranks hold 5 halves of a stage's activations, where the first rank of 1F1B holds 8:

        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4) for _ in range(8)], schedule=paci_rt.ScheduleVHalf.name, n_microbatches=8,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> max(pipeline.stats()["peak_rank_in_flight"].values())
        5
    """

    name = "v-half"


class SchedulePACIV(PipelineScheduleMulti):
    """PACI in a V: never flushed, in an order that is searched for ``costs`` under an ``activation_limit``.

    Both are options by keyword, see :class:`~paci_rt.runtime.engine.Pipeline`; the first argument is a list of stages.
    A step returns before its last micro-batches have passed the later stages. Their losses are appended to the list
    that it was given when they come, in the next steps or in ``drain``. It returns no outputs.

    Example:
        At F = I = W eight ranks hold three stages' activations, where the first rank of PACI holds eight:

        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4) for _ in range(16)], schedule=paci_rt.SchedulePACIV.name, n_microbatches=8,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
        ... )
        >>> for _ in range(3):
        ...     _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> pipeline.drain()
        >>> max(pipeline.stats()["peak_rank_in_flight"].values())  # pieces, half a stage each
        6
    """

    name = "paci-v"


class ScheduleVMin(PipelineScheduleMulti):
    """Split backwards in a V with about a third of 1F1B's activations, the same on all ranks (arXiv 2405.15362).

    Example:
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4) for _ in range(8)], schedule=paci_rt.ScheduleVMin.name, n_microbatches=8,
        ...     loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW,
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 4))
        >>> max(pipeline.stats()["peak_rank_in_flight"].values())
        4
    """

    name = "v-min"
