"""Consistency policies: which version of a stage's weights a forward and a backward use.

========== ==================== ================================= ==========================================
name       forward uses         backward uses                     extra weights
========== ==================== ================================= ==========================================
bounded    the current version  the current version               none
stash      the current version  the version its forward used      one copy a version in flight
2bw        the version before   the version its forward used      one copy
           the window's
predict    predicted weights    the current version               one scratch copy (none with fp32 masters)
recompute  the current version  the current version, activations  none, and activations shrink to the
                                recomputed                        stage's input (see :func:`recomputes`)
========== ==================== ================================= ==========================================

A version is the number of local updates behind it. *Drift* is the version that a backward used minus the one that its
forward used; *delay* is the version that the gradient is applied to minus the one that its forward used.

``stash``: PipeDream, arXiv 1806.03377. ``2bw``: PipeDream-2BW, arXiv 2006.09503: every micro-batch of window ``k``
runs at version ``k - 1``, so the delay is one update everywhere. ``predict``: SpecTrain, arXiv 1809.02839.
"""

from __future__ import annotations

from paci_rt.schedules.base import ScheduleFamily, Shape
from paci_rt.wording import unknown

POLICIES = ("bounded", "stash", "2bw", "predict", "recompute")
AHEAD_POLICIES = ("bounded", "recompute")
"""Under which forwards can look ahead (:mod:`paci_rt.weights.lookahead`): those whose forwards use the current
weights."""


def resolve(family: ScheduleFamily, shape: Shape, policy: str | None) -> str:
    """The policy to run ``family`` under; None is the family's own.

    Raises:
        ValueError: no such policy, or one that the schedule cannot have.
    """
    if policy is None:
        policy = family.policies[0]
    if policy not in POLICIES:
        raise unknown("policy", policy, POLICIES)
    if policy not in family.policies:
        why = "its weights stand still between forward and backward" if family.flush else "it is defined by its own"
        raise ValueError(
            f"policy {policy!r} under {family.name}: {why}; use {' or '.join(family.policies)}, or the schedule paci"
        )
    if policy == "2bw":
        ahead = max(early_forwards(family, shape, rank) - shape.overlap for rank in range(shape.ranks))
        if shape.accumulation < ahead:
            raise ValueError(
                f"accumulation is {shape.accumulation}: with two versions of the weights, {family.name} over "
                f"{shape.num_stages} stages needs at least {ahead} micro-batches per window (P-1, and the slack)"
            )
    return policy


def looks_ahead(family: ScheduleFamily, policy: str, asked: bool | None) -> bool:
    """Whether early forwards run at the weights to come; None is the schedule's default.

    Raises:
        ValueError: it was asked for where no forward is early, or where the policy has weights of its own for it.
    """
    if asked is None:
        return family.looks_ahead and policy in AHEAD_POLICIES
    if asked and family.flush:
        raise ValueError(f"look-ahead under {family.name}: it flushes, so no forward runs early; leave it out")
    if asked and policy not in AHEAD_POLICIES:
        raise ValueError(f"look-ahead under policy {policy!r}: it needs policy {' or '.join(AHEAD_POLICIES)}")
    return asked


def versions_held(policy: str, family: ScheduleFamily, shape: Shape, rank: int) -> int:
    """Whole versions of its weights that ``rank`` keeps, the current one among them."""
    if policy == "stash":
        return family.drift_bound(shape, rank) + 1
    return 2 if policy == "2bw" else 1


def copies_held(
    policy: str, family: ScheduleFamily, shape: Shape, rank: int, lookahead: bool, *, masters: bool = False
) -> int:
    """Copies of its weights that ``rank`` keeps besides the current ones.

    These are further versions, or a scratch copy where early forwards run at other weights. That one has the true
    weights meanwhile. With fp32 ``masters``, which bring the true ones back, there is none, but where an update comes
    later than its window ends: weights ahead that were made there wait in it.
    """
    if lookahead or policy == "predict":
        early = early_forwards(family, shape, rank)
        return int(early > 0 and (not masters or (lookahead and shape.overlap > 0)))
    return versions_held(policy, family, shape, rank) - 1


def recomputes(policy: str, family: ScheduleFamily, shape: Shape, rank: int) -> bool:
    """Whether ``rank`` runs its forwards again. One that never holds more than one micro-batch would gain nothing."""
    return policy == "recompute" and family.in_flight_bound(shape, rank) > 1


def bounds(policy: str, family: ScheduleFamily, shape: Shape, rank: int) -> tuple[int, int]:
    """Largest drift and largest delay that a micro-batch can have on ``rank``."""
    updates = family.drift_bound(shape, rank)
    if policy == "2bw":
        return 0, 1
    if shape.overlap:
        return updates, -(-(shape.warm_up(rank) + shape.overlap) // shape.accumulation)
    return (0 if policy == "stash" else updates), updates


def early_forwards(family: ScheduleFamily, shape: Shape, rank: int, stage: int | None = None) -> int:
    """How many backwards come between a forward on ``rank`` and the update that its gradient enters, beyond its
    window's: so many forwards of a window run before an update of theirs. Of its ``stage``, or the most of any."""
    if family.early is not None:
        return max(family.early(shape, one) for one in (shape.stages_of(rank) if stage is None else (stage,)))
    return family.in_flight_bound(shape, rank) - 1 + shape.overlap


def forward_version(policy: str, window: int, current: int, start: int) -> int:
    """Version for the forward of a micro-batch of ``window``, in a pipeline that was empty before window ``start``."""
    return max(window - 1, start) if policy == "2bw" else current


def backward_version(policy: str, at_forward: int, current: int) -> int:
    """Version for the backward of a micro-batch whose forward used version ``at_forward``."""
    return at_forward if policy in ("stash", "2bw") else current
