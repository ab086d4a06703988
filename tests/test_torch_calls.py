"""The same calls to torch's schedules and to ours, with the same results, or a refusal where torch refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate, sum_reducer

import paci_rt
from support.pool import WorkerPool


class First(nn.Module):
    """Time before batch, positions for all micro-batches, and a keyword argument that every stage takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.places, self.linear = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, positions: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.embed(ids) + self.places(positions)[:, None]
        hidden = self.linear(hidden).transpose(0, 1).contiguous()
        return (hidden if scale is None else hidden * scale), ids.float().mean()


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(8, 5)

    def forward(self, hidden: Tensor, mean: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = self.linear(torch.tanh(hidden))
        return (output if scale is None else output * scale), mean.reshape(())


def loss_fn(output: tuple[Tensor, Tensor], target: Tensor, weight: float = 1.0) -> Tensor:
    return nn.functional.cross_entropy(output[0].flatten(0, 1), target.flatten()) * weight


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(11, (6, rows), generator=generator)
    return ids, torch.randint(5, (rows, 6), generator=generator)


ARGS = (TensorChunkSpec(1), _Replicate())
KWARGS = {"scale": TensorChunkSpec(0)}
OUTPUTS = (TensorChunkSpec(0), sum_reducer)
SCALE = torch.rand(8, 1, 1, generator=torch.Generator().manual_seed(9))


def classes(name: str, mine: bool) -> tuple[Any, Any]:
    if mine:
        return paci_rt.PipelineStage, getattr(paci_rt, name)
    from torch.distributed import pipelining

    return pipelining.PipelineStage, getattr(pipelining, name)


def train(rank: int, group: Any, name: str, mine: bool) -> dict[str, Any]:
    """Every rank makes the same calls, whatever it can use of them."""
    stage_class, schedule_class = classes(name, mine)
    module = (First, Last)[rank]()
    stage = stage_class(module, rank, 2, torch.device("cpu"), None, None, None, None, group)
    schedule = schedule_class(stage, 4, loss_fn, ARGS, KWARGS, OUTPUTS, True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    found: dict[str, Any] = {"returned": [], "losses": []}
    for step in range(3):
        (ids, target), losses = batch(step), [torch.tensor(-1.0)]
        output = schedule.step(
            ids,
            torch.arange(6),
            target=target,
            losses=losses,
            return_outputs=step != 1,
            loss_kwargs={"weight": 0.5},
            scale=SCALE,
        )
        optimizer.step()
        optimizer.zero_grad()
        found["returned"].append(None if output is None else [part.detach().clone() for part in output])
        found["losses"].append([float(loss) for loss in losses])
    losses = []
    output = schedule.eval(ids, torch.arange(6), target=target, losses=losses, scale=SCALE)
    found["returned"].append(None if output is None else [part.detach().clone() for part in output])
    found["losses"].append([float(loss) for loss in losses])
    found["params"] = {key: param.detach().clone() for key, param in module.named_parameters()}
    found["facts"] = [stage.is_first, stage.is_last, stage.stage_index, stage.num_stages, stage.group_rank]
    found["facts"] += [stage.group_size, schedule._n_microbatches, schedule._has_backward, schedule._num_stages]
    found["facts"] += [schedule._stage is stage, stage.submod is module, schedule.scale_grads, stage.has_backward]
    return found


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleGPipe"])
def test_every_rank_makes_the_same_call(workers: WorkerPool, name: str) -> None:
    theirs, ours = workers.run(train, 2, name, False), workers.run(train, 2, name, True)
    for rank in range(2):
        for one, other in zip(ours[rank]["returned"], theirs[rank]["returned"], strict=True):
            assert (one is None) == (other is None)
            assert one is None or all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        assert ours[rank]["losses"] == theirs[rank]["losses"]
        assert all(torch.equal(param, theirs[rank]["params"][key]) for key, param in ours[rank]["params"].items())
        assert ours[rank]["facts"][:-1] == theirs[rank]["facts"][:-1] and ours[rank]["facts"][-1]
    assert ours[0]["losses"][0] == [-1.0] and len(ours[1]["losses"][0]) == 4  # cleared where they are filled only


def forward_only(rank: int, group: Any, name: str, mine: bool) -> Any:
    stage_class, schedule_class = classes(name, mine)
    module = (First, Last)[rank]()
    stage = stage_class(module, rank, 2, torch.device("cpu"), group=group)
    schedule = schedule_class(stage, 4, args_chunk_spec=ARGS, output_merge_spec=OUTPUTS)
    ids, target = batch(0)
    with torch.no_grad():
        more = {} if name == "_ScheduleForwardOnly" else {"target": target}
        outputs = [schedule.step(ids, torch.arange(6), **more), schedule.eval(ids, torch.arange(6))]
    assert not any(param.grad is not None for param in module.parameters())
    return [None if output is None else [part.clone() for part in output] for output in outputs], stage.has_backward


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleGPipe", "_ScheduleForwardOnly"])
def test_without_a_loss_a_schedule_runs_forward_only(workers: WorkerPool, name: str) -> None:
    theirs, ours = workers.run(forward_only, 2, name, False), workers.run(forward_only, 2, name, True)
    assert ours[0] == theirs[0] == ([None, None], False) and ours[1][1] is theirs[1][1] is False
    for one, other in zip(ours[1][0], theirs[1][0], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def make(schedule: str = "paci", **options: Any) -> paci_rt.LocalPipeline:
    options = {"loss_fn": nn.functional.mse_loss, "optimizer": lambda p: paci_rt.SGD(p, lr=0.1), **options}
    torch.manual_seed(0)
    return paci_rt.LocalPipeline([nn.Linear(4, 4), nn.Linear(4, 4)], schedule=schedule, n_microbatches=3, **options)


@pytest.mark.parametrize("schedule", ["paci", "1f1b", "gpipe", "zb-2p", "pipedream", "pipedream-2bw", "async-1f1b"])
def test_forward_only_under_every_schedule(schedule: str) -> None:
    pipe = make(schedule, loss_fn=None, optimizer=None)
    expected = nn.Sequential(*(stage.submod for stage in pipe.stages))
    for rows in (3, 7, 12):  # batches that do not divide among them
        x = torch.randn(rows, 4)
        with torch.no_grad():
            whole = torch.cat([expected(part) for part in x.tensor_split(3)])
        assert torch.equal(pipe.step(x, target=torch.zeros(rows, 4)), whole)
        assert torch.equal(pipe.eval(x), whole) and pipe.step(x, return_outputs=False) is None
    with pytest.raises(ValueError, match="losses were asked for with no loss_fn"):
        pipe.step(x, losses=[])
    assert pipe.stats()["micro_batches"] == 0
    pipe.drain()
    pipe.close()


def test_a_stage_may_have_a_forward_only_schedule_beside_the_one_that_trains_it() -> None:
    stage = paci_rt.PipelineStage(nn.Linear(4, 4), 0, 1)
    optimizer = paci_rt.SGD(stage.parameters(), lr=0.1)
    x = torch.randn(6, 4)
    training = paci_rt.SchedulePACI(stage, 2, nn.functional.mse_loss, optimizer=optimizer)
    looking = paci_rt.ScheduleGPipe(stage, 3)
    training.step(x, target=x)
    training.drain()
    with torch.no_grad():
        assert torch.equal(looking.step(x), torch.cat([stage.submod(part) for part in x.tensor_split(3)]))
    looking.close()
    before = stage.submod.weight.detach().clone()
    training.step(x, target=x)
    training.drain()
    assert not torch.equal(stage.submod.weight, before)


def test_evaluation_without_targets_gives_outputs() -> None:
    pipe = make()
    x, y = torch.randn(7, 4), torch.randn(7, 4)
    output, losses = pipe.eval(x), []
    assert torch.equal(pipe.eval(x, target=y, losses=losses), output) and len(losses) == 3
    with pytest.raises(ValueError, match="losses were asked for with no target"):
        pipe.eval(x, losses=losses)
    with pytest.raises(ValueError, match="no target given"):
        pipe.step(x)
    assert pipe.step(x, target=y).shape == (7, 4)


@pytest.mark.parametrize(
    "target",
    [
        lambda y: (y, {"weight": torch.rand(len(y), 1)}),
        lambda y: {"y": y, "none": None, "name": "cosine"},
        lambda y: torch.tensor(0.5),
        lambda y: [y[:, :1], torch.tensor(2.0)],
    ],
)
@pytest.mark.parametrize("rows", [6, 8])
def test_targets_may_be_anything(target: Any, rows: int) -> None:
    from torch.utils import _pytree as pytree

    def loss(output: Tensor, target: Any) -> Tensor:
        parts = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]
        return sum(((output - part) ** 2).mean() for part in parts)  # type: ignore[return-value]

    pipe = make("1f1b", loss_fn=loss, optimizer=None)
    modules = copy.deepcopy(nn.Sequential(*(stage.submod for stage in pipe.stages)))
    x, y = torch.randn(rows, 4), torch.randn(rows, 4)
    given = target(y)
    pipe.step(x, target=given)
    leaves, tree = pytree.tree_flatten(given)
    cut = [leaf.tensor_split(3) if isinstance(leaf, Tensor) and leaf.dim() else [leaf] * 3 for leaf in leaves]
    for at, part in enumerate(x.tensor_split(3)):
        loss(modules(part), pytree.tree_unflatten([column[at] for column in cut], tree)).backward()
    for ours, theirs in zip(pipe.named_parameters(), modules.named_parameters(), strict=True):
        assert theirs[1].grad is not None and torch.equal(ours[1].grad, theirs[1].grad / 3)


def differ(rank: int, group: Any, way: str, transport: str) -> str:
    """Rank 0 trains and rank 1 does not, or the other way round."""
    stage = paci_rt.PipelineStage(nn.Linear(4, 4), rank, 2, "cpu", group=group)
    trains = (rank == 0) == (way == "first")
    loss = nn.functional.mse_loss if trains else None
    pipe = paci_rt.Schedule1F1B(stage, 2, loss, transport=transport, transfer_timeout_s=8)
    try:
        pipe.step(torch.ones(4, 4), target=torch.ones(4, 4))
    except paci_rt.PaciError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("way", ["first", "last"])
def test_ranks_that_disagree_on_whether_to_train_are_told(workers: WorkerPool, way: str) -> None:
    texts = workers.run(differ, 2, way, "shm")  # a deadline that passes would break the group of gloo
    trains, forwards = (0, 1) if way == "first" else (1, 0)
    assert f"stage {trains} trains while stage {forwards} runs forward only" in texts[1]


def refused(rank: int, group: Any, rows: int) -> list[str]:
    """What torch and we say to a batch with fewer rows than micro-batches, on every rank."""
    texts = []
    for mine in (False, True):
        stage_class, schedule_class = classes("ScheduleGPipe", mine)
        stage = stage_class(nn.Linear(4, 4), rank, 2, torch.device("cpu"), group=group)
        schedule = schedule_class(stage, 4, nn.functional.mse_loss)
        for target in (torch.ones(rows, 4), torch.ones(8, 4)):
            try:
                schedule.step(torch.ones(rows, 4), target=target, losses=[])
                texts.append("")
            except Exception as error:
                texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_batches_with_too_few_rows_are_refused_on_every_rank_as_in_torch(workers: WorkerPool) -> None:
    for rank in workers.run(refused, 2, 3):
        assert all(rank) and "args[0] has shape (3, 4)" in rank[2] and "args[0] has shape (3, 4)" in rank[3]


@pytest.mark.parametrize(("rows", "fits"), [(8, True), (6, False), (7, False), (16, True), (4, True)])
def test_targets_are_cut_where_the_inputs_are(rows: int, fits: bool) -> None:
    """6 rows of targets for 8 of inputs would pair other rows, which broadcasting may hide."""
    pipe = paci_rt.LocalPipeline(
        [nn.Linear(3, 3), nn.Linear(3, 3)],
        schedule="1f1b",
        n_microbatches=4,
        loss_fn=lambda output, target: output.mean() * target.mean(),
    )
    if fits:
        assert pipe.step(torch.ones(8, 3), target=torch.ones(rows, 3)).shape == (8, 3)
        return
    with pytest.raises(ValueError, match=f"inputs have 8 rows and the target {rows}, .* 4 micro-batches at different"):
        pipe.step(torch.ones(8, 3), target=torch.ones(rows, 3))
