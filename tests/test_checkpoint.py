from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint
from support.toy import make_muon

WIDTH = 6


class Layers(nn.ModuleDict):
    """Some layers of a model whose parameters are named ``<layer>.weight`` however it is cut."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.tanh(layer(x))
        return x


def cut(sizes: Sequence[int], width: int = WIDTH, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    stages, at = [], 0
    for size in sizes:
        layers = {}
        for number in range(at, at + size):
            torch.manual_seed(number)
            layers[f"layer{number}"] = nn.Linear(width, width, dtype=dtype)
        stages.append(Layers(layers))
        at += size
    return stages


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).float().pow(2).mean()


def make_optimizer(kind: str, params: Any) -> torch.optim.Optimizer:
    if kind == "adamw":
        return paci_rt.AdamW(params, lr=1e-2)
    if kind == "nadam":
        return paci_rt.NAdam(params, lr=1e-2)
    if kind == "lion":
        return paci_rt.Lion(params, lr=1e-3)
    if kind == "muon":
        return make_muon(params)
    if kind == "sgd":
        return paci_rt.SGD(params, lr=1e-2, momentum=0.9)
    return torch.optim.AdamW(params, lr=1e-2)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def pipeline(sizes: Sequence[int], kind: str = "adamw", schedule: str = "1f1b", **shape: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        cut(sizes, **shape),
        schedule=schedule,
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda named: make_optimizer(kind, [param for _, param in named]),
        lr_scheduler=halving,
    )


def train(pipe: Any, windows: range, dtype: torch.dtype = torch.float32) -> None:
    for window in windows:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(window)).to(dtype)
        args = (x,) if pipe.has_first else ()
        pipe.step(*args, target=x.flip(0) if pipe.has_last else None, return_outputs=False)


def sha(pipe: Any) -> str:
    pipe.drain()
    return paci_rt.params_sha256(sorted(pipe.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "nadam", "lion", "muon", "sgd", "torch-adamw"])
def test_any_cut_goes_on_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    straight = pipeline([4], kind, dtype=dtype)
    train(straight, range(6), dtype)
    saved = pipeline([1, 3], kind, dtype=dtype)
    train(saved, range(3), dtype)
    checkpoint.save(tmp_path, saved, extra={"note": [1, "two"]})
    for sizes in ([4], [1, 3], [2, 1, 1]):
        resumed = pipeline(sizes, kind, dtype=dtype)
        assert checkpoint.load(tmp_path, resumed) == {"note": [1, "two"]}
        assert sha(resumed) == sha(saved)
        train(resumed, range(3, 6), dtype)
        assert sha(resumed) == sha(straight), sizes
        assert resumed.state_dict()["windows"] == 6


def test_saving_drains_and_the_writer_goes_on_as_the_reader_does(tmp_path: Path) -> None:
    writer = pipeline([2, 1, 1], schedule="paci")
    train(writer, range(3))
    checkpoint.save(tmp_path, writer)
    train(writer, range(3, 6))
    reader = pipeline([2, 1, 1], schedule="paci")
    checkpoint.load(tmp_path, reader)
    train(reader, range(3, 6))
    assert sha(reader) == sha(writer)
    undrained = pipeline([2, 1, 1], schedule="paci")
    train(undrained, range(6))
    assert sha(undrained) != sha(writer)  # so the drain is part of what a checkpoint means


def test_one_file_a_stage_and_no_trace_of_the_checkpoint_before(tmp_path: Path) -> None:
    pipe = pipeline([2, 2])
    train(pipe, range(1))
    checkpoint.save(tmp_path, pipe)
    first = {file.name for file in tmp_path.iterdir()}
    (tmp_path / "mine.txt").write_text("not a checkpoint's")
    (tmp_path / ".step-00000009-stage-0-of-2-ab.pt.part").write_text("cut off")
    train(pipe, range(1, 2))
    checkpoint.save(tmp_path, pipe)
    second = {file.name for file in tmp_path.iterdir()}
    assert first & second == {"index.json"}
    assert len(second) == 4  # two stages, the index, and the file that is none of ours
    index = checkpoint.read_index(tmp_path)
    assert index["windows"] == 2
    assert [len(file["params"]) for file in index["files"]] == [4, 4]


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline([2, 2])
    train(pipe, range(1))
    checkpoint.save(tmp_path, pipe)
    old = sha(pipe)
    train(pipe, range(1, 2))
    save, calls = torch.save, []

    def fails_on_the_second(content: Any, stream: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            stream.write(b"half a file")
            raise OSError(28, "No space left on device")
        save(content, stream)

    monkeypatch.setattr(torch, "save", fails_on_the_second)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, pipe)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*.part"))
    again = pipeline([2, 2])
    checkpoint.load(tmp_path, again)
    assert sha(again) == old
    train(pipe, range(2, 3))
    checkpoint.save(tmp_path, pipe)  # and the folder recovers
    assert len(list(tmp_path.iterdir())) == 3


class TiedEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


class TiedStart(nn.Module):
    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Linear(WIDTH, WIDTH, bias=False)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.table(x))
        return self.table(x) if self.whole else x  # type: ignore[no-any-return]


TIES = (paci_rt.TiedWeight(owner_stage=0, owner="table.weight", reader_stage=1, reader="head.weight"),)


def tied_pipeline(stages: int) -> tuple[paci_rt.LocalPipeline, tuple[paci_rt.TiedWeight, ...]]:
    modules = [TiedStart(whole=True)] if stages == 1 else [TiedStart(whole=False), TiedEnd()]
    ties = TIES if stages == 2 else ()
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule="1f1b",
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda named: paci_rt.AdamW([param for _, param in named], lr=1e-2),
        tied_weights=ties,
    )
    return pipe, ties


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_tied_weight_is_stored_once_and_read_twice(tmp_path: Path, before: int, after: int) -> None:
    saved, ties = tied_pipeline(before)
    train(saved, range(2))
    checkpoint.save(tmp_path, saved, tied_weights=ties)
    assert [file["params"] for file in checkpoint.read_index(tmp_path)["files"]] == [["table.weight"], []][:before]
    resumed, ties = tied_pipeline(after)
    checkpoint.load(tmp_path, resumed, tied_weights=ties)
    expected = dict(saved.named_parameters())["table.weight"]
    for name, param in resumed.named_parameters():
        assert torch.equal(param, expected), name
    # Moments went along too: both go on alike. One stage sums the tied gradient's two terms in another order.
    train(saved, range(2, 4))
    train(resumed, range(2, 4))
    got = dict(resumed.named_parameters())["table.weight"]
    torch.testing.assert_close(got, dict(saved.named_parameters())["table.weight"], rtol=0, atol=1e-6)


def test_reshard(tmp_path: Path) -> None:
    pipe = pipeline([1, 3])
    train(pipe, range(2))
    checkpoint.save(tmp_path / "a", pipe, extra={"x": 1})
    names = [name for name, _ in pipe.named_parameters()]
    checkpoint.reshard(tmp_path / "a", tmp_path / "b", [names[:4], names[4:6], names[6:]])
    index = checkpoint.read_index(tmp_path / "b")
    assert [file["params"] for file in index["files"]] == [names[:4], names[4:6], names[6:]]
    there = pipeline([2, 1, 1])
    assert checkpoint.load(tmp_path / "b", there) == {"x": 1}
    train(there, range(2, 4))
    train(pipe, range(2, 4))
    assert sha(there) == sha(pipe)
    for layout in ([names[:4]], [names, names[:1]], [[*names, "other"]]):
        with pytest.raises(ValueError, match="exactly once"):
            checkpoint.reshard(tmp_path / "a", tmp_path / "c", layout)
    assert not (tmp_path / "c").exists()


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path: Path) -> None:
    saved = pipeline([2, 2])
    train(saved, range(1))
    checkpoint.save(tmp_path, saved)
    for shape, words in [
        ({"sizes": [2, 3]}, r"missing layer4\.bias, layer4\.weight, left over nothing"),
        ({"sizes": [2, 1]}, r"missing nothing, left over layer3\.bias, layer3\.weight"),
        ({"sizes": [2, 2], "width": 5}, r"layer0\.weight as torch\.float32 \(6, 6\).*\(5, 5\)"),
        ({"sizes": [2, 2], "dtype": torch.bfloat16}, r"layer0\.weight as torch\.float32.*torch\.bfloat16"),
    ]:
        other = pipeline(**shape)  # type: ignore[arg-type]
        before = sha(other)
        with pytest.raises(ValueError, match=words):
            checkpoint.load(tmp_path, other)
        assert sha(other) == before


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    pipe = pipeline([2, 2])
    with pytest.raises(ValueError, match=r"no checkpoint: it has no index\.json"):
        checkpoint.load(tmp_path, pipe)
    checkpoint.save(tmp_path, pipe)
    index_file = tmp_path / "index.json"
    good = index_file.read_text()
    index_file.write_text(good[: len(good) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path, pipe)
    index_file.write_text('{"files": []}')
    with pytest.raises(ValueError, match="not the index of a paci_rt checkpoint"):
        checkpoint.load(tmp_path, pipe)
    index_file.write_text(json.dumps({**json.loads(good), "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        checkpoint.load(tmp_path, pipe)
    index_file.write_text(good)
    part = tmp_path / json.loads(good)["files"][1]["file"]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{part.name} is missing or incomplete"):
        checkpoint.load(tmp_path, pipe)
    part.unlink()
    with pytest.raises(ValueError, match=rf"{part.name} is missing or incomplete"):
        checkpoint.load(tmp_path, pipe)


def save_on_rank(rank: int, group: Any, folder: str, sizes: Sequence[int]) -> None:
    stage = paci_rt.PipelineStage(cut(sizes)[rank], rank, len(sizes), group=group)
    optimizer = make_optimizer("adamw", stage.parameters())
    pipe = paci_rt.SchedulePACI(stage, 2, loss_fn, optimizer=optimizer, lr_scheduler=halving(optimizer))
    train(pipe, range(3))
    checkpoint.save(folder, pipe, group=group)
    train(pipe, range(3, 5))
    checkpoint.load(folder, pipe, group=group)
    with pytest.raises(OSError, match=r"stage 0: .*stage 1: .*stage 2: "):
        checkpoint.save("/dev/null/folder", pipe, group=group)
    same = paci_rt.PipelineStage(cut([1])[0], rank, len(sizes), group=group)  # every process has the same names
    with pytest.raises(ValueError, match=r"two stages have a parameter named 'layer0\.weight'"):
        checkpoint.save(folder, paci_rt.Schedule1F1B(same, 2, loss_fn), group=group)


def test_processes_save_together_and_fail_together(tmp_path: Path, workers: Any) -> None:
    workers.run(save_on_rank, 3, str(tmp_path / "new" / "folder"), [1, 2, 1])
    reference = pipeline([1, 2, 1], schedule="paci")
    train(reference, range(3))
    loaded = pipeline([4])
    checkpoint.load(tmp_path / "new" / "folder", loaded)
    assert sha(loaded) == sha(reference)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 4
