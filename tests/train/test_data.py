from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paci_rt.train import data
from paci_rt.train.data import Corpus, load_corpus


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "paci_rt"


def open_text(path: Path, seq_len: int = 4) -> Corpus:
    return load_corpus(path, vocab_size=256, seq_len=seq_len)


def counting(n: int) -> np.ndarray:
    return (np.arange(n, dtype=np.int64) * 7919 % 50257).astype(np.int64)


def test_standard_library_is_real_text_and_built_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load_corpus(None, vocab_size=256, seq_len=128)
    assert len(corpus.train) > 1_000_000
    assert 0.02 < len(corpus.val) / len(corpus.train) < 0.3
    kept, held_back = bytes(corpus.train), bytes(corpus.val)
    assert (b"def namedtuple(" in kept) != (b"def namedtuple(" in held_back)  # collections, in one part only
    assert b"site-packages/torch" not in kept
    assert len(list(own_cache.iterdir())) == 1  # no temporary folder stays behind
    monkeypatch.setattr(data, "_write_parts", None)  # a second build would fail
    again = load_corpus(None, vocab_size=256, seq_len=128)
    assert bytes(again.val) == held_back


def test_text_file_is_split_at_the_last_tenth(tmp_path: Path) -> None:
    text = ("Überraschung, " * 50).encode()
    file = tmp_path / "a.txt"
    file.write_bytes(text)
    corpus = open_text(file)
    assert bytes(corpus.train) + bytes(corpus.val) == text
    assert len(corpus.val) == len(text) // 10


@pytest.mark.parametrize("count", [3, 25])
def test_folder_of_text_files(tmp_path: Path, own_cache: Path, count: int) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for i in range(count):
        (folder / ("deeper" if i % 2 else ".") / f"{i:02}.txt").write_text(f"<{i:02}>" * 20)
    (folder / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / ".hidden").write_text("hidden")
    corpus = open_text(folder)
    everything = bytes(corpus.train) + bytes(corpus.val)
    for i in range(count):
        assert everything.count(f"<{i:02}>".encode()) == 20
    assert b"PNG" not in everything
    assert b"hidden" not in everything
    if count >= 10:  # whole files are held back: none appears in both parts
        assert not {bytes(corpus.train)[i : i + 4] for i in range(0, len(corpus.train), 4)} & {
            bytes(corpus.val)[i : i + 4] for i in range(0, len(corpus.val), 4)
        }
    (folder / "new.txt").write_text("something new" * 20)
    assert b"something new" in bytes(open_text(folder).train) + bytes(open_text(folder).val)


def test_lost_race_for_the_cache_uses_the_winner(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some text " * 40)
    build = data._write_parts

    def and_somebody_else_too(files: list[Path], target: Path) -> None:
        build(files, target)
        winner = target.parent / target.name.removeprefix(".").rpartition("-")[0]
        winner.mkdir()
        build(files, winner)

    monkeypatch.setattr(data, "_write_parts", and_somebody_else_too)
    assert bytes(open_text(folder).train).startswith(b"some text")
    assert [entry.name.startswith("text-") for entry in own_cache.iterdir()] == [True]


def test_token_files_are_mapped_and_kept_apart(tmp_path: Path) -> None:
    tokens = counting(5000).astype(np.uint16)
    tokens[:4000].tofile(tmp_path / "train.bin")
    tokens[4000:].tofile(tmp_path / "val.bin")
    folder = load_corpus(tmp_path, vocab_size=50257, seq_len=16)
    assert isinstance(folder.train, np.memmap)
    assert np.array_equal(folder.train, tokens[:4000])
    assert np.array_equal(folder.val, tokens[4000:])
    single = load_corpus(tmp_path / "train.bin", vocab_size=50257, seq_len=16)
    assert np.array_equal(np.concatenate([single.train, single.val]), tokens[:4000])
    assert len(single.val) == 400


def test_batches_are_pure_and_shifted_by_one() -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    corpus = Corpus(name="numbers", train=tokens[:1500], val=tokens[1500:], vocab_size=2000)
    x, y = corpus.batch(5, 64, 10, seed=3)
    assert x.shape == y.shape == (64, 10)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert int(y.max()) < 1500
    assert len(set(x[:, 0].tolist())) > 40  # spread out, not one place
    again, _ = Corpus(name="copy", train=tokens[:1500], val=tokens[1500:], vocab_size=2000).batch(5, 64, 10, seed=3)
    assert torch.equal(again, x)
    assert not torch.equal(corpus.batch(6, 64, 10, seed=3)[0], x)
    assert not torch.equal(corpus.batch(5, 64, 10, seed=4)[0], x)


def test_batches_reach_both_ends_of_the_training_part() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    corpus = Corpus(name="numbers", train=tokens, val=tokens, vocab_size=12)
    starts = {int(s) for window in range(20) for s in corpus.batch(window, 16, 8, seed=0)[0][:, 0]}
    assert starts == {0, 1, 2, 3}  # the last one has its target in the last token


def test_validation_is_fixed_and_from_the_validation_part() -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    corpus = Corpus(name="numbers", train=tokens[:1500], val=tokens[1500:], vocab_size=2000)
    x, y = corpus.validation(10, 20)
    assert torch.equal(y, x + 1)
    assert int(x.min()) == 1500
    assert len(set(x.flatten().tolist())) == 200  # ten sequences that do not overlap
    assert torch.equal(corpus.validation(10, 20)[0], x)


def write(path: Path, content: bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.tobytes())
    return path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.bin", b"\1\2\3", "odd size of 3"),
        ("a.bin", b"", "is empty"),
        ("a.bin", counting(3000).astype(np.int32), "looks like int32"),
        ("a.bin", counting(3000).astype(np.int64), "looks like int64"),
        ("a.bin", (counting(3000) % 256).astype(np.float32), "looks like float32"),
        ("a.bin", counting(3000).astype(np.float32), "looks like float32"),
        ("a.bin", counting(3000).astype(np.float64), "looks like float64"),
        ("a.bin", np.random.default_rng(0).normal(size=3000).astype(np.float32), "vocabulary has 50257.*uint16"),
        ("a.bin", np.array([1, 2, 50257, 3] * 40, dtype=np.uint16), "token 50257.*vocabulary has 50257"),
        ("a.bin", np.arange(50, dtype=np.uint16), "validation part has 5 tokens and one sequence needs 17"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"short text", "too short"),
        ("a.npy", b"\x93NUMPY\x01\0v\0", "not text"),
        ("only/train.bin", np.arange(500, dtype=np.uint16), None),
    ],
)
def test_bad_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes | np.ndarray, words: str | None
) -> None:
    file = write(tmp_path / name, content)
    if words is None:
        file, words = file.parent, r"no val\.bin"
    with pytest.raises(ValueError, match=words) as caught:
        load_corpus(file, vocab_size=50257, seq_len=16)
    assert str(file) in str(caught.value)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        open_text(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder holds no text file"):
        open_text(tmp_path / "folder")
    (tmp_path / "folder" / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty or too short"):
        open_text(tmp_path / "folder")


def test_late_foreign_token_is_caught_when_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_SCAN_TOKENS", 16 * 4)
    tokens = np.full(1000, 9, dtype=np.uint16)
    tokens[10:60] = 300  # between the blocks that opening looks at
    corpus = load_corpus(write(tmp_path / "a.bin", tokens), vocab_size=256, seq_len=16)
    with pytest.raises(ValueError, match="token 300"):
        corpus.batch(0, 400, 16, seed=0)


def test_small_vocabulary_refuses_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 256"):
        load_corpus(write(tmp_path / "a.txt", b"text " * 50), vocab_size=128, seq_len=4)


def test_unusable_cache_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "occupied", b"a file where the cache folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        load_corpus(None, vocab_size=256, seq_len=4)
