"""From text of every kind to shards, and back as what the trainer reads."""

from __future__ import annotations

import gzip
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paci_rt.cli import main
from paci_rt.data.documents import Source, find_source
from paci_rt.data.prepare import prepare
from paci_rt.data.shards import MANIFEST, Joined, open_prepared, read_manifest
from paci_rt.data.tokenizers import Tokenizer, find_tokenizer
from paci_rt.errors import DataError
from paci_rt.train.data import load_corpus

TEXTS = [f"Document {at}. " + "Überraschung\n" * (at % 7) for at in range(300)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the tokenizers library that splits at white space, with an end of text."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return folder


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def tokens_in(folder: Path, vocab_size: int = 1 << 32) -> tuple[np.ndarray, np.ndarray]:
    train, val = open_prepared(folder, vocab_size)
    return np.array(train[:]), np.array(val[:])


def as_text(tokens: np.ndarray) -> list[str]:
    return bytes(tokens.astype(np.uint8)).decode().split("\0")[:-1]


def prepared(tmp_path: Path, *names: str | Path, out: str = "out", tokenizer: str = "bytes", **options: Any) -> Path:
    source = find_source([str(name) for name in names], options.pop("text_key", "text"))
    prepare(source, tmp_path / out, find_tokenizer(tokenizer, options.pop("end_token", None)), **options)
    return tmp_path / out


def parquet(path: Path, texts: list[str]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    files.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
    return path


def saved_dataset(path: Path, texts: list[str]) -> Path:
    as_dataset(texts).save_to_disk(str(path))
    return path


def as_dataset(texts: list[str]) -> Any:
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table({"text": texts})), fingerprint="texts")


def text_files(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for at, text in enumerate(texts):
        (path / f"{at:04}.txt").write_text(text)
    return path


def zipped(path: Path, texts: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


def listed(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    return path


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (jsonl, "a.jsonl"),
        (zipped, "a.jsonl.gz"),
        (listed, "a.json"),
        (parquet, "a.parquet"),
        (saved_dataset, "saved"),
        (text_files, "texts"),
    ],
)
def test_every_kind_of_source_gives_the_same_tokens(tmp_path: Path, make: Any, name: str) -> None:
    folder = prepared(tmp_path, make(tmp_path / name, TEXTS), val_share=0.1)
    train, val = (as_text(tokens) for tokens in tokens_in(folder))
    assert val == TEXTS[9::10]
    assert train == [text for at, text in enumerate(TEXTS) if at % 10 != 9]
    manifest = read_manifest(folder)
    assert (manifest.documents, manifest.dtype, manifest.tokenizer["vocab_size"]) == (300, "uint16", 256)
    assert sorted(file.name for file in folder.iterdir()) == [MANIFEST, "train-00000.bin", "val-00000.bin"]


def test_shards_are_one_row_of_tokens_whatever_their_size(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    whole = load_corpus(prepared(tmp_path, file, out="whole"), vocab_size=256, seq_len=32)
    small = load_corpus(prepared(tmp_path, file, out="small", shard_tokens=41), vocab_size=256, seq_len=32)
    assert len(read_manifest(tmp_path / "small").train) > 100
    assert whole.digest() == small.digest()
    for step in range(20):
        for one, other in zip(whole.batch(step, 8, 32, 3), small.batch(step, 8, 32, 3), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(whole.validation(4, 32)[0], small.validation(4, 32)[0])


def test_joined_rows_slice_like_one_array() -> None:
    row = np.arange(100, dtype=np.uint16)
    joined = Joined([row[:1], row[1:40], row[40:41], row[41:]])
    assert len(joined) == 100 and joined.nbytes == 200
    for start in range(-3, 101, 7):
        for stop in range(-3, 103, 5):
            assert np.array_equal(joined[start:stop], row[start:stop])


def test_hugging_face_tokenizers_by_file_folder_and_transformers_agree(tmp_path: Path, words: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    folders = [
        prepared(tmp_path, file, out="file", tokenizer=str(words / "tokenizer.json")),
        prepared(tmp_path, file, out="folder", tokenizer=str(words)),
    ]
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoTokenizer.from_pretrained(str(words), local_files_only=True)
    expected = [one for at, text in enumerate(TEXTS) if at % 100 != 99 for one in [*found.encode(text), 0]]
    for folder in folders:
        train, val = tokens_in(folder)
        assert train.tolist() == expected
        assert found.decode(val.tolist()).split("<|endoftext|>")[:3] == TEXTS[99::100]
        assert read_manifest(folder).tokenizer["end_token"] == 0
    # A folder without tokenizer.json goes through transformers.
    slow = tmp_path / "slow"
    slow.mkdir()
    found.save_pretrained(slow)
    (slow / "tokenizer.json").rename(slow / "kept.json")
    with pytest.raises(DataError, match="transformers cannot load it"):
        find_tokenizer(str(slow))


def test_large_vocabularies_are_uint32(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        name="wide",
        vocab_size=128_000,
        end_token=127_999,
        sha256="",
        encode=lambda texts: [[70_000, 5]] * len(texts),
        decode=str,
    )
    prepare(find_source([str(jsonl(tmp_path / "a.jsonl", TEXTS))]), tmp_path / "out", tokenizer)
    train, _ = tokens_in(tmp_path / "out")
    assert train.dtype == np.uint32
    assert train[:3].tolist() == [70_000, 5, 127_999]
    with pytest.raises(DataError, match=r"holds token 127999 of tokenizer wide.*vocabulary has 50257"):
        load_corpus(tmp_path / "out", vocab_size=50257, seq_len=8)


def test_few_documents_hold_back_the_end_of_the_tokens(tmp_path: Path) -> None:
    text = "One long text of some lines.\n" * 500
    (tmp_path / "a.txt").write_text(text)
    train, val = tokens_in(prepared(tmp_path, tmp_path / "a.txt", val_share=0.05, shard_tokens=300, end_token="none"))
    assert bytes(np.concatenate([train, val]).astype(np.uint8)).decode() == text
    assert len(val) == int(len(text) * 0.05)


def test_long_text_files_are_read_in_pieces_that_change_nothing(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    whole = prepared(tmp_path, tmp_path / "a.txt", out="whole", tokenizer=str(words))
    monkeypatch.setattr("paci_rt.data.documents.PIECE_CHARACTERS", 100)
    pieces = prepared(tmp_path, tmp_path / "a.txt", out="pieces", tokenizer=str(words))
    assert len(list(find_source([str(tmp_path / "a.txt")]).documents())) > 20
    assert [one.tolist() for one in tokens_in(whole)] == [one.tolist() for one in tokens_in(pieces)]


def test_names_say_what_is_for_validation_and_for_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    jsonl(folder / "train-00000-of-00001.jsonl", TEXTS[:50])
    jsonl(folder / "validation-00000-of-00001.jsonl", TEXTS[50:60])
    jsonl(folder / "test-00000-of-00001.jsonl", TEXTS[60:])
    (folder / "README.md").write_text("not data")
    assert main(["prepare", "--data", str(folder), "--out", str(tmp_path / "out")]) == 0
    train, val = (as_text(tokens) for tokens in tokens_in(tmp_path / "out"))
    assert (train, val) == (TEXTS[:50], TEXTS[50:60])
    assert "test-00000-of-00001.jsonl is left out" in capsys.readouterr().err


def test_splits_of_a_data_set_say_what_is_for_validation(tmp_path: Path) -> None:
    parts = {"train": TEXTS[:50], "validation": TEXTS[50:60], "test": TEXTS[60:]}
    made = pytest.importorskip("datasets").DatasetDict({name: as_dataset(texts) for name, texts in parts.items()})
    made.save_to_disk(str(tmp_path / "saved"))
    train, val = (as_text(tokens) for tokens in tokens_in(prepared(tmp_path, tmp_path / "saved")))
    assert (train, val) == (TEXTS[:50], TEXTS[50:60])


# --------------------------------------------------------------------------------------------------------- bad input


def holding(content: str | bytes) -> Any:
    """What makes a file of that content."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


BAD: dict[str, tuple[str, Any, list[str], str]] = {
    "nothing": ("a.txt", None, [], "a.txt does not exist"),
    "empty file": ("a.txt", holding(""), [], "all documents are empty"),
    "empty rows": ("a.jsonl", holding('{"text": ""}\n' * 2), [], "all documents are empty"),
    "empty folder": ("a", lambda path: path.mkdir(), [], "holds no file"),
    "zero bytes": ("a.txt", holding(b"ab\0cd"), [], "zero bytes"),
    "another encoding": ("a.txt", holding("Stra\xdfe\n".encode("latin-1") * 20), [], "not UTF-8"),
    "no such key": ("a.jsonl", holding('{"body": "x"}\n'), [], "line 1 has no 'text', but body"),
    "no text there": ("a.jsonl", holding('{"text": "x"}\n{"text": 3}\n'), [], "line 2: 'text' is 3"),
    "no JSON": ("a.jsonl", holding('{"text": "x"}\n{"text": \n'), [], "line 2 is no JSON"),
    "damaged gzip": ("a.jsonl.gz", holding(gzip.compress(b'{"text": "x"}' * 99)[:-9]), [], "a.jsonl.gz"),
    "one letter": ("a.txt", holding("x"), ["--end-token", "none"], "nothing is left for the train"),
    "no tokenizer": ("a.txt", holding("x"), ["--tokenizer", "nowhere"], "neither a file nor a folder"),
    "no end token": ("a.txt", holding("x"), ["--end-token", "<s>"], "it has only 0"),
    "share": ("a.txt", holding("x"), ["--val-share", "1.5"], "--val-share is 1.5"),
    "shards": ("a.txt", holding("x"), ["--shard-tokens", "0"], "--shard-tokens is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, make, options, words = BAD[case]
    if make is not None:
        make(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    assert main(["prepare", "--data", str(tmp_path / name), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err, said.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_document_late_leaves_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS * 30)
    with file.open("a") as stream:
        stream.write('{"body": 1}\n')
    with pytest.raises(DataError, match="line 9001"):
        prepared(tmp_path, file, shard_tokens=1000)
    assert list(tmp_path.iterdir()) == [file]


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer"):
        find_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="tiktoken"):
        find_tokenizer("tiktoken:nothing")


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "dataset_info.json").touch()
    (tmp_path / "tokenizer.json").write_text("{}")
    for module in ("pyarrow.parquet", "datasets", "tiktoken", "tokenizers"):
        monkeypatch.setitem(sys.modules, module, None)
    for words, call in (
        ("pip install pyarrow", lambda: list(find_source([str(tmp_path / "a.parquet")]).documents())),
        ("pip install datasets", lambda: find_source([str(tmp_path)])),
        ("pip install tiktoken", lambda: find_tokenizer("tiktoken:gpt2")),
        ("pip install tokenizers", lambda: find_tokenizer(str(tmp_path / "tokenizer.json"))),
    ):
        with pytest.raises(DataError, match=words):
            call()


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepared(tmp_path, file)
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    with pytest.raises(DataError, match="is there already"):
        prepared(tmp_path, file)
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    prepared(tmp_path, file, out="empty")


@pytest.fixture
def no_room() -> Iterator[None]:
    """Files of at most 4 KiB, which the system says like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing(tmp_path: Path, no_room: None) -> None:
    source = tmp_path / "texts"
    text_files(source, ["some text " * 90] * 10)
    with pytest.raises(DataError, match=r"cannot write .*out: File too large: make room"):
        prepared(tmp_path, source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        prepared(tmp_path, jsonl(tmp_path / "a.jsonl", TEXTS), out="file/out")


@pytest.mark.slow
def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ["some text " * 1000] * 20000)
    command = [sys.executable, "-m", "paci_rt", "prepare", "--data", str(file), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".out-*.part/*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143
    assert "stopped by SIGTERM; nothing was written" in said
    assert list(tmp_path.iterdir()) == [file]


def test_the_order_of_documents_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        jsonl(tmp_path / "data" / name, [name])
    source = find_source([str(tmp_path / "data")])
    assert isinstance(source, Source)
    assert [document.text for document in source.documents()] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_the_manifest_is_what_json_asks_for(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = {"--data": "a.jsonl", "--out": "out", "--json": "r.json"}
    assert main(["prepare", *(one for flag, name in arguments.items() for one in (flag, str(tmp_path / name)))]) == 0
    assert (tmp_path / "r.json").read_text() == (tmp_path / "out" / MANIFEST).read_text()


@pytest.mark.slow
def test_a_run_on_prepared_bytes_and_its_resume_see_the_same_batches(tmp_path: Path) -> None:
    """Three stages saved after four steps, then resumed as one stage, end where two stages end in one go."""
    folder = prepared(tmp_path, jsonl(tmp_path / "a.jsonl", TEXTS * 20), val_share=0.1)
    common = ["--data", str(folder), "--schedule", "1f1b", "--seq-len", "32", "--eval-batches", "1"]
    common += ["--eval-interval", "0"]
    common += ["--transport", "local", "--warmup-steps", "0", "--lr-steps", "8"]
    results = []
    for options in (
        ["--stages", "2", "--steps", "8"],
        ["--stages", "3", "--steps", "4", "--out", str(tmp_path / "saved")],
        ["--stages", "1", "--steps", "8", "--resume", str(tmp_path / "saved")],
    ):
        assert main(["train", *common, *options, "--json", str(tmp_path / "r.json")]) == 0
        results.append(json.loads((tmp_path / "r.json").read_text()))
    assert results[0]["params_sha256"] == results[2]["params_sha256"] != results[1]["params_sha256"]
    losses = [[point["loss"] for point in one["curve"]] for one in results]
    assert losses[0] == losses[1] + losses[2]
    assert all(one["data_stall_s"] >= 0 for one in results)


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    """Its documents would be trained on and held back."""
    (tmp_path / "in").mkdir()
    file = jsonl(tmp_path / "in" / "a.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(file)
    for names in ([file, file], [file.parent, file], [file, tmp_path / "link.jsonl"]):
        with pytest.raises(DataError, match=r"--data has .*\.jsonl twice, the first time as .*: leave one"):
            find_source([str(name) for name in names])
