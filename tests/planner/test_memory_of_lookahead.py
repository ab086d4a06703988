"""What look-ahead costs in memory competes with what it gives, under a memory limit."""

from __future__ import annotations

import pytest

from paci_rt.planner import BlockProfile, Profile, plan

BLOCK = BlockProfile(
    name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
    parameter_bytes=1 << 20, activation_bytes=1 << 10, stash_bytes=1 << 9, boundary_bytes=512,
)  # fmt: skip
PROFILE = Profile(blocks=(BLOCK,) * 4)


def peak(lookahead: bool | None, limit: float | None, **options: object) -> object:
    return plan(
        PROFILE, stages=4, accumulations=[4], memory_limit_bytes=limit, schedules=["paci"], lookahead=lookahead,
        policies=["bounded"], **options,  # type: ignore[arg-type]
    ).chosen  # fmt: skip


def needed(one: object) -> int:
    return max(one.predicted.peak_memory_bytes)  # type: ignore[attr-defined, no-any-return]


def test_look_ahead_is_one_copy_also_where_it_is_shared() -> None:
    ahead, bare = peak(True, None), peak(False, None, delay_limit=None)
    assert needed(ahead) - needed(bare) == BLOCK.parameter_bytes


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_without_room_for_its_copy_paci_runs_bare_and_pays_in_tokens(share: float) -> None:
    ahead, bare = peak(True, None), peak(False, None, delay_limit=None)
    limit = needed(bare) + share * (needed(ahead) - needed(bare))
    assert peak(None, limit, delay_limit=None).lookahead is False  # type: ignore[attr-defined]
    without = peak(None, limit)
    assert not without.lookahead and without.predicted.overhead.f > 1.4  # type: ignore[attr-defined]
    both = plan(PROFILE, stages=4, accumulations=[4], memory_limit_bytes=limit, schedules=["paci", "1f1b"])
    rates = [one.predicted.progress_per_s for one in both.candidates if one.predicted and one.rejected is None]
    assert both.chosen.predicted is not None and both.chosen.predicted.progress_per_s >= 0.99 * max(rates)
    none_late = peak(None, limit, delay_limit=0)  # one micro-batch in flight at a time
    assert none_late.slack == (-3, -2, -1, 0)  # type: ignore[attr-defined]
    assert peak(None, needed(ahead) + 1, delay_limit=None).lookahead is True  # type: ignore[attr-defined]
