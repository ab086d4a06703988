"""Damage in a checkpoint: found before anything is overwritten, in one line, and with an offer where there is one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import paci_rt
from paci_rt import checkpoint
from paci_rt.runtime.checkpoint_index import digest_of
from support.checkpoint_mutations import rehash, spoil
from support.stateful import adamw, flat, pipeline, train

SEEDS = range(150)


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def torch_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def everything(pipe: Any) -> Any:
    return flat(pipe.state_dict()), torch.get_rng_state().tolist(), random.getstate()


def refusal(folder: Path, target: Any) -> str | None:
    """What loading says, or None if it works; any other error goes through."""
    try:
        checkpoint.load(folder, target)
    except paci_rt.CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("block", "optimizer"), [("batch-norm", adamw), ("batch-norm", torch_adamw), ("extra-state", adamw)]
)
def test_any_damage_is_one_line_and_changes_nothing(tmp_path: Path, block: str, optimizer: Any) -> None:
    def make() -> paci_rt.LocalPipeline:
        return pipeline(block, [1, 2], optimizer=optimizer, lr_scheduler=step_lr)

    good, bad = tmp_path / "good", tmp_path / "bad"
    saved = make()
    train(saved, range(3))
    checkpoint.save(good, saved, extra={"note": [1, "two"]})
    target = make()
    train(target, range(10, 11))
    before, refused, taken = everything(target), 0, []
    for seed in SEEDS:
        shutil.copytree(good, bad)
        what = spoil(bad, random.Random(f"{block} {optimizer.__name__} {seed}"))
        said = refusal(bad, target)
        if said is not None:
            refused += 1
            assert said and "\n" not in said, (seed, what)
            assert everything(target) == before, (seed, what, said)
        else:
            taken.append(what)  # another value of the right kind
            target = make()
            train(target, range(10, 11))
            before = everything(target)
        shutil.rmtree(bad)
    # Only what was given the right hash may be taken.
    assert all(what.startswith(("content", "hashed index")) or what.endswith(", hashed") for what in taken), taken
    assert refused > 0.85 * len(SEEDS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pipe = pipeline(sizes=[1, 2], lr_scheduler=step_lr)
    train(pipe, range(2))
    checkpoint.save(tmp_path / "a", pipe)
    return tmp_path / "a"


def parts(folder: Path) -> list[Path]:
    return [folder / file["file"] for file in json.loads((folder / "index.json").read_text())["files"]]


def test_every_single_flipped_bit_is_found(saved: Path) -> None:
    rng = random.Random(5)
    for path in [*parts(saved), saved / "index.json"]:
        good = path.read_bytes()
        for at in rng.sample(range(len(good)), 60):
            raw = bytearray(good)
            raw[at] ^= 1 << rng.randrange(8)
            path.write_bytes(raw)
            if path.name == "index.json" and as_read(raw) == as_read(good):
                continue  # a space that became another one
            with pytest.raises(paci_rt.CheckpointError, match=r"damaged|cannot be read|not the index|has version"):
                checkpoint.verify(saved)
        path.write_bytes(good)
    assert checkpoint.verify(saved)["windows"] == 2


def as_read(raw: bytes | bytearray) -> Any:
    try:
        return json.loads(raw.decode())
    except ValueError:
        return object()


def field(*way: Any) -> Callable[[Any, Any], None]:
    def put(index: Any, value: Any) -> None:
        for key in way[:-1]:
            index = index[key]
        index[way[-1]] = value

    return put


FIELDS: list[tuple[str, Callable[[Any, Any], None], Any, str]] = [
    (
        "a parent's file",
        field("files", 0, "file"),
        "../../x.pt",
        r"files\[0\]\.file is '\.\./\.\./x\.pt', not the name",
    ),
    ("a file elsewhere", field("files", 1, "file"), "/etc/passwd", r"files\[1\]\.file is '/etc/passwd', not the name"),
    ("the folder itself", field("files", 0, "file"), ".", r"files\[0\]\.file is '\.', not the name"),
    ("a hidden file", field("files", 0, "file"), ".lock", r"files\[0\]\.file is '\.lock', not the name"),
    ("no size", field("files", 0, "bytes"), None, r"files\[0\]\.bytes is None, not an integer of at least 1"),
    ("a huge size", field("files", 0, "bytes"), 2**70, r"files\[0\]\.bytes is an integer of 71 bits"),
    ("a fraction", field("windows"), 1.5, r"windows is 1\.5, not an integer of at least 0"),
    ("no number", field("windows"), float("nan"), r"windows is nan, not an integer"),
    ("before the start", field("windows"), -1, r"windows is -1, not an integer"),
    ("a bool", field("windows"), True, r"windows is True, not an integer"),
    ("no files", field("files"), [], r"files is \[\], not a list of files"),
    ("no names", field("files", 0, "params"), "abc", r"files\[0\]\.params is 'abc', not a list of names"),
    ("no hash", field("files", 0, "sha256"), "0" * 40, r"files\[0\]\.sha256 is '0+', not 64 hexadecimal digits"),
    ("another version", field("version"), "4", r"has version '4'; this version of paci_rt reads 1, 2, 4"),
    ("a version to come", field("version"), 5, r"has version 5; this version of paci_rt reads 1, 2, 4"),
    ("no extra", field("extra"), [], r"extra is \[\], not an object"),
]


@pytest.mark.parametrize(("put", "value", "words"), [one[1:] for one in FIELDS], ids=[one[0] for one in FIELDS])
def test_each_field_of_the_index_is_looked_at(saved: Path, put: Any, value: Any, words: str) -> None:
    path = saved / "index.json"
    index = json.loads(path.read_text())
    put(index, value)
    index["sha256"] = digest_of(index)  # the hash of the nonsense
    path.write_text(json.dumps(index))
    with pytest.raises(paci_rt.CheckpointError, match=words):
        checkpoint.read_index(saved)


def test_names_that_come_twice_are_refused(saved: Path) -> None:
    path = saved / "index.json"
    good = json.loads(path.read_text())
    for spoil_it, words in [
        (lambda files: files.append(files[0]), "it names file 'step-"),
        (lambda files: files[1]["params"].append(files[0]["params"][0]), "it names params 'block0.0.weight' twice"),
        (lambda files: files[1]["buffers"].append(files[1]["buffers"][0]), "it names buffers 'block1"),
    ]:
        index = json.loads(json.dumps(good))
        spoil_it(index["files"])
        index["sha256"] = digest_of(index)
        path.write_text(json.dumps(index))
        with pytest.raises(paci_rt.CheckpointError, match=words):
            checkpoint.read_index(saved)


def test_an_index_that_is_no_json_is_one_line(saved: Path) -> None:
    path = saved / "index.json"
    for raw in (b"", b"\xff\xfe", b"[" * 100_000, b'{"format": ' + b"9" * 5000, b"null", b"[]", b'"text"'):
        path.write_bytes(raw)
        with pytest.raises(paci_rt.CheckpointError, match=r"cannot be read|is not the index") as caught:
            checkpoint.read_index(saved)
        assert "\n" not in str(caught.value)


def swap(path: Path, other: Path) -> None:
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def test_files_that_changed_places_are_noticed(saved: Path) -> None:
    first, second = parts(saved)
    swap(first, second)
    with pytest.raises(paci_rt.CheckpointError, match="missing or incomplete: it has"):
        checkpoint.read_index(saved)
    for path in (first, second):
        rehash(saved / "index.json", path)
    with pytest.raises(paci_rt.CheckpointError, match="is not the file that the index means: params 'block"):
        checkpoint.load(saved, pipeline(sizes=[1, 2], lr_scheduler=step_lr))


def as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def as_pipe(path: Path) -> None:
    import os

    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(("put", "words"), [(as_link, "symbolic link"), (as_pipe, "no plain file"), (as_folder, "")])
@pytest.mark.parametrize("which", ["index", "part"])
def test_only_plain_files_are_read(saved: Path, put: Callable[[Path], None], words: str, which: str) -> None:
    put(saved / "index.json" if which == "index" else parts(saved)[1])
    with pytest.raises(paci_rt.CheckpointError, match=words or "holds no checkpoint|no plain file|cannot be read"):
        checkpoint.read_index(saved)


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, list[Any]]:
    """A folder with the checkpoints after 1, 2 and 3 updates, and the states that they are of."""
    pipe, states = pipeline(sizes=[1, 2], lr_scheduler=step_lr), []
    for window in range(4):
        train(pipe, range(window, window + 1))
        checkpoint.save(tmp_path / "a", pipe, keep=3)
        states.append(flat(pipe.state_dict()))
    return tmp_path / "a", states


def test_the_last_ones_are_kept_and_each_can_be_loaded(several: tuple[Path, list[Any]]) -> None:
    folder, states = several
    names = sorted(path.name for path in folder.glob("*.json"))
    assert names == ["index-00000002.json", "index-00000003.json", "index-00000004.json", "index.json"]
    assert len(list(folder.iterdir())) == 4 + 3 * 2
    for at in (2, 3, 4):
        pipe = pipeline(sizes=[1, 2], lr_scheduler=step_lr)
        checkpoint.load(folder / f"index-{at:08d}.json", pipe)
        assert flat(pipe.state_dict()) == states[at - 1]
    checkpoint.save(folder, pipe)  # keeps one
    assert sorted(path.name for path in folder.glob("*.json")) == ["index.json"]
    assert len(list(folder.iterdir())) == 1 + 2


@pytest.mark.parametrize("damage", ["a bit of a part", "the index", "a part is gone", "two are bad"])
def test_an_older_checkpoint_is_offered(several: tuple[Path, list[Any]], damage: str) -> None:
    folder, states = several
    whole = 4 if damage == "the index" else 2 if damage == "two are bad" else 3
    if damage == "the index":
        (folder / "index.json").write_text("{")
    elif damage == "a part is gone":
        parts(folder)[0].unlink()
    else:
        flip(parts(folder)[1])
    if damage == "two are bad":
        flip(folder / json.loads((folder / "index-00000003.json").read_text())["files"][0]["file"])
    target = pipeline(sizes=[2, 1], lr_scheduler=step_lr)
    before = flat(target.state_dict())
    offer = (
        rf"; the checkpoint after {whole} updates in (\S*index-0000000{whole}\.json) is whole: resume from that file"
    )
    with pytest.raises(paci_rt.CheckpointError, match=offer) as caught:
        checkpoint.load(folder, target)
    assert flat(target.state_dict()) == before
    path = str(caught.value).split(" updates in ")[1].split(" is whole")[0]
    checkpoint.load(path, target)
    assert flat(target.state_dict()["params"]) == states[whole - 1]["params"]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def test_a_run_that_went_back_keeps_what_it_saved_last(several: tuple[Path, list[Any]]) -> None:
    folder, _ = several
    pipe = pipeline(sizes=[1, 2], lr_scheduler=step_lr)
    checkpoint.load(folder / "index-00000002.json", pipe)
    train(pipe, range(10, 11))
    checkpoint.save(folder, pipe, keep=2)  # after 3 updates, where another one was
    names = sorted(path.name for path in folder.glob("*.json"))
    assert names == ["index-00000003.json", "index-00000004.json", "index.json"]
    assert checkpoint.verify(folder)["windows"] == 3
    assert checkpoint.verify(folder / "index-00000004.json")["windows"] == 4


def test_a_checkpoint_without_hashes_is_read_and_says_so(saved: Path) -> None:
    path = saved / "index.json"
    index = json.loads(path.read_text())
    old = {key: value for key, value in index.items() if key not in ("sha256", "number")}
    files = [
        {key: file[key] for key in ("file", "bytes", "params", "buffers", "extra_state")} for file in index["files"]
    ]
    path.write_text(json.dumps({**old, "version": 2, "files": files}))
    with pytest.warns(RuntimeWarning, match="format 2, which has no hashes"):
        checkpoint.load(saved, pipeline(sizes=[2, 1], lr_scheduler=step_lr))


@pytest.mark.parametrize("keep", [0, -1, True, 1.0, "2"])
def test_keep_must_be_a_count(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(ValueError, match=r"keep is .*: give an integer of at least 1"):
        checkpoint.save(tmp_path, pipeline(), keep=keep)
