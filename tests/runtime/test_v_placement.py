"""Two stages a rank in a V: what rank 0, which has the first and the last one, is given and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint
from paci_rt.launch.blame import Seen, guilty, waited_for
from paci_rt.schedules import Placement
from paci_rt.status import Standing
from paci_rt.trace import Event, format_timeline
from paci_rt.transport import LocalTransport, Message, hand_over
from paci_rt.transport.gloo import GlooTransport
from support.plain import same
from support.pool import WorkerPool
from support.toy import Run, batch, loss_fn, module, train_local

FLUSHED = ("zb-v", "v-half", "v-min", "dualpipe-v")


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.embedding.weight.data.copy_(shared())

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)  # type: ignore[no-any-return]


class Body(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(5 + at)
        self.add_module(f"layer{at}", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(next(self.children())(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight.data.copy_(shared())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def shared() -> Tensor:
    return torch.randn(11, 8, generator=torch.Generator().manual_seed(9))


def modules() -> list[nn.Module]:
    return [Embedding(), Body(1), Body(2), Head()]


TIE = paci_rt.TiedWeight(owner_stage=0, owner="embedding.weight", reader_stage=3, reader="head.weight")


def optimizer(params: Any) -> torch.optim.Optimizer:
    return paci_rt.AdamW(params, lr=1e-2)


def local(schedule: str) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        modules(), schedule=schedule, n_microbatches=4, loss_fn=loss_fn, optimizer=optimizer, tied_weights=[TIE]
    )


def train(pipe: Any, windows: range) -> list[float]:
    history = []
    for step in windows:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randint(11, (12,), generator=generator) for _ in range(2))
        losses: list[Tensor] = []
        pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None, losses=losses)
        history += [float(loss) for loss in losses]
    return history


def params(pipe: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in pipe.named_parameters()}


def tied_on_rank(rank: int, group: Any, folder: str, transport: str) -> dict[str, Any]:
    """Every schedule: two windows, saved; read again by the next one, two windows more, and an evaluation."""
    found: dict[str, Any] = {}
    for at, schedule in enumerate((*FLUSHED, FLUSHED[0])):
        order = (rank, 3 - rank) if at % 2 else (3 - rank, rank)  # in any order
        stages = [paci_rt.PipelineStage(modules()[one], one, 4, group=group) for one in order]
        pipe = paci_rt.get_schedule_class(schedule)(
            stages, 4, loss_fn, optimizer=[optimizer(stage.parameters()) for stage in stages], tied_weights=[TIE],
            transport=transport, max_grad_norm=1.0,
        )  # fmt: skip
        assert [stage.stage_index for stage in pipe.stages] == [rank, 3 - rank]
        if at:
            checkpoint.load(folder, pipe, tied_weights=[TIE], group=group)
        losses = train(pipe, range(2 * at, 2 * at + 2))
        checkpoint.save(folder, pipe, tied_weights=[TIE], group=group)
        seen: list[Tensor] = []
        x = torch.arange(11)[:8]
        out = pipe.eval(*((x,) if rank == 0 else ()), target=x if rank == 0 else None, losses=seen)
        found[f"{at}"] = (losses, params(pipe), [float(one) for one in seen], out, pipe.stats()["transport"])
        pipe.close()
    return found


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_tied_weights_checkpoints_and_evaluation_between_processes(
    workers: WorkerPool, tmp_path: Path, transport: str
) -> None:
    ranks = workers.run(tied_on_rank, 2, str(tmp_path), transport)
    line = paci_rt.LocalPipeline(
        modules(), schedule="1f1b", n_microbatches=4, loss_fn=loss_fn, optimizer=optimizer, tied_weights=[TIE],
        max_grad_norm=1.0,
    )  # fmt: skip
    for at in range(5):
        losses = train(line, range(2 * at, 2 * at + 2))
        line.drain()  # the copy of a tied weight comes with the next forward
        theirs = [rank[f"{at}"] for rank in ranks]
        assert theirs[0][0] == losses and theirs[1][0] == []
        same(theirs[0][1] | theirs[1][1], params(line))
        assert {one[4] for one in theirs} == {transport}
        seen: list[Tensor] = []
        out = line.eval(torch.arange(11)[:8], target=torch.arange(11)[:8], losses=seen)
        assert theirs[0][2] == [float(one) for one in seen] and theirs[1][2] == []
        assert torch.equal(theirs[0][3], out) and theirs[1][3] is None
    # What the V has saved goes on in a line, and what the line saves goes on in a V.
    resumed = local("1f1b")
    checkpoint.load(tmp_path, resumed, tied_weights=[TIE])
    same(params(resumed), params(line))


def test_a_checkpoint_goes_from_a_v_to_a_line_and_back(tmp_path: Path) -> None:
    straight = local("1f1b")
    train(straight, range(6))
    saved = local("v-min")
    train(saved, range(2))
    checkpoint.save(tmp_path / "v", saved, tied_weights=[TIE])
    line = local("zb-h1")
    checkpoint.load(tmp_path / "v", line, tied_weights=[TIE])
    train(line, range(2, 4))
    checkpoint.save(tmp_path / "line", line, tied_weights=[TIE])
    back = local("dualpipe-v")
    checkpoint.load(tmp_path / "line", back, tied_weights=[TIE])
    train(back, range(4, 6))
    same(params(back), params(straight))


def test_one_rank_has_both_stages_of_a_v() -> None:
    for name in FLUSHED:
        stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, 2) for at in (1, 0)]
        optimizers = [paci_rt.SGD(stages[0].parameters(), lr=0.1), paci_rt.SGD(stages[1].parameters(), lr=0.2)]
        pipe = paci_rt.get_schedule_class(name)(stages, 3, nn.MSELoss(), optimizer=optimizers)
        before = [stage.submod.weight.detach().clone() for stage in pipe.stages]
        out = pipe.step(torch.ones(6, 4), target=torch.zeros(6, 4), losses=[])
        assert out.shape == (6, 4) and not torch.equal(before[0], pipe.stages[0].submod.weight)
        owners = [bound.optimizer for bound in pipe._optimizers]
        assert [one.param_groups[0]["lr"] for one in owners] == [0.2, 0.1]  # each with its stage
        pipe.close()


def test_gradients_without_an_optimizer_are_a_plain_loops() -> None:
    for name in FLUSHED:
        run = Run(schedule=name, stages=2, accumulation=4)
        pieces = [module(stage, run) for stage in range(run.stages)]
        x, y = batch(run, 0)
        pipe = paci_rt.LocalPipeline(pieces, schedule=name, n_microbatches=4, loss_fn=loss_fn)
        pipe.step(x, target=y)
        plain = [module(stage, run) for stage in range(run.stages)]
        for one, target in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            loss_fn(nn.Sequential(*plain)(one), target).backward()
        for piece, other in zip(pieces, plain, strict=True):
            for param, expected in zip(piece.parameters(), other.parameters(), strict=True):
                assert param.grad is not None and expected.grad is not None
                assert torch.equal(param.grad, expected.grad / 4)
        pipe.close()


def test_recompute_changes_no_bit_in_a_v() -> None:
    for name in FLUSHED:
        whole = train_local(Run(schedule=name, stages=3, accumulation=4, windows=2))
        again = train_local(Run(schedule=name, stages=3, accumulation=4, windows=2, policy="recompute"))
        same(whole["params"], again["params"])
        assert whole["losses"] == again["losses"]


def wrong_on_rank(rank: int, group: Any) -> list[str]:
    said = []
    for make in (
        lambda: build((1 - rank, 2 + rank), group),  # the other rank's
        lambda: build((rank, rank + 2), group),  # a circle's
        lambda: build((rank, 3 - rank), group, GlooTransport(group, num_stages=4, chunks=2)),
    ):
        try:
            make()
        except (ValueError, paci_rt.PaciError) as error:
            said.append(str(error))
    return said


def build(indices: tuple[int, int], group: Any, transport: Any = "gloo") -> None:
    stages = [paci_rt.PipelineStage(nn.Linear(4, 4), at, 4, group=group) for at in indices]
    paci_rt.ScheduleZBVZeroBubble(stages, 4, nn.MSELoss(), transport=transport, transfer_timeout_s=20.0)


def test_stages_and_transports_of_another_placement_are_refused(workers: WorkerPool) -> None:
    for rank, said in enumerate(workers.run(wrong_on_rank, 2)):
        assert len(said) == 3
        mine = [rank, 3 - rank]
        assert f"this process is number {rank} of its group" in said[0] and f"give it stages {mine}" in said[0]
        assert f"has stages [{rank}, {rank + 2}] of 4: with 2 a rank in a v" in said[1]
        assert "'gloo' was made for 4 stages in a circle over 2 ranks" in said[2] and "placement='v'" in said[2]


def test_what_stays_on_a_rank_is_handed_over() -> None:
    v = Placement(num_stages=4, chunks=2, name="v")
    plain = LocalTransport()
    assert hand_over(plain, v) is plain
    small = LocalTransport(capacity=1)
    assert hand_over(small, Placement(num_stages=4, chunks=2)) is small  # nothing stays
    both: Any = hand_over(small, v)
    assert (both.name, both.capacity, both.polled, both.handed_over) == ("local", 1, True, {1, 2})
    for kind, sender, receiver in (("F", 1, 2), ("B", 2, 1), ("TG0", 3, 0), ("NF", 1, 2)):
        both.send((kind, sender, receiver), 0, Message((torch.ones(1),), (False,)))
        assert both.ready((kind, sender, receiver)) and not small.ready((kind, sender, receiver))
        assert both.recv((kind, sender, receiver), 0).tensors[0] == 1
    both.send(("F", 0, 1), 0, Message((torch.ones(1),), (False,)))
    assert small.ready(("F", 0, 1)) and not both.has_room(("F", 0, 1))
    both.close()


def test_who_waits_for_whom_in_a_v() -> None:
    """Of three ranks, rank 0 has stages 0 and 5, rank 1 has 1 and 4, rank 2 has 2 and 3."""
    for action, awaited in (
        ("0RECV_B3", {1}),
        ("5RECV_F3", {1}),
        ("4RECV_F0", {2}),
        ("1RECV_B0", {2}),
        ("2SEND_F1", set()),
    ):
        standing = Standing(phase="training", action=action, in_a_v=True)
        rank = Placement.over(3, "v").rank_of(int(action[0]))
        assert waited_for(rank, standing, 3) == awaited
    second = Standing(phase="training", action="4RECV_F0", in_a_v=True, replica=1, place=1, places=3)
    assert waited_for(4, second, 6) == {5}
    seen = {
        0: Seen(standing=Standing(phase="training", action="5RECV_F3", in_a_v=True)),
        1: Seen(standing=Standing(phase="training", action="4RECV_F3", in_a_v=True)),
        2: Seen(standing=Standing(phase="training", action="3F3", in_a_v=True)),
    }
    assert guilty(seen) == 2


def test_rows_of_a_timeline_are_ranks_of_a_v() -> None:
    events = [Event(stage, f"{stage}F0", float(stage), stage + 1.0, 0) for stage in range(4)]
    rows = format_timeline(events, ranks=2, rank_of=Placement.over(2, "v").rank_of).splitlines()
    assert rows[1].split() == ["rank", "0", "F0a", ".", ".", "F0b"]
    assert rows[2].split() == ["rank", "1", ".", "F0a", "F0b"]
