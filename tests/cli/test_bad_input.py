"""Bad input of a training run: one line with the remedy, exit code 2 (1 where the disk is full), the last good
checkpoint intact."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from paci_rt import checkpoint, cli

TRAIN = ["train", "--steps", "2", "--batch-size", "2", "--accumulation", "2", "--seq-len", "8", "--eval-batches", "1"]
TRAIN += ["--transport", "local", "--stages", "2"]
MORE = [*TRAIN, "--steps", "4", "--resume", "run", "--out", "run"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens of bytes in two shards, and a run on them."""
    folder = tmp_path_factory.mktemp("good")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
        assert cli.main(["prepare", "--data", "text.txt", "--tokenizer", "bytes", "--out", "tokens"]) == 0
        assert cli.main([*TRAIN, "--data", "tokens", "--out", "run"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the checkpoint in it must be the same afterwards."""
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    monkeypatch.chdir(copy)
    return copy


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".pt", ".json") or path.name.startswith(".")
    }


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], words: str, code: int = 2) -> str:
    before = contents(Path("run"))
    capsys.readouterr()
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("paci-rt: error: ")]
    assert len(lines) == 1, err
    if code == 2:
        assert out == ""
        assert err == f"{lines[0]}\n"
    assert re.search(words, lines[0]), lines[0]
    assert contents(Path("run")) == before
    return lines[0]


def shard() -> Path:
    return next(path for path in sorted(Path("tokens").rglob("*.bin")) if "train" in path.name)


@pytest.mark.parametrize("cut", [1, 2, 1000])
def test_truncated_shards(place: Path, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    path = shard()
    path.write_bytes(path.read_bytes()[:-cut])
    refused(capsys, [*MORE, "--data", "tokens"], re.escape(path.name))


@pytest.mark.parametrize("how", ["unlink", "folder", "link"])
def test_a_missing_shard(place: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    path = shard()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to("nowhere")
    refused(capsys, [*MORE, "--data", "tokens"], re.escape(path.name))


@pytest.mark.parametrize("token", [256, 300, 50256])
def test_tokens_of_another_vocabulary(place: Path, capsys: pytest.CaptureFixture[str], token: int) -> None:
    Path("foreign.bin").write_bytes(np.full(4000, token, dtype=np.uint16).tobytes())
    refused(capsys, [*MORE, "--data", "foreign.bin"], rf"foreign\.bin.*{token}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "gpt-mini"], "--resume run was trained with --model gpt-tiny, not gpt-mini; use --model gpt-tiny"),
        (["--layers", "4"], "whose layers is 8, not 4"),
        (["--width", "64"], "whose width is 128, not 64"),
        (["--family", "llama"], "--model gpt-tiny"),
        (["--optimizer", "lion"], "use --optimizer adamw"),
        (["--dtype", "bf16"], "use --dtype fp32"),
    ],
)
def test_a_checkpoint_of_another_model(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    refused(capsys, [*MORE, "--data", "tokens", *options], words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stages", "9"], "9 stages, but gpt-tiny has only 8 blocks"),
        (["--stages", "0"], "stages"),
        (["--replicas", "2", "--batch-size", "4"], "--transport local"),
        (["--replicas", "3", "--transport", "auto"], "--batch-size 2 cannot be cut into"),
        (["--partition", "8,8"], "--partition 8,8 must give"),
        (["--zero1"], "--zero1 is for several replicas"),
    ],
)
def test_stages_and_replicas_that_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    refused(capsys, [*MORE, "--data", "tokens", *options], words)


@pytest.mark.parametrize("limit", [0, 4096, 200_000])
@pytest.mark.parametrize("beside", ["--async-checkpoint", "--no-async-checkpoint"])
def test_a_full_disk(place: Path, capsys: pytest.CaptureFixture[str], limit: int, beside: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        argv = [*MORE, "--data", "tokens", "--save-interval", "1", "--no-eval-drained", beside]
        line = refused(capsys, argv, "cannot (write|be written)|File too large", code=2 if limit == 0 else 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "make room" in line or "give another folder" in line
    assert checkpoint.verify("run")["windows"] == 2
