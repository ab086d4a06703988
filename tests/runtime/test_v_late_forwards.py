"""``paci-v`` returns from a step before all its forwards have run on later stages: nothing of them is lost, and they
see what their own step was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from support.plain import same
from support.pool import WorkerPool

WIDTH, ROWS = 6, 12


def pieces(count: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for at in range(count):
        torch.manual_seed(40 + at)
        found.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh()))
    return found


def rows(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))  # type: ignore[return-value]


def still(params: Any) -> paci_rt.AdamW:
    """Adds gradients up in its moments, and leaves weights as they are: without a flush as with one."""
    return paci_rt.AdamW(params, lr=0.0, weight_decay=0.0)


def moments(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, entry in pipe.state_dict()["optimizer"].items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def drive(pipe: Any, windows: int, *, give: Callable[[int], dict[str, Any]] = lambda step: {}) -> list[float]:
    """Losses of all micro-batches, each from the list that its own step was given."""
    lists: list[list[Tensor]] = []
    for step in range(windows):
        x, y = rows(step)
        lists.append([])
        pipe.step(
            *((x,) if pipe.has_first else ()), target=y if pipe.has_last else None, losses=lists[-1], **give(step)
        )
        x.fill_(torch.nan)  # the caller's own again
        y.fill_(torch.nan)
    pipe.drain()
    return [float(loss) for losses in lists for loss in losses]


def local(schedule: str, stages: int, a: int, **options: Any) -> paci_rt.LocalPipeline:
    given = {"loss_fn": nn.MSELoss(), "optimizer": still, **options}
    return paci_rt.LocalPipeline(pieces(stages), schedule=schedule, n_microbatches=a, **given)


@pytest.mark.parametrize("a", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("more", [{}, {"activation_limit": 1.5}, {"costs": paci_rt.StepCosts(hop=2.0)}])
def test_every_gradient_of_every_micro_batch_is_a_flushed_lines(ranks: int, a: int, more: dict[str, Any]) -> None:
    v, line = local("paci-v", 2 * ranks, a, **more), local("1f1b", 2 * ranks, a)
    assert drive(v, 4) == drive(line, 4)
    same(moments(v), moments(line))


@pytest.mark.parametrize("policy", ["stash", "2bw", "predict", "recompute"])
def test_under_every_policy(policy: str) -> None:
    v, line = local("paci-v", 6, 6, policy=policy), local("1f1b", 6, 6)
    for windows in (3, 2):  # the second time the windows do not begin at 0
        assert drive(v, windows) == drive(line, windows)
        same(moments(v), moments(line))


def test_losses_enter_the_list_of_their_step_and_outputs_are_not_returned() -> None:
    pipe, line = local("paci-v", 6, 4), local("1f1b", 6, 4)
    lists: list[list[Tensor]] = [[], [], []]
    whole: list[list[Tensor]] = [[], [], []]
    for step, (mine, others) in enumerate(zip(lists, whole, strict=True)):
        x, y = rows(step)
        assert pipe.step(x, target=y, losses=mine) is None
        line.step(x, target=y, losses=others)
        assert len(mine) < 4 and (not step or lists[step - 1] == whole[step - 1])
    pipe.drain()
    assert lists == whole
    # A list that is given again has those that come meanwhile, the earlier ones first.
    one: list[Tensor] = []
    seen = []
    for step in range(3):
        x, y = rows(step)
        pipe.step(x, target=y, losses=one)
        seen.append(len(one))
        assert one == [loss for losses in whole for loss in losses][sum(seen[:-1]) : sum(seen)]
    pipe.drain()
    assert seen[0] < 4 and seen[1:] == [4, 4] and len(one) == 4 + 12 - sum(seen)


class Scaled(nn.Module):
    """Multiplies by a keyword argument of the micro-batch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(at)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * scale)


def scales(step: int) -> Tensor:
    return torch.linspace(0.5, 1.5, ROWS).roll(step)[:, None] + step


def weighted(output: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
    return nn.functional.mse_loss(output, target) * weight


def scaled(schedule: str, a: int) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        [Scaled(at) for at in range(6)], schedule=schedule, n_microbatches=a, loss_fn=weighted, optimizer=still
    )


@pytest.mark.parametrize("a", [1, 3, 4])
def test_keyword_arguments_are_those_of_their_own_step(a: int) -> None:
    def give(step: int) -> dict[str, Any]:
        return {"scale": scales(step), "loss_kwargs": {"weight": 1.0 + step}}

    v, line = scaled("paci-v", a), scaled("1f1b", a)
    assert drive(v, 4, give=give) == drive(line, 4, give=give)
    same(moments(v), moments(line))


def on_rank(rank: int, group: Any, a: int) -> dict[str, Any]:
    stages = [paci_rt.PipelineStage(Scaled(at), at, 6, group=group) for at in (rank, 5 - rank)]
    pipe = paci_rt.SchedulePACIV(stages, a, weighted, optimizer=[still(stage.parameters()) for stage in stages])
    try:
        losses = drive(pipe, 4, give=lambda step: {"scale": scales(step), "loss_kwargs": {"weight": 1.0 + step}})
        return {"losses": losses, "moments": moments(pipe)}
    finally:
        pipe.close()


@pytest.mark.parametrize("a", [1, 4])
def test_between_processes(workers: WorkerPool, a: int) -> None:
    line = scaled("1f1b", a)
    losses = drive(line, 4, give=lambda step: {"scale": scales(step), "loss_kwargs": {"weight": 1.0 + step}})
    ranks = workers.run(on_rank, 3, a)
    assert ranks[0]["losses"] == losses and not ranks[1]["losses"]
    own = {key for rank in ranks for key in rank["moments"]}
    values = sorted(float(value.double().sum()) for rank in ranks for value in rank["moments"].values())
    assert values == sorted(float(value.double().sum()) for value in moments(line).values()) and own


class Trains(nn.Module):
    """Doubles while it trains."""

    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(at)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x * 2 if self.training else x


@pytest.mark.parametrize("kind", ["training", "autocast", "both"])
def test_late_forwards_run_under_the_mode_of_their_own_step(kind: str) -> None:
    found = []
    for schedule in ("paci-v", "1f1b"):
        pipe = paci_rt.LocalPipeline(
            [Trains(at) for at in range(6)], schedule=schedule, n_microbatches=4, loss_fn=nn.MSELoss(), optimizer=still
        )
        lists: list[list[Tensor]] = []
        for step in range(4):
            x, y = rows(step)
            lists.append([])
            for stage in pipe.stages:
                stage.submod.train(step % 2 == 0 or kind == "autocast")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind != "training" and step in (1, 2)):
                pipe.step(x, target=y, losses=lists[-1])
        for stage in pipe.stages:
            stage.submod.train(False)
        pipe.drain()
        assert not any(part.training for stage in pipe.stages for part in stage.submod.modules())
        found.append(([float(one) for losses in lists for one in losses], moments(pipe)))
    assert found[0][0] == found[1][0]
    same(found[0][1], found[1][1])


def test_a_module_that_is_exchanged_meanwhile_is_refused() -> None:
    pipe = paci_rt.LocalPipeline(pieces(6), schedule="paci-v", n_microbatches=4, loss_fn=nn.MSELoss(), optimizer=still)
    x, y = rows(0)
    pipe.step(x, target=y)
    before = pipe.stages[4].submod[2]
    pipe.stages[4].submod[2] = nn.ReLU()
    with pytest.raises(paci_rt.StageError, match="still to run in it: put it back, call drain"):
        pipe.step(x, target=y)
    pipe.stages[4].submod[2] = before
    pipe.drain()
    pipe.stages[4].submod[2] = nn.ReLU()
    pipe.step(x, target=y)
    pipe.drain()


def test_a_parameter_that_is_frozen_meanwhile_is_trained_until_then() -> None:
    found = []
    for schedule in ("paci-v", "1f1b"):
        pipe = local(schedule, 6, 4)
        for step in range(3):
            x, y = rows(step)
            pipe.step(x, target=y)
            if step == 1:
                pipe.stages[5].submod[0].weight.requires_grad_(False)
        pipe.drain()
        found.append(moments(pipe))
    same(found[0], found[1])


def test_evaluation_checkpoints_and_forward_only_see_the_end_of_all_steps(tmp_path: Any) -> None:
    pipe, line = local("paci-v", 4, 3), local("1f1b", 4, 3)
    for step in range(3):
        x, y = rows(step)
        late: list[Tensor] = []
        seen: list[list[Tensor]] = [[], []]
        pipe.step(x, target=y, losses=late)
        line.step(x, target=y)
        out = [one.eval(x, target=y, losses=losses) for one, losses in zip((pipe, line), seen, strict=True)]
        assert torch.equal(*out) and seen[0] == seen[1]
        assert len(late) == 3  # eval drains
    same(moments(pipe), moments(line))


def test_a_run_that_ends_in_the_middle_says_no_wrong_thing() -> None:
    pipe = local("paci-v", 6, 3, on_nonfinite="raise")
    x, y = rows(0)
    y[9] = torch.nan
    pipe.step(x, target=y)  # micro-batch 2 of it ends in the next one
    with pytest.raises(paci_rt.NonFiniteError, match="window 0, micro-batch 2"):
        drive(pipe, 1)
    with pytest.raises(paci_rt.PaciError, match="failed earlier"):
        pipe.step(x, target=y)
