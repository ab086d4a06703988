"""Files as they come: split by folders, tables of other kinds, compressed, and what is no text at all."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paci_rt.cli import main
from paci_rt.data.documents import find_source
from paci_rt.data.prepare import prepare
from paci_rt.data.shards import open_prepared
from paci_rt.data.tokenizers import find_tokenizer
from paci_rt.errors import DataError
from paci_rt.train.data import load_corpus
from paci_rt.train.text import tokenizer_of_run

TEXTS = [f'Document {at}, with a "comma".\nAnd a second line.' for at in range(20)]


def prepared(out: Path, *names: Path) -> tuple[list[str], list[str]]:
    """The texts to train on and those for validation."""
    prepare(find_source([str(name) for name in names]), out, find_tokenizer("bytes"), val_share=0.1)
    parts = open_prepared(out, 1 << 32)
    train, val = (bytes(np.array(tokens[:]).astype(np.uint8)).decode().split("\0")[:-1] for tokens in parts)
    return train, val


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": at, "text": text}) + "\n" for at, text in enumerate(texts)).encode()


def table(texts: list[str], delimiter: str = ",") -> bytes:
    stream = io.StringIO(newline="")
    rows = csv.writer(stream, delimiter=delimiter)
    rows.writerows([("id", "text"), *enumerate(texts)])
    return stream.getvalue().encode()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train/0.jsonl", "val/0.jsonl", "test/0.jsonl"),
        ("data/train/a.jsonl", "data/validation/a.jsonl", "data/Test/a.jsonl"),
        ("x-train.jsonl", "x-dev.jsonl", "x-test.jsonl"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("Stories-train.txt", "Stories-valid.txt", "Stories-test.txt"),
        ("train.txt.gz", "val.txt.gz", "test.txt.gz"),
    ],
)
def test_names_of_files_and_folders_say_what_is_held_back(tmp_path: Path, train: str, val: str, test: str) -> None:
    for name, texts in ((train, TEXTS[:12]), (val, TEXTS[12:15]), (test, TEXTS[15:])):
        content = lines(texts) if "jsonl" in name else "\0".join(texts).replace("\0", "\n").encode()
        put(tmp_path / "dev" / name, gzip.compress(content) if name.endswith(".gz") else content)
    source = find_source([str(tmp_path / "dev")])
    assert source.tests == (test,)
    found = prepared(tmp_path / "out", tmp_path / "dev")  # the folder above says nothing: it is the user's
    wanted = [TEXTS[:12], TEXTS[12:15]]
    assert [*found] == (wanted if "jsonl" in train else [["\n".join(one)] for one in wanted])


def test_a_word_in_the_name_of_a_text_says_nothing_by_itself(tmp_path: Path) -> None:
    for name in ("test pilots.txt", "val d'isere.txt", "notes.txt"):
        put(tmp_path / "prose" / name, name.encode() * 20)
    source = find_source([str(tmp_path / "prose")])
    assert len(source.files) == 3 and not source.held_back and not source.tests


def test_only_validation_data_is_data(tmp_path: Path) -> None:
    train, val = prepared(tmp_path / "out", put(tmp_path / "validation.jsonl", lines(TEXTS)))
    assert (len(train), len(val)) == (18, 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(TEXTS)),
        ("a.tsv", table(TEXTS, "\t")),
        ("a.csv.gz", gzip.compress(table(TEXTS))),
        ("bom.csv", b"\xef\xbb\xbf" + table(TEXTS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(TEXTS)),
        ("a.jsonl.bz2", bz2.compress(lines(TEXTS))),
        ("A.JSONL.XZ", lzma.compress(lines(TEXTS))),
        ("a.ndjson", lines(TEXTS)),
    ],
)
def test_rows_of_other_kinds(tmp_path: Path, name: str, content: bytes) -> None:
    plain = prepared(tmp_path / "plain", put(tmp_path / "plain.jsonl", lines(TEXTS)))
    assert prepared(tmp_path / "out", put(tmp_path / name, content)) == plain


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, lambda text: b"\xef\xbb\xbf" + text])
def test_text_that_is_packed(tmp_path: Path, pack: Any) -> None:
    text = "\n".join(TEXTS).encode()
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}.get(pack, "")
    plain = prepared(tmp_path / "plain", put(tmp_path / "plain.txt", text))
    assert prepared(tmp_path / "out", put(tmp_path / f"a.txt{ending}", pack(text))) == plain


BAD: dict[str, tuple[bytes, str]] = {
    "a.csv": (b"id,body\n1,x\n", "no column 'text' in its first line, but 'id, body'"),
    "b.csv": ("text\nStra\xdfe\n".encode("latin-1"), "is no CSV in UTF-8"),
    "empty.csv": (b"", "no column 'text' in its first line, but 'nothing'"),
    "null.jsonl": (b'{"text": "x"}\n{"text": null}\n', "line 2: 'text' is None, which is no text: take such rows out"),
    "a.bin": (b"abcd", "train --data as they are"),
    "a.zip": (b"PK", "unpack it first"),
    "a.arrow": (b"ARROW1", "save_to_disk"),
    "a.pdf": (b"%PDF", "take the text out"),
    "cut.txt.xz": (lzma.compress(b"abc" * 999)[:-20], "cannot read"),
    "bad.txt.xz": (b"no such thing", "cannot read"),
    "bad.jsonl.bz2": (b"no such thing", "cannot read"),
    "bad.csv.gz": (b"no such thing", "cannot read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = BAD[name]
    file = put(tmp_path / name, content)
    assert main(["prepare", "--data", str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said, said
    assert list(tmp_path.iterdir()) == [file]


def test_zstandard_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match="pip install zstandard"):
        prepared(tmp_path / "out", put(tmp_path / "a.jsonl.zst", b""))


def test_zstandard_is_read_and_its_errors_are_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """gzip, under the names of the library."""

        @staticmethod
        def open(file: Path, mode: str) -> Any:
            return gzip.open(file, mode)

    monkeypatch.setitem(sys.modules, "compression.zstd", Library)
    train, _ = prepared(tmp_path / "out", put(tmp_path / "a.jsonl.zst", gzip.compress(lines(TEXTS))))
    assert train[0] == TEXTS[0]
    with pytest.raises(DataError, match="cannot read"):
        prepared(tmp_path / "bad", put(tmp_path / "b.txt.zst", b"no such thing"))


def test_what_is_left_out_beside_tables_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "data" / "a.jsonl", lines(TEXTS))
    for name in ("README.md", "more.txt"):
        put(tmp_path / "data" / name, b"text")
    assert main(["prepare", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    assert "README.md and 1 more left out: there are tables beside it" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- what training reads


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "data/a.ndjson", "data/x/a.parquet", "data/dataset_info.json"]
)
def test_training_does_not_take_tables_for_text(tmp_path: Path, name: str) -> None:
    content = lines(TEXTS) * 20
    file = put(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    data = tmp_path / "data" if "data" in name else file
    with pytest.raises(DataError, match=r"paci-rt prepare --data"):
        load_corpus(str(data), vocab_size=256, seq_len=16)


def test_a_folder_of_code_with_some_json_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(tmp_path / "code" / "a.py", b"print(1)\n" * 99)
    put(tmp_path / "code" / "package.json", b'{"a": 1}\n' * 9)
    assert len(load_corpus(str(tmp_path / "code"), vocab_size=256, seq_len=16).train) > 800


@pytest.mark.parametrize("name", ["a.bin", "folder"])
def test_tokens_of_others_are_not_taken_for_bytes(tmp_path: Path, name: str) -> None:
    data = tmp_path / name
    if name == "folder":
        put(data / "train.bin", b"")
    with pytest.raises(ValueError, match="give --tokenizer"):
        tokenizer_of_run(256, str(data))
    assert tokenizer_of_run(256, str(tmp_path / "a.txt")).name == tokenizer_of_run(256, None).name == "bytes"
