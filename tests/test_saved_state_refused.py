"""A saved state that does not fit changes nothing, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint
from support.stateful import WIDTH, Blocks, Counting, cut, flat, grouped, groups, loss_fn, pipeline, train


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
