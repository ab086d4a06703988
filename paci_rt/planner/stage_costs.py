"""What stages cost that hold given blocks of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paci_rt.planner.profile import Profile
from paci_rt.schedules import Placement, StepCosts
from paci_rt.schedules.slack import Loops
from paci_rt.simulate.costs import Costs, Floats
from paci_rt.wording import shown

LOOKAHEAD_TO_UPDATE = {False: 32 / 28, True: 24 / 30}
"""Bytes per parameter that a look-ahead and its undoing move, over those of an AdamW update: with fp32 parameters 24
there and 8 back, with fp32 masters of bf16 parameters 18 and 6. Stages that share one pass per window move less."""


def device_speeds_of(speeds: Sequence[float] | None, ranks: int) -> tuple[float, ...]:
    """One speed per device, 1 being the device that the profile was measured on.

    Raises:
        ValueError: not one for each device, or one that is not above 0.
    """
    if speeds is None:
        return (1.0,) * ranks
    if not isinstance(speeds, Sequence) or isinstance(speeds, (str, bytes)):
        raise ValueError(f"device speeds are {shown(speeds)}: give a list of numbers")
    for speed in speeds:
        if not isinstance(speed, (int, float)) or isinstance(speed, bool) or not 1e-6 <= speed <= 1e6:
            size = f"{speed:g}" if isinstance(speed, float) else shown(speed)
            raise ValueError(
                f"device speed {size}: give numbers above 0, 1 being the device that was profiled, from 1e-6 to 1e6"
            )
    if len(speeds) != ranks:
        raise ValueError(f"{len(speeds)} device speeds for {ranks} stages: give one for each device, in order")
    return tuple(map(float, speeds))


def stage_costs(
    profile: Profile,
    partition: Sequence[int],
    *,
    device_speeds: Sequence[float] | None = None,
    placement: str | None = None,
) -> Costs:
    """Costs of every stage of ``partition``, for the simulator.

    Args:
        profile: of the model.
        partition: middle blocks of each stage; the first stage also has the blocks before them, the last those after.
        device_speeds: how many times as fast as the profiled one each device is. By default all are as fast.
        placement: which stages each device runs, see :class:`paci_rt.schedules.Placement`.

    Raises:
        ValueError: a partition that does not hold all blocks, or speeds that do not fit.

    Example:
        >>> from paci_rt.planner import BlockProfile, Profile, stage_costs
        >>> block = BlockProfile(
        ...     name="block", role="middle", forward_s=1.0, input_grad_s=1.0, weight_grad_s=0.5,
        ...     parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
        ... )
        >>> costs = stage_costs(Profile(blocks=(block,) * 6), [2, 4], device_speeds=[1, 2])
        >>> costs.forward_s, costs.activation_bytes
        ((2.0, 2.0), (4096.0, 8192.0))
    """
    bounds = profile.bounds(partition)
    stages = len(bounds)
    ranks = stages if device_speeds is None else len(device_speeds)
    speeds = device_speeds_of(device_speeds, ranks)
    if stages % ranks:
        raise ValueError(f"{stages} stages on {ranks} devices: every device holds as many, so give a multiple")

    places = Placement(num_stages=stages, chunks=stages // ranks, name=placement)

    def total(name: str) -> list[float]:
        return [sum(getattr(block, name) for block in profile.blocks[start:end]) for start, end in bounds]

    def seconds(values: list[float]) -> tuple[float, ...]:
        return tuple(value / speeds[places.rank_of(stage)] for stage, value in enumerate(values))

    updates = [profile.update_s_per_byte * size for size in total("parameter_bytes")]
    arriving = [profile.input_bytes, *(block.boundary_bytes for block in profile.blocks)]
    return Costs(
        forward_s=seconds(total("forward_s")),
        input_grad_s=seconds(total("input_grad_s")),
        weight_grad_s=seconds(total("weight_grad_s")),
        update_s=seconds(updates),
        predict_s=seconds([LOOKAHEAD_TO_UPDATE[profile.has_masters] * update for update in updates]),
        hop_s=profile.hop_s,
        bandwidth_bytes_per_s=profile.bandwidth_bytes_per_s,
        message_bytes=tuple(profile.blocks[end - 1].boundary_bytes for _, end in bounds),
        activation_bytes=tuple(total("activation_bytes")),
        stash_bytes=tuple(total("stash_bytes")),
        input_bytes=tuple(arriving[start] for start, _ in bounds),
        weight_bytes=tuple(total("parameter_bytes")),
    )


def step_costs(costs: Costs, again: Sequence[bool]) -> StepCosts:
    """What a searched schedule is fitted to on stages of these ``costs``.

    These are seconds by stage, the mean time of a message, and the share of the activations that stays after I.

    Args:
        costs: of every stage, in seconds and bytes.
        again: which stages run their forwards twice, one flag per stage.

    Example:
        The second stage recomputes, so that its I takes a forward longer:

        >>> from paci_rt.planner import step_costs
        >>> from paci_rt.simulate import Costs
        >>> costs = Costs(forward_s=(1.0, 2.0), input_grad_s=(1.0, 2.0), weight_grad_s=(1.0, 2.0), hop_s=0.25)
        >>> fitted = step_costs(costs, again=[False, True])
        >>> fitted.input_grad, fitted.hop
        ((1.0, 4.0), 0.25)
    """
    stages = len(costs.forward_s)
    sizes = costs.per_stage("message_bytes", stages)[:-1]
    transfer_s = float(sizes.mean()) / costs.bandwidth_bytes_per_s if stages > 1 else 0.0
    activations = float(costs.per_stage("activation_bytes", stages).sum())
    stashes = float(costs.per_stage("stash_bytes", stages).sum())
    forward = costs.per_stage("forward_s", stages)
    input_grad = costs.per_stage("input_grad_s", stages) + np.where(again, forward, 0.0)
    return StepCosts(
        forward=costs.forward_s,
        input_grad=tuple(input_grad.tolist()),
        weight_grad=costs.weight_grad_s,
        hop=costs.hop_s + transfer_s,
        stash=stashes / activations if activations else 0.0,
    )


def loops(costs: Costs, again: Sequence[bool], *, split: bool) -> Loops:
    """What slack is planned from: who waits for whom on stages of these ``costs``, one per rank.

    Args:
        costs: of the stages.
        again: which stages run their forwards twice.
        split: whether a gradient leaves before W.
    """
    stages = len(again)
    forward, input_grad, weight_grad = (
        costs.per_stage(name, stages) * float(np.mean(costs.micro_batch_factors))
        for name in ("forward_s", "input_grad_s", "weight_grad_s")
    )
    whole = forward + np.where(again, forward, 0.0) + input_grad + weight_grad
    transfer_s = costs.per_stage("message_bytes", stages)[:-1] / costs.bandwidth_bytes_per_s
    return Loops(
        whole.tolist(),
        (transfer_s + costs.hop_s).tolist(),
        after_send=weight_grad.tolist() if split else (),
        least_period=float(transfer_s.max(initial=0.0)),
    )


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Totals of every run of middle blocks as a stage would hold them, from sums over the blocks before each.

    Attributes:
        profile: what is cut. stages: how many stages it is cut into.
    """

    profile: Profile
    stages: int

    def total(self, name: str, stage: int) -> Floats:
        """``[i, j]``: the sum of block field ``name`` if ``stage`` holds middle blocks ``i ... j - 1``."""
        values = np.array([getattr(block, name) for block in self.profile.blocks], dtype=np.float64)
        roles = [block.role for block in self.profile.blocks]
        before, after = roles.count("first"), roles.count("last")
        middle = np.concatenate(([0.0], np.cumsum(values[before : len(values) - after])))
        sums = middle[None, :] - middle[:, None]
        if stage == 0:
            sums += values[:before].sum()
        if stage == self.stages - 1:
            sums += values[len(values) - after :].sum()
        return sums

    def arriving(self, stage: int) -> Floats:
        """``[i, 0]``: bytes that a micro-batch brings to ``stage`` if its first middle block is ``i``."""
        before = sum(block.role == "first" for block in self.profile.blocks)
        sizes = [self.profile.input_bytes, *(block.boundary_bytes for block in self.profile.blocks)]
        arriving = np.array([sizes[0] if stage == 0 else sizes[before + i] for i in range(self.profile.middle + 1)])
        return arriving[:, None].astype(np.float64)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """``[i, j]``: whether a stage can hold middle blocks ``i ... j - 1``, which must be at least one."""
        at = np.arange(self.profile.middle + 1)
        return np.asarray(at[None, :] > at[:, None])
