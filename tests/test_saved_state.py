"""What a pipeline saves beside parameters: buffers, extra state, options of groups; and that a bad state changes
nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint

WIDTH = 4


class Experts(nn.Module):
    """A bias that balances experts, as mixtures keep it: a buffer that each forward replaces, and one not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.zeros(WIDTH))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) + self.bias
        if self.training:
            self.bias = self.bias + 0.1 * torch.sign(x.detach().mean(0))
        return x


class Counting(nn.Module):
    """Extra state: a Python number and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen, self.peak = nn.Linear(WIDTH, WIDTH), 0, torch.zeros(())
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen, self.peak = self.seen + 1, torch.maximum(self.peak, x.detach().abs().max())
        return self.linear(x) / (1 + 0.01 * self.seen + self.peak)  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "peak": self.peak}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        if self.fails and state["seen"]:
            raise RuntimeError("not this one")
        self.peak = state["peak"]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "spectral-norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "experts": Experts,
    "extra-state": Counting,
}


class Blocks(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.values():
            x = torch.tanh(block(x))
        return x


def cut(block: str, sizes: list[int]) -> list[nn.Module]:
    stages, at = [], 0
    for size in sizes:
        blocks: dict[str, nn.Module] = {}
        for number in range(at, at + size):
            torch.manual_seed(number)
            blocks[f"block{number}"] = BLOCKS[block]()
        stages.append(Blocks(blocks))
        at += size
    return stages


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return paci_rt.AdamW(params, lr=1e-2)


def pipeline(
    block: str = "batch-norm",
    sizes: list[int] | None = None,
    schedule: str = "1f1b",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adamw,
    lr_scheduler: Any = None,
) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        cut(block, sizes or [1, 2]),
        schedule=schedule,
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda named: optimizer([param for _, param in named]),
        lr_scheduler=lr_scheduler,
    )


def train(pipe: Any, windows: range) -> None:
    for window in windows:
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(window))
        args = (x,) if pipe.has_first else ()
        pipe.step(*args, target=x.flip(0) if pipe.has_last else None, return_outputs=False)


def flat(value: Any) -> Any:
    """A state to compare: tensors as bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().view(-1).tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(item) for item in value]
    return value


@pytest.mark.parametrize("block", BLOCKS)
def test_state_beside_parameters_goes_on_in_any_cut(block: str, tmp_path: Path) -> None:
    straight, saved = pipeline(block, [3]), pipeline(block, [1, 2])
    train(straight, range(6))
    train(saved, range(3))
    checkpoint.save(tmp_path, saved)
    for sizes in ([1, 2], [3], [1, 1, 1]):
        resumed = pipeline(block, sizes)
        checkpoint.load(tmp_path, resumed)
        train(resumed, range(3, 6))
        got, expected = resumed.state_dict(), straight.state_dict()
        for kind in ("params", "buffers", "extra_state", "optimizer"):
            assert flat(got[kind]) == flat(expected[kind]), (sizes, kind)
    state = straight.state_dict()
    assert state["buffers"] or state["extra_state"]
    assert set(state["params"]) | set(state["buffers"]) | set(state["extra_state"]) == set(
        straight.stages[0].submod.state_dict()
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_state_dict_alone_is_enough(block: str) -> None:
    writer, reader = (pipeline(block, [1, 1, 1], "paci") for _ in range(2))
    train(writer, range(3))
    state = copy.deepcopy(writer.state_dict())
    train(reader, range(7, 8))
    reader.load_state_dict(state)
    for pipe in (writer, reader):
        train(pipe, range(3, 6))
    assert flat(reader.state_dict()) == flat(writer.state_dict())


TORCH: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, lr_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    "asgd": lambda params: torch.optim.ASGD(params, lr=1e-2, t0=2),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "radam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "adadelta": torch.optim.Adadelta,
    "nesterov": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "tensor-lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(1e-2)),
}


@pytest.mark.parametrize("kind", TORCH)
def test_any_torch_optimizer_goes_on_in_any_cut(kind: str, tmp_path: Path) -> None:
    straight, saved = (pipeline(sizes=sizes, optimizer=TORCH[kind]) for sizes in ([3], [1, 2]))
    train(straight, range(6))
    train(saved, range(3))
    checkpoint.save(tmp_path, saved)
    for sizes in ([2, 1], [3]):
        resumed = pipeline(sizes=sizes, optimizer=TORCH[kind])
        checkpoint.load(tmp_path, resumed)
        train(resumed, range(3, 6))
        assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"]), sizes


class Shared(torch.optim.SGD):
    """An optimizer with a state that belongs to no parameter, a count in its groups, and both in its step."""

    def step(self, closure: Any = None) -> None:
        self.state["all"] = {"steps": self.state.get("all", {"steps": 0})["steps"] + 1}
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.1 / (group["k"] + self.state["all"]["steps"])
        super().step(closure)


class More(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": 3}


def test_what_an_optimizer_keeps_elsewhere_goes_on_too(tmp_path: Path) -> None:
    straight, saved, resumed = (pipeline(sizes=sizes, optimizer=Shared) for sizes in ([3], [1, 2], [2, 1]))
    train(straight, range(4))
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    checkpoint.load(tmp_path, resumed)
    train(resumed, range(2, 4))
    assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"])
    assert resumed._optimizers[0].optimizer.state["all"] == {"steps": 4}  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match=r"More\.state_dict\(\) has \['seen'\] beside states and groups"):
        pipeline(optimizer=lambda params: More(params, lr=0.1)).state_dict()


def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return paci_rt.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.2},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0, "name": "plain"},
        ],
        lr=1e-2,
    )


def groups(pipe: Any, stage: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pipe._optimizers[stage].optimizer.param_groups
    return found


def test_options_that_the_user_changed_come_back_by_parameter(tmp_path: Path) -> None:
    saved = pipeline(sizes=[1, 2], optimizer=grouped)
    train(saved, range(1))
    for stage in range(2):
        groups(saved, stage)[0].update(weight_decay=0.7, betas=(0.5, 0.6), lr=0.03)
    checkpoint.save(tmp_path, saved)
    turned = pipeline(sizes=[3], optimizer=lambda params: grouped(params[::-1]))
    checkpoint.load(tmp_path, turned)
    matrices, vectors = groups(turned, 0)
    assert (matrices["weight_decay"], matrices["betas"], matrices["lr"]) == (0.7, (0.5, 0.6), 0.03)
    assert (vectors["weight_decay"], vectors["lr"], vectors["name"]) == (0.0, 1e-2, "plain")
    train(saved, range(1, 3))
    train(turned, range(1, 3))
    assert flat(turned.state_dict()["params"]) == flat(saved.state_dict()["params"])


def test_frozen_parameters_and_their_group_options_survive(tmp_path: Path) -> None:
    def frozen(sizes: list[int]) -> paci_rt.LocalPipeline:
        modules = cut("batch-norm", sizes)
        for module in modules:
            for name, param in module.named_parameters():
                param.requires_grad_("block1.0" not in name)
        return paci_rt.LocalPipeline(
            modules,
            schedule="1f1b",
            n_microbatches=2,
            loss_fn=loss_fn,
            optimizer=lambda named: grouped([param for _, param in named]),
        )

    straight, saved, resumed = frozen([3]), frozen([1, 2]), frozen([2, 1])
    train(straight, range(4))
    train(saved, range(2))
    checkpoint.save(tmp_path, saved)
    checkpoint.load(tmp_path, resumed)
    train(resumed, range(2, 4))
    assert flat(resumed.state_dict()["params"]) == flat(straight.state_dict()["params"])


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def _at(path: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        *way, last = path.split("/")
        at: Any = state
        for step in way:
            at = at[int(step) if isinstance(at, list) else step]
        at[last] = change(at[last])

    return apply


LAST = "block2.1.bias"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a parameter is missing": (lambda state: state["params"].pop(LAST), "parameters, missing .*block2.1.bias"),
    "one too many": (lambda state: state["params"].update(x=torch.ones(1)), r"unexpected \['x'\]"),
    "shape": (_at(f"params/{LAST}", lambda value: value[:2]), r"block2\.1\.bias' is torch\.float32 of shape \(2,\)"),
    "dtype": (_at(f"params/{LAST}", Tensor.double), r"torch\.float64.*torch\.float32"),
    "a buffer is missing": (
        lambda state: state["buffers"].pop("block2.1.running_var"),
        r"buffers, missing \['block2\.1\.running_var'\]",
    ),
    "a buffer's shape": (_at("buffers/block2.1.running_var", lambda v: v[:1]), r"running_var' is .* shape \(1,\)"),
    "extra state": (lambda state: state["extra_state"].update(x=1), r"extra state, missing \[\], unexpected \['x'\]"),
    "a moment is missing": (lambda state: state["optimizer"][LAST].pop("exp_avg"), "saved by another optimizer"),
    "a moment's shape": (
        _at(f"optimizer/{LAST}/exp_avg", lambda value: value[:1]),
        r"'exp_avg' of 'block2\.1\.bias' has shape \(1,\)",
    ),
    "state is missing": (lambda state: state["optimizer"].pop(LAST), r"missing block2\.1\.bias"),
    "unknown state": (lambda state: state["optimizer"].update(x={}), r"optimizer state of \['x'\]"),
    "another optimizer": (_at("optimizers/1/optimizer", lambda _: "Lion"), "is of the optimizer Lion"),
    "amsgrad": (lambda state: state["optimizers"][1]["groups"][0]["options"].update(amsgrad=True), "amsgrad=True"),
    "another scheduler": (
        lambda state: state["optimizers"][1]["lr_scheduler"].update({"class": "LinearLR"}),
        "the state has LinearLR as lr_scheduler and this stage has StepLR",
    ),
    "no scheduler": (lambda state: state["optimizers"][1].update(lr_scheduler=None), "the state has no scheduler"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(what: str) -> None:
    spoil, words = BROKEN[what]
    source, target = (pipeline(sizes=[1, 2], lr_scheduler=step_lr) for _ in range(2))
    train(source, range(3))
    train(target, range(10, 11))
    state = source.state_dict()
    spoil(state)
    before = flat(target.state_dict())
    with pytest.raises(ValueError, match=words):
        target.load_state_dict(state)
    assert flat(target.state_dict()) == before


def test_user_code_that_refuses_its_state_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = (pipeline("extra-state", sizes=[1, 2], lr_scheduler=step_lr) for _ in range(2))
    train(source, range(3))
    train(target, range(10, 11))
    target.stages[1].submod.block2.fails = True  # type: ignore[union-attr]
    before = target.state_dict()
    before["extra_state"]["block2._extra_state"]["seen"] = 0  # what it took before it raised is its own affair
    target.stages[1].submod.block2.seen = 0  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="not this one"):
        target.load_state_dict(source.state_dict())
    assert flat(target.state_dict()) == flat(before)
    refused: list[Any] = []

    def refuse_once(self: Any, state: dict[str, Any]) -> None:
        if self is target._lr_schedulers[1] and not refused:
            refused.append(state)
            raise RuntimeError("this scheduler refuses")
        self.__dict__.update(state)

    monkeypatch.setattr(torch.optim.lr_scheduler.StepLR, "load_state_dict", refuse_once)
    target.stages[1].submod.block2.fails = False  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="this scheduler refuses"):
        target.load_state_dict(source.state_dict())
    assert refused
    assert flat(target.state_dict()) == flat(before)


def test_groups_that_cannot_be_joined_are_named(tmp_path: Path) -> None:
    saved = pipeline(sizes=[1, 2])
    train(saved, range(1))
    groups(saved, 1)[0]["weight_decay"] = 0.5
    checkpoint.save(tmp_path, saved)
    whole = pipeline(sizes=[3])
    before = flat(whole.state_dict())
    with pytest.raises(
        ValueError, match=r"'block0.* and 'block1.* in one parameter group.* weight_decay 0\.01 and 0\.5"
    ):
        checkpoint.load(tmp_path, whole)
    assert flat(whole.state_dict()) == before
    checkpoint.load(tmp_path, whole, optimizer=False)  # the way out: without optimizers
    after = whole.state_dict()
    assert flat(after["params"]) == flat(saved.state_dict()["params"])
    assert flat(after["buffers"]) == flat(saved.state_dict()["buffers"])
    assert after["windows"] == 0 and not any(after["optimizer"].values())


def test_a_checkpoint_of_the_format_before_is_read_and_says_what_it_lacks(tmp_path: Path) -> None:
    saved = pipeline(sizes=[1, 2], lr_scheduler=step_lr)
    train(saved, range(3))
    checkpoint.save(tmp_path, saved)
    index = json.loads((tmp_path / "index.json").read_text())
    for file in index["files"]:
        path = tmp_path / file["file"]
        content = torch.load(path, weights_only=True)
        (record,) = content["optimizers"]
        old = {"params": content["params"], "optimizer": content["optimizer"]}
        torch.save({**old, "lr_scheduler": record["lr_scheduler"]["state"]}, path)
        file.update(bytes=path.stat().st_size)
        del file["buffers"], file["extra_state"]
    (tmp_path / "index.json").write_text(json.dumps({**index, "version": 1}))
    names = [name for file in index["files"] for name in file["params"]]
    checkpoint.reshard(tmp_path, tmp_path / "moved", [names[:3], names[3:]])
    for folder in (tmp_path, tmp_path / "moved"):
        resumed = pipeline(sizes=[2, 1], lr_scheduler=step_lr)
        with pytest.warns(RuntimeWarning, match=r"older format, which keeps no buffers: 9 .* stay as they are"):
            checkpoint.load(folder, resumed)
        state, expected = resumed.state_dict(), saved.state_dict()
        for kind in ("params", "optimizer", "windows"):
            assert flat(state[kind]) == flat(expected[kind])
        assert [group["lr"] for stage in range(2) for group in groups(resumed, stage)] == [1e-3, 1e-3]
        assert all(scheduler.last_epoch == 3 for scheduler in resumed._lr_schedulers)  # type: ignore[union-attr]


def test_reshard_moves_buffers_with_their_parameters(tmp_path: Path) -> None:
    saved = pipeline(sizes=[1, 2], lr_scheduler=step_lr)
    train(saved, range(2))
    checkpoint.save(tmp_path / "a", saved)
    names = [name for name, _ in saved.named_parameters()]
    checkpoint.reshard(tmp_path / "a", tmp_path / "b", [names[8:], names[:8]])
    files = checkpoint.read_index(tmp_path / "b")["files"]
    assert [{name.split(".")[0] for name in file["buffers"]} for file in files] == [{"block2"}, {"block0", "block1"}]
    resumed = pipeline(sizes=[3], lr_scheduler=step_lr)
    checkpoint.load(tmp_path / "b", resumed)
    for pipe in (saved, resumed):
        train(pipe, range(2, 4))
    assert flat(resumed.state_dict()["params"]) == flat(saved.state_dict()["params"])
    assert flat(resumed.state_dict()["buffers"]) == flat(saved.state_dict()["buffers"])


def test_stages_whose_names_collide_keep_their_own() -> None:
    def make() -> paci_rt.LocalPipeline:
        modules = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(2)]
        return paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW)

    one, two = make(), make()
    train(one, range(3))
    two.load_state_dict(one.state_dict())
    assert flat(two.state_dict()) == flat(one.state_dict())
    assert {"stages.0.1.running_mean", "stages.1.1.running_mean"} < set(one.state_dict()["buffers"])


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path / "new", pipeline(), extra={"x": torch.ones(1)})
    assert not (tmp_path / "new").exists()


class Odd(Counting):
    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "peak": self.peak, "path": Path("x")}


def test_extra_state_that_no_file_can_give_back_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pipe = paci_rt.LocalPipeline([Blocks({"block": Odd()})], n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW)
    with pytest.raises(ValueError, match=r"extra state 'block\._extra_state' cannot be kept.*add_safe_globals"):
        checkpoint.save(tmp_path / "new", pipe)
    assert not (tmp_path / "new").exists()
    pipe.load_state_dict(pipe.state_dict())  # without a file it is no matter


class WithTable(nn.Module):
    """A table that every stage has under one name."""

    def __init__(self, number: int, value: float) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.register_buffer("table", torch.full((3,), value))
        self.add_module(f"layer{number}", nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x)) * self.table[0]  # type: ignore[index]
        return x


def test_a_buffer_on_several_stages_is_kept_once_and_must_be_one(tmp_path: Path) -> None:
    def make(*values: float) -> paci_rt.LocalPipeline:
        modules = [WithTable(number, value) for number, value in enumerate(values)]
        return paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=loss_fn, optimizer=paci_rt.AdamW)

    saved, other = make(0.5, 0.5), make(1.0, 1.0)
    checkpoint.save(tmp_path, saved)
    assert [file["buffers"] for file in checkpoint.read_index(tmp_path)["files"]] == [["table"], []]
    checkpoint.load(tmp_path, other)
    assert [float(stage.submod.table[0]) for stage in other.stages] == [0.5, 0.5]  # type: ignore[index,arg-type]
    with pytest.raises(ValueError, match="two stages have state named 'table' with different values"):
        make(0.5, 0.25).state_dict()


def save_on_rank(rank: int, group: Any, folder: str, sizes: list[int]) -> dict[str, Any]:
    def schedule(block: str = "batch-norm", modules: list[nn.Module] | None = None) -> Any:
        stage = paci_rt.PipelineStage((modules or cut(block, sizes))[rank], rank, len(sizes), group=group)
        optimizer = grouped(list(stage.parameters()))
        return paci_rt.Schedule1F1B(stage, 2, loss_fn, optimizer=optimizer, lr_scheduler=step_lr(optimizer))

    pipe = schedule()
    train(pipe, range(3))
    checkpoint.save(folder, pipe, group=group)
    after = schedule()
    checkpoint.load(folder, after, group=group)
    train(after, range(3, 5))
    # What does not fit on one process is refused on all, and changes none.
    spoiled = schedule()
    before = flat(spoiled.state_dict())
    if rank == 1:
        groups(spoiled, 0)[0]["params"].append(groups(spoiled, 0)[1]["params"].pop())
    with pytest.raises(ValueError, match="in one parameter group of this optimizer"):
        checkpoint.load(folder, spoiled, group=group)
    assert flat(spoiled.state_dict()["params"]) == before["params"]
    assert flat(spoiled.state_dict()["buffers"]) == before["buffers"]
    same = schedule(modules=[WithTable(number, 0.5) for number in range(len(sizes))])
    checkpoint.save(f"{folder}-same", same, group=group)
    differing = schedule(modules=[WithTable(number, float(number)) for number in range(len(sizes))])
    with pytest.raises(ValueError, match="two stages have state named 'table' with different values"):
        checkpoint.save(f"{folder}-differing", differing, group=group)
    return flat(after.state_dict())


def test_processes_keep_buffers_and_refuse_together(tmp_path: Path, workers: Any) -> None:
    sizes = [1, 1, 1]
    states = workers.run(save_on_rank, 3, str(tmp_path / "a"), sizes)
    straight = pipeline(sizes=[3], optimizer=grouped, lr_scheduler=step_lr)
    train(straight, range(5))
    expected = flat(straight.state_dict())
    for kind in ("params", "buffers", "optimizer"):
        assert {name: value for state in states for name, value in state[kind].items()} == expected[kind]
    files = checkpoint.read_index(tmp_path / "a-same")["files"]
    assert [file["buffers"] for file in files] == [["table"], [], []]
    assert not (tmp_path / "a-differing").exists()
