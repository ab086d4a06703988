"""What torch's frontend and its stages give to our schedules: the numbers of torch's own, or one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining as theirs
import torch.nn.functional as F
from torch import Tensor, nn

import paci_rt
from paci_rt.errors import StageError
from paci_rt.runtime.torch_stages import adopt, route_of
from support.pool import WorkerPool

WIDTH, PARTS, BATCH = 8, 4, 8
CPU = torch.device("cpu")


class Block(nn.Module):
    """A layer, a function on a weight, a buffer that is read and one that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = F.linear(torch.relu(self.layer(self.norm(x))), self.weight) + self.shift
        return x + (y if scale is None else y * scale)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Scaled(Chain):
    """An input of the model, by keyword, that every stage reads."""

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x, scale)
        return x


class Skips(Chain):
    """The last stage reads what the first has made, and two values cross a cut, the later one first."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        side = first.sin()
        second = self.layers[1](first) + side
        return self.layers[2](second - first) * side  # type: ignore[no-any-return]


class Repeats(Chain):
    """One module that is called twice in one stage."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](self.layers[0](self.layers[0](x))))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {"chain": Chain, "kwargs": Scaled, "skips": Skips, "called twice": Repeats}


def traced(name: str, processes: int) -> theirs.Pipe:
    torch.manual_seed(3)
    model = MODELS[name]()
    cuts = {"layers.2": theirs.SplitPoint.BEGINNING, "layers.1": theirs.SplitPoint.BEGINNING}
    spec = dict(list(cuts.items())[: processes - 1])
    rows = BATCH // PARTS
    kwargs = {"scale": torch.randn(rows, 1)} if name == "kwargs" else None
    return theirs.pipeline(model, mb_args=(torch.randn(rows, WIDTH),), mb_kwargs=kwargs, split_spec=spec)


def data(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, WIDTH, generator=generator)
    return x, y, {"scale": torch.randn(BATCH, 1, generator=generator)} if name == "kwargs" else {}


def step(schedule: Any, rank: int, processes: int, name: str) -> list[Tensor]:
    x, y, kwargs = data(name)
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(x, **kwargs)
    elif rank == processes - 1:
        schedule.step(target=y, losses=losses, **kwargs)
    else:
        schedule.step(**kwargs)
    return losses


def state(module: nn.Module) -> dict[str, Tensor]:
    grads = {f"{name}.grad": param.grad for name, param in module.named_parameters() if param.grad is not None}
    return {**grads, **dict(module.named_buffers())}


def plain(name: str, names: list[str]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the uncut model, and of it what stands under ``names`` and their gradients."""
    torch.manual_seed(3)
    model = MODELS[name]()
    x, y, kwargs = data(name)
    losses = []
    for at, (part, target) in enumerate(zip(x.tensor_split(PARTS), y.tensor_split(PARTS), strict=True)):
        loss = F.mse_loss(model(part, **{key: value.tensor_split(PARTS)[at] for key, value in kwargs.items()}), target)
        loss.backward()
        losses.append(loss.item())
    for param in model.parameters():
        if param.grad is not None:
            param.grad /= PARTS
    return losses, {key: value for key, value in state(model).items() if key.removesuffix(".grad") in names}


def by_both(rank: int, group: Any, name: str, ours: list[str], processes: int) -> None:
    pipe = traced(name, processes)
    module = pipe.get_stage_module(rank)
    begun = {key: value.clone() for key, value in module.state_dict().items()}
    found = []
    kinds: list[Any] = list(map(paci_rt.get_schedule_class, ours))
    if name in ("kwargs", "skips"):  # which torch's own schedules refuse, the second in the backward
        found.append(plain(name, list(module.state_dict())))
    else:
        kinds.insert(0, theirs.Schedule1F1B)
    for kind in kinds:
        module.load_state_dict(begun)
        module.zero_grad(set_to_none=True)
        schedule = kind(pipe.build_stage(rank, CPU, group), n_microbatches=PARTS, loss_fn=F.mse_loss)
        losses = step(schedule, rank, processes, name)
        if kind is not theirs.Schedule1F1B:
            assert [one.split(".")[-1] for one in schedule.stages[0].split_layers].count("layer") >= 1
            schedule.close()
        found.append(([loss.item() for loss in losses], {key: value.clone() for key, value in state(module).items()}))
    (their_losses, their_state), *rest = found
    assert len(their_state) > 5
    for our_losses, our_state in rest:
        assert our_losses == (their_losses if rank == processes - 1 else [])
        assert their_state.keys() == our_state.keys()
        for key, value in their_state.items():
            assert torch.equal(value, our_state[key]), key


@pytest.mark.parametrize(
    ("name", "ours", "processes"),
    [
        ("chain", ["1f1b", "gpipe", "zb-h2"], 2),
        ("kwargs", ["1f1b", "zb-1p"], 2),
        ("skips", ["1f1b", "zb-h1"], 3),
        ("called twice", ["zb-h1"], 2),
    ],
)
def test_traced_stages_give_the_bits_of_torchs_schedule(
    workers: WorkerPool, name: str, ours: list[str], processes: int
) -> None:
    workers.run(by_both, processes, name, ours, processes)


def by_hand(rank: int, group: Any) -> None:
    torch.manual_seed(3)
    blocks, copies = ([Block(), Block()] for _ in range(2))
    copies[rank].load_state_dict(blocks[rank].state_dict())
    stage = theirs.PipelineStage(blocks[rank], rank, 2, CPU, group=group)
    schedule = paci_rt.ScheduleZBH1(stage, PARTS, F.mse_loss)
    step(schedule, rank, 2, "chain")
    assert schedule.stages[0].submod is stage.submod
    with pytest.raises(StageError, match="already belongs to a schedule"):
        paci_rt.Schedule1F1B(stage, PARTS, F.mse_loss)
    schedule.close()
    other = theirs.Schedule1F1B(theirs.PipelineStage(copies[rank], rank, 2, CPU, group=group), PARTS, F.mse_loss)
    step(other, rank, 2, "chain")
    for name, value in state(copies[rank]).items():
        if not name.endswith(".grad"):  # torch's stage has run one more forward, to learn the shapes
            continue
        assert torch.equal(value, state(blocks[rank])[name]), name


def test_torchs_manual_stage_is_taken_as_it_is(workers: WorkerPool) -> None:
    workers.run(by_hand, 2)


def trains(rank: int, group: Any) -> dict[str, list[float]]:
    pipe, found = traced("skips", 3), {}
    for name in ("paci", "paci-split", "zb-2p", "pipedream-2bw"):
        stage = pipe.build_stage(rank, CPU, group)
        optimizer = paci_rt.AdamW(stage.submod.parameters(), lr=1e-2)
        kind = paci_rt.get_schedule_class(name)
        schedule = kind(stage, n_microbatches=PARTS, loss_fn=F.mse_loss, optimizer=optimizer)
        found[name] = [sum(loss.item() for loss in step(schedule, rank, 3, "skips")) for _ in range(8)]
        schedule.drain()
        schedule.close()
    return found


def test_every_kind_of_schedule_trains_them(workers: WorkerPool) -> None:
    for losses in workers.run(trains, 3)[2].values():
        assert losses[-1] < losses[0]


# --- what is refused ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x)))  # type: ignore[no-any-return]


def tied_pipe() -> theirs.Pipe:
    torch.manual_seed(3)
    x = torch.arange(BATCH // PARTS)
    return theirs.pipeline(Tied(), mb_args=(x,), split_spec={"block": theirs.SplitPoint.BEGINNING})


TIE = paci_rt.TiedWeight(owner_stage=0, owner="embedding.weight", reader_stage=1, reader="head.weight")


def tied(rank: int, group: Any) -> None:
    stage = tied_pipe().build_stage(rank, CPU, group)
    with pytest.raises(StageError) as refused:
        paci_rt.Schedule1F1B(stage, PARTS, F.mse_loss)
    assert "is read by stages 0 and 1" in str(refused.value) and "\n" not in str(refused.value)
    told = str(refused.value).split("tied_weights=[")[1].split("]")[0]
    assert eval(told) == TIE
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=0.1)
    schedule = paci_rt.Schedule1F1B(stage, PARTS, F.mse_loss, optimizer=optimizer, tied_weights=[TIE])
    x, y = torch.arange(BATCH), torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        schedule.step(*((x,) if rank == 0 else ()), target=y if rank else None)
    schedule.drain()
    schedule.close()
    torch.manual_seed(3)
    plain = Tied()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        for part, target in zip(x.split(BATCH // PARTS), y.split(BATCH // PARTS), strict=True):
            F.mse_loss(plain(part), target).backward()
        for param in plain.parameters():
            param.grad = None if param.grad is None else param.grad / PARTS
        optimizer.step()
        optimizer.zero_grad()
    mine = dict(stage.submod.named_parameters())["head.weight" if rank else "embedding.weight"]
    # The two terms of the shared gradient are summed in another order: a rounding of fp32 a micro-batch.
    error = float((mine - plain.head.weight).norm() / plain.head.weight.norm())
    assert error < 1e-6, error


def test_a_parameter_that_the_frontend_copied_has_to_be_tied(workers: WorkerPool) -> None:
    workers.run(tied, 2)


def test_stage_modules_of_a_tied_model_have_to_be_tied_in_one_process_too() -> None:
    pipe = tied_pipe()
    modules = [pipe.get_stage_module(at) for at in range(2)]
    with pytest.raises(StageError, match=r"'.*' is read by stages 0 and 1, .*TiedWeight\("):
        paci_rt.LocalPipeline(modules, schedule="1f1b", n_microbatches=PARTS, loss_fn=F.mse_loss)


class Early(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first)), first


def test_what_an_inner_stage_would_return_is_refused() -> None:
    pipe = theirs.pipeline(
        Early(), mb_args=(torch.randn(2, WIDTH),), split_spec={"layers.1": theirs.SplitPoint.BEGINNING}
    )
    with pytest.raises(StageError, match=r"returns a value of stage 0, and only the last stage, 1, can"):
        route_of(pipe.split_gm.graph, 0)


def refused(rank: int, group: Any) -> list[str]:
    said = []
    lazy = theirs.PipelineStage(nn.Linear(2, 2), rank, 2, CPU, group=group, dw_builder=lambda: lambda: None)
    for stage in (lazy, nn.Linear(2, 2), "stage"):
        with pytest.raises(StageError) as error:
            paci_rt.Schedule1F1B(stage, 2, F.mse_loss)  # type: ignore[arg-type]
        said.append(str(error.value))
    inputs = adopt(traced("kwargs", 2).build_stage(1, CPU, group))
    with pytest.raises(StageError) as error:
        inputs.evaluate((torch.zeros(2, WIDTH),), {})
    return [*said, str(error.value)]


def test_refusals_name_the_remedy(workers: WorkerPool) -> None:
    lazy, module, text, missing = workers.run(refused, 2)[0]
    assert "stage 0 has a dw_builder" in lazy and "leave it out" in lazy
    assert module.startswith("stage is a Linear: give a paci_rt.PipelineStage")
    assert text.startswith("stage is a str")
    assert missing == "stage 1 reads the model's input 'scale': give step(scale=...) on every rank"


def test_torch_is_not_needed_for_our_own() -> None:
    stage = paci_rt.PipelineStage(nn.Linear(2, 2), 0, 1)
    assert adopt(stage) is stage and not dist.is_initialized()
