"""The schedules, with the interface of ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from paci_rt import schedules
from paci_rt.runtime.agreement import among_processes
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.stage import LossFn, PipelineStage
from paci_rt.runtime.torch_stages import adopt
from paci_rt.schedules import Slack, StepCosts
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.transport import DEFAULT_TIMEOUT_S, Transport, make_transport


class _Schedule(Pipeline):
    """A pipeline whose other stages live in other processes; torch's schedule interface.

    Args:
        stage: this process's :class:`~paci_rt.PipelineStage`, or torch's, by hand or by ``Pipe.build_stage``; for
            ``interleaved-1f1b`` the list of its stages.
        n_microbatches, loss_fn: as torch's.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec: must stay None; batches are cut along dimension 0.
        scale_grads: as torch's.
        optimizer: steps with the schedule; None leaves gradients in ``.grad`` (flush schedules only). One for each
            stage, as a list, where there are several.
        lr_scheduler: any ``torch.optim.lr_scheduler``, stepped after each local update; likewise.
        transport: how stages reach each other: a name of :data:`paci_rt.transport.TRANSPORTS`, see
            :func:`paci_rt.transport.make_transport`, or a ready-made transport. Processes that were asked for different
            things raise a :class:`~paci_rt.DisagreementError` here, see :mod:`paci_rt.runtime.agreement`.
        transfer_timeout_s: deadline of every single wait for another stage, in seconds; for a transport by name.

    The other arguments are those of :class:`Pipeline`.
    """

    name: ClassVar[str]

    @among_processes
    def __init__(
        self,
        stage: PipelineStage | Sequence[PipelineStage],
        n_microbatches: int,
        loss_fn: LossFn | None = None,
        args_chunk_spec: None = None,
        kwargs_chunk_spec: None = None,
        output_merge_spec: None = None,
        scale_grads: bool = True,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        lr_scheduler: Any = None,
        slack: Slack | Sequence[int] = 0,
        policy: str | None = None,
        lookahead: bool | None = None,
        costs: StepCosts | None = None,
        buffers: int | None = None,
        tied_weights: Sequence[TiedWeight] = (),
        transport: Transport | str | None = "auto",
        transfer_timeout_s: float = DEFAULT_TIMEOUT_S,
        trace: bool = False,
    ) -> None:
        for name, spec in (
            ("args_chunk_spec", args_chunk_spec),
            ("kwargs_chunk_spec", kwargs_chunk_spec),
            ("output_merge_spec", output_merge_spec),
        ):
            if spec is not None:
                raise ValueError(f"{name} is not None: batches are cut along dimension 0; leave it out")
        stages = [adopt(one, tied_weights) for one in (stage if isinstance(stage, Sequence) else [stage])]
        if not stages:
            raise ValueError("stages is empty: give the stages of this rank")
        super().__init__(
            stages,
            self.name,
            n_microbatches,
            loss_fn,
            optimizers=one_each("optimizer", optimizer, stages) or [None] * len(stages),
            lr_schedulers=one_each("lr_scheduler", lr_scheduler, stages),
            chunks=len(stages),
            slack=slack,
            policy=policy,
            lookahead=lookahead,
            costs=costs,
            buffers=buffers,
            tied_weights=tied_weights,
            transport=_find_transport(transport, stages, transfer_timeout_s),
            trace=trace,
            scale_grads=scale_grads,
        )


def one_each(name: str, given: Any, stages: Sequence[PipelineStage]) -> list[Any] | None:
    """What was given for every stage; None where nothing was."""
    if given is None:
        return None
    listed = list(given) if isinstance(given, Sequence) else [given]
    if len(listed) != len(stages):
        raise ValueError(f"{len(listed)} {name}s for {len(stages)} stages: give one per stage")
    return listed


def _find_transport(transport: Transport | str | None, stages: Sequence[PipelineStage], timeout_s: float) -> Transport:
    if transport is not None and not isinstance(transport, str):
        return transport
    return make_transport(
        transport or "auto",
        group=stages[0].group,
        num_stages=stages[0].num_stages,
        chunks=len(stages),
        timeout_s=timeout_s,
        device=stages[0].device,
    )


class SchedulePACI(_Schedule):
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


class SchedulePACISplit(_Schedule):
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


class ScheduleAsync1F1B(_Schedule):
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


class Schedule1F1B(_Schedule):
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


class ScheduleGPipe(_Schedule):
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


class ScheduleInterleaved1F1B(_Schedule):
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


class ScheduleZBH1(_Schedule):
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


class ScheduleZBH2(_Schedule):
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


class ScheduleZB1P(_Schedule):
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


class ScheduleZB2P(_Schedule):
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


class SchedulePipeDream(_Schedule):
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


class SchedulePipeDream2BW(_Schedule):
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


_CLASSES: dict[str, type[_Schedule]] = {cls.name: cls for cls in _Schedule.__subclasses__()}


def get_schedule_class(name: str) -> type[_Schedule]:
    """The schedule class called ``name``, in any case, as torch's function of that name.

    Args:
        name: one of :data:`paci_rt.SCHEDULES`.

    Raises:
        ValueError: no schedule has that name; the message suggests the nearest.

    Example:
        >>> paci_rt.get_schedule_class("ZB-2p").__name__
        'ScheduleZB2P'
        >>> paci_rt.get_schedule_class("pacy")
        Traceback (most recent call last):
        ValueError: unknown schedule 'pacy': did you mean 'paci'? ...
    """
    return _CLASSES[schedules.get(name).name]
