"""Files of tokens that others wrote, and shards that are no longer what their manifest says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from paci_rt.cli import main
from paci_rt.data import shards
from paci_rt.data.documents import find_source
from paci_rt.data.prepare import prepare
from paci_rt.data.shards import MANIFEST
from paci_rt.data.tokenizers import find_tokenizer
from paci_rt.errors import DataError
from paci_rt.train.data import load_corpus


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def counting(count: int, vocab_size: int = 50257) -> np.ndarray:
    return (np.arange(count, dtype=np.int64) * 7919 % vocab_size).astype(np.uint32)


def llm_c(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    kind = np.uint32 if magic == 20240801 else np.uint16
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.astype(kind).tobytes())
    return path


def test_nanogpt_and_llm_c_files_of_the_same_tokens_give_the_same_batches(tmp_path: Path) -> None:
    tokens = counting(6000)
    for part, some in (("train", tokens[:5000]), ("val", tokens[5000:])):
        (tmp_path / "nano").mkdir(exist_ok=True)
        some.astype(np.uint16).tofile(tmp_path / "nano" / f"{part}.bin")
        llm_c(tmp_path / "llmc" / f"tiny_{part}.bin", some)
        llm_c(tmp_path / "llama" / f"fineweb_{part}_000001.bin", some, 20240801, 7)
    for at in range(4):  # several files, as llm.c's FineWeb has them
        llm_c(tmp_path / "several" / f"fineweb_train_{at:06}.bin", tokens[at * 1250 : (at + 1) * 1250])
    llm_c(tmp_path / "several" / "fineweb_val_000000.bin", tokens[5000:])
    nano = load_corpus(tmp_path / "nano", vocab_size=50257, seq_len=32)
    for name in ("llmc", "llama", "several"):
        other = load_corpus(tmp_path / name, vocab_size=50257, seq_len=32)
        for step in range(5):
            assert torch.equal(nano.batch(step, 16, 32, 1)[0], other.batch(step, 16, 32, 1)[0])
        assert torch.equal(nano.validation(4, 32)[1], other.validation(4, 32)[1])
    assert len(load_corpus(tmp_path / "llmc" / "tiny_train.bin", vocab_size=50257, seq_len=32).train) == 4500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-1], "truncated.*5,000 tokens.*11,024 bytes.*11,023"),
        (lambda raw: raw[:2000], "truncated"),
        (lambda raw: raw[:1024], "truncated"),
        (lambda raw: raw + b"\0\0", "does not fit its header"),
        (lambda raw: raw[:4] + np.int32(2).tobytes() + raw[8:], "version 2: known are 20240520 with version 1"),
        (lambda raw: raw[:1024] + b"\xff\xff" + raw[1026:], "token 65535.*vocabulary has 50257"),
    ],
)
def test_damaged_llm_c_files_are_refused(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    file = llm_c(tmp_path / "a.bin", counting(5000))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=words) as caught:
        load_corpus(file, vocab_size=50257, seq_len=32)
    assert str(file) in str(caught.value)


def test_files_of_different_kinds_do_not_mix(tmp_path: Path) -> None:
    llm_c(tmp_path / "a_train.bin", counting(500))
    llm_c(tmp_path / "b_train.bin", counting(500), 20240801, 7)
    llm_c(tmp_path / "a_val.bin", counting(500))
    with pytest.raises(DataError, match="tokens of different types"):
        load_corpus(tmp_path, vocab_size=50257, seq_len=32)


# ----------------------------------------------------------------------------------------------- prepared folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("Some lines of text.\n" * 400)
    prepare(find_source([str(tmp_path / "a.txt")]), tmp_path / "out", find_tokenizer("bytes"), shard_tokens=3000)
    return tmp_path / "out"


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)


def change_manifest(folder: Path, **fields: object) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda one: (one / "train-00001.bin").unlink(), "train-00001.bin is missing"),
    "missing val shard": (lambda one: (one / "val-00000.bin").unlink(), "val-00000.bin is missing"),
    "truncated": (lambda one: os.truncate(one / "train-00001.bin", 5998), "train-00001.bin is truncated.*3,000 tokens"),
    "too long": (lambda one: os.truncate(one / "train-00001.bin", 6002), "train-00001.bin is too long"),
    "changed": (lambda one: flip(one / "train-00001.bin"), "train-00001.bin has changed: its sha256"),
    "changed val": (lambda one: flip(one / "val-00000.bin"), "val-00000.bin has changed"),
    "swapped": (lambda one: os.replace(one / "train-00000.bin", one / "train-00001.bin"), "missing"),
    "no manifest": (lambda one: (one / MANIFEST).unlink(), "train-00000.bin has the name of a shard.*copy that too"),
    "no JSON": (lambda one: (one / MANIFEST).write_text("{"), "cannot read .*manifest.json"),
    "another format": (lambda one: change_manifest(one, format="x"), "not written by paci-rt prepare"),
    "another version": (lambda one: change_manifest(one, version=2), "has version 2: this one reads 1"),
    "another dtype": (lambda one: change_manifest(one, dtype="float32"), "damaged.*dtype is 'float32'"),
    "no shards": (lambda one: change_manifest(one, train=[]), "damaged.*train has no shard"),
    "a path elsewhere": (
        lambda one: change_manifest(one, val=[{"file": "../../etc/passwd", "tokens": 5, "sha256": "0"}]),
        "is no name of a file in this folder",
    ),
    "a field more": (lambda one: change_manifest(one, more=1), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGE[case]
    load_corpus(folder, vocab_size=256, seq_len=32)
    damage(folder)
    with pytest.raises(DataError, match=words):
        load_corpus(folder, vocab_size=256, seq_len=32)
    before = sorted(folder.parent.rglob("*"))
    assert main(["train", "--data", str(folder), "--steps", "1", "--out", str(folder.parent / "saved")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("paci-rt: error: "), said
    assert sorted(folder.parent.rglob("*")) == before


def test_another_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds token 120 of tokenizer bytes.*vocabulary has 100; choose a model"):
        load_corpus(folder, vocab_size=100, seq_len=32)


def test_a_single_shard_is_sent_to_its_folder(folder: Path) -> None:
    with pytest.raises(DataError, match=r"is one shard of .*out: give that folder"):
        load_corpus(folder / "train-00000.bin", vocab_size=256, seq_len=32)


def test_a_shard_that_lost_its_manifest_is_refused_and_nanogpts_files_are_not(folder: Path, tmp_path: Path) -> None:
    """Its tokens may have four bytes, which nanoGPT's never have."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "train-00000.bin", alone)
    with pytest.raises(DataError, match=r"no manifest\.json is beside it"):
        load_corpus(alone / "train-00000.bin", vocab_size=256, seq_len=32)
    (alone / "train-00000.bin").rename(alone / "train.bin")
    assert load_corpus(alone / "train.bin", vocab_size=256, seq_len=32).train.dtype == np.uint16


def test_large_folders_are_hashed_once_and_again_when_they_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "REMEMBERED_BYTES", 0)
    hashed: list[Path] = []
    real = shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda file: hashed.append(file) or real(file))
    load_corpus(folder, vocab_size=256, seq_len=32)
    count = len(hashed)
    assert count == len(list(folder.glob("*.bin")))
    load_corpus(folder / MANIFEST, vocab_size=256, seq_len=32)
    assert len(hashed) == count
    stamps = os.stat(folder / "train-00000.bin")
    flip(folder / "train-00000.bin")
    os.utime(folder / "train-00000.bin", ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(DataError, match=r"train-00000\.bin has changed"):
        load_corpus(folder, vocab_size=256, seq_len=32)
