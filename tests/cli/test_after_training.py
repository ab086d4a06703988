"""``paci-rt eval``, ``sample`` and ``export``: what a checkpoint is good for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from paci_rt import cli
from paci_rt.data.tokenizers import find_tokenizer
from paci_rt.train.families import FAMILIES
from paci_rt.train.saved import load_model

SMALL = ["--layers", "4", "--width", "32", "--heads", "4", "--steps", "4", "--batch-size", "4", "--accumulation", "2"]
SMALL += ["--seq-len", "16", "--eval-batches", "2", "--transport", "local", "--eval-interval", "0", "--lr", "0.01"]
RUNS: dict[str, list[str]] = {
    "gpt2": [],
    "gpt2-tied": ["--tied", "--stages", "3"],
    "gpt2-bf16": ["--dtype", "bf16"],
    "llama": ["--family", "llama", "--schedule", "1f1b"],
    "llama-tied": ["--family", "llama", "--tied", "--rope-base", "300"],
    "llama-bf16": ["--family", "llama", "--dtype", "bf16"],
    "encoder": ["--family", "encoder", "--tied"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small runs by name, each with the JSON of its result."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    for name, more in RUNS.items():
        argv = ["train", "--data", str(text), "--out", str(folder / name), "--json", str(folder / f"{name}.json")]
        assert cli.main([*argv, *SMALL, *more]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main([*argv, "--json", "result.json"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    found: dict[str, Any] = json.loads(Path("result.json").read_text())
    return found


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = sorted(os.listdir())
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"paci-rt: error: [^\n]+\n", err), err
    assert sorted(os.listdir()) == before
    return err


# ---------------------------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("name", RUNS)
def test_eval_gives_the_number_of_the_run(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = json.loads((runs / f"{name}.json").read_text())
    found = result_of(capsys, "eval", str(runs / name))
    assert (found["val_loss"], found["params_sha256"]) == (trained["val_loss"], trained["params_sha256"])
    assert (found["steps"], found["sequences"]) == (4, 8)
    assert found["tokens"] == 8 * (2 if name == "encoder" else 16)


def test_eval_on_other_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.txt").write_text("0123456789" * 400)
    own, other = (
        result_of(capsys, "eval", str(runs / "gpt2"), *more) for more in ([], ["--data", "other.txt", "--seq-len", "8"])
    )
    assert other["val_loss"] > own["val_loss"]
    assert other["tokens"] == 8 * 8
    more = result_of(capsys, "eval", str(runs / "gpt2"), "--eval-batches", "3", "--batch-size", "6")
    assert more["sequences"] == 18


def test_bad_evaluations_end_in_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs / "gpt2")
    assert "nowhere" in error_of(capsys, "eval", "nowhere")
    assert "--seq-len 300 exceeds the 256 positions" in error_of(capsys, "eval", run, "--seq-len", "300")
    assert "--data nothing.txt does not exist" in error_of(capsys, "eval", run, "--data", "nothing.txt")
    assert "--batch-size 5 cannot be cut into 2" in error_of(capsys, "eval", run, "--batch-size", "5")
    assert "--eval-batches is 0" in error_of(capsys, "eval", run, "--eval-batches", "0")
    assert "required: RUN" in error_of(capsys, "eval")
    assert "unknown option --see-len: did you mean '--seq-len'?" in error_of(capsys, "eval", run, "--see-len", "3")


def test_damaged_and_foreign_checkpoints_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from torch import nn

    import paci_rt
    from paci_rt import checkpoint

    for command in (["eval"], ["sample", "--prompt", "To"], ["export", "--to", "new"]):
        shutil.copytree(runs / "gpt2", "copy")
        part = next(Path("copy").glob("*.pt"), None) or sorted(Path("copy").glob("stage*"))[0]
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
        assert "is damaged" in error_of(capsys, command[0], "copy", *command[1:])
        shutil.rmtree("copy")
        pipeline = paci_rt.LocalPipeline(
            [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        )
        checkpoint.save("copy", pipeline)
        assert "was not written by paci-rt train" in error_of(capsys, command[0], "copy", *command[1:])
        shutil.rmtree("copy")


# -------------------------------------------------------------------------------------------------------------- sample


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gpt2-bf16"])
def test_sample(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sample", str(runs / name), "--prompt", "To be", "--tokens", "12"]
    found = result_of(capsys, *argv)
    assert found["text"].startswith("To be")
    assert len(found["tokens"]) == 12
    assert result_of(capsys, *argv) == found
    assert result_of(capsys, *argv, "--seed", "1")["tokens"] != found["tokens"]
    greedy = result_of(capsys, *argv, "--temperature", "0")
    assert result_of(capsys, *argv, "--top-k", "1", "--seed", "9")["tokens"] == greedy["tokens"]
    module = load_model(runs / name).module
    tokens = list(b"To be")
    for drawn in greedy["tokens"]:
        assert int(module(torch.tensor([tokens]))[0, -1].argmax()) == drawn
        tokens.append(drawn)
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == found["text"] + "\n"


def test_sampling_goes_past_the_context(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result_of(capsys, "sample", str(runs / "gpt2"), "--prompt", "x" * 254, "--tokens", "6")
    assert len(found["tokens"]) == 6


def test_draws_follow_the_model(runs: Path) -> None:
    """Frequencies of the first token over many seeds, against the model's shares at that temperature."""
    from paci_rt.train.sampling import generate

    saved = load_model(runs / "llama")
    prompt = torch.tensor(list(b"To"))
    logits = saved.module(prompt[None])[0, -1].double()
    top = logits.topk(5)
    shares = torch.softmax(top.values / 0.5, dim=0)
    drawn = [
        int(generate(saved.module, saved.shape, prompt, count=1, temperature=0.5, top_k=5, seed=seed))
        for seed in range(400)
    ]
    for name, share in zip(top.indices.tolist(), shares.tolist(), strict=True):
        assert abs(drawn.count(name) / 400 - share) < 5 * (share * (1 - share) / 400) ** 0.5 + 1e-9
    assert set(drawn) <= set(top.indices.tolist())


def test_bad_samples_end_in_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs / "gpt2")
    assert "required: --prompt" in error_of(capsys, "sample", run)
    for options, words in (
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "\udcff"], "--prompt '\\udcff' is no Unicode text: give it as UTF-8"),
        (["--prompt", "a", "--tokens", "0"], "--tokens is 0: give an integer from 1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0: give 0, or a number"),
        (["--prompt", "a", "--top-k", "0"], "--top-k is 0"),
        (["--prompt", "a", "--tokenizer", "nothing"], "--tokenizer 'nothing' is neither a file nor a folder"),
        (["--prompt", "a", "--tokenizer", "tiktoken:nothing"], "--tokenizer"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1"),
    ):
        assert words in error_of(capsys, "sample", run, *options)
    encoder = error_of(capsys, "sample", str(runs / "encoder"), "--prompt", "a")
    assert "a model of the family encoder, which fills in masked tokens and cannot go on with a text" in encoder


def word_tokenizer(folder: Path, words: int) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    names = {"[UNK]": 0} | {f"w{i}": i for i in range(1, words)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    found.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_tokenizers(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By option, by the manifest of the run's data, and of another vocabulary."""
    fits, large = word_tokenizer(Path("fits"), 100), word_tokenizer(Path("large"), 400)
    run = str(runs / "gpt2")
    found = result_of(capsys, "sample", run, "--prompt", "w3 w5", "--tokenizer", fits, "--tokens", "2")
    assert found["text"].startswith("w3 w5")
    assert list(find_tokenizer(fits).encode(["w3 w5"])[0]) == [3, 5]
    assert find_tokenizer(f"{fits}/tokenizer.json").decode([3, 5]) == "w3 w5"
    saved = json.loads(Path(fits, "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    Path("cuts.json").write_text(json.dumps(saved))
    assert list(find_tokenizer("cuts.json").encode(["w3 w5 w7"])[0]) == [3, 5, 7]  # whatever the file is set to
    Path("result.json").unlink()
    said = error_of(capsys, "sample", run, "--prompt", "w399", "--tokenizer", large)
    assert "makes token 399 of the prompt, and the model's vocabulary has 256" in said
    for part in ("train", "val"):
        Path(f"words/{part}.txt").parent.mkdir(exist_ok=True)
        Path(f"words/{part}.txt").write_text(" ".join(f"w{at % 90 + 1}" for at in range(3000)))
    assert cli.main(["prepare", "--data", "words", "--tokenizer", fits, "--end-token", "none", "--out", "tokens"]) == 0
    capsys.readouterr()
    argv = ["train", *SMALL, "--vocab-size", "100", "--data", "tokens", "--out", "run"]
    assert cli.main(argv) == 0
    assert result_of(capsys, "sample", "run", "--prompt", "w1")["text"].startswith("w1 ")
    Path("tokens/manifest.json").unlink()
    Path("result.json").unlink()
    said = error_of(capsys, "sample", "run", "--prompt", "w1")
    assert "nothing says what made the tokens of this model, whose vocabulary has 100: give --tokenizer" in said


# -------------------------------------------------------------------------------------------------------------- export


def loaded(folder: str, kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    model, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("gpt2")])
def test_what_is_exported_gives_the_same_logits(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = load_model(runs / name)
    found = result_of(capsys, "export", str(runs / name), "--to", "new/model")
    theirs = loaded("new/model", found["class"])
    assert theirs.dtype == ours.dtype
    assert sorted(os.listdir("new/model")) == ["config.json", "model.safetensors"]
    assert os.listdir("new") == ["model"]
    assert sum(one.numel() for one in theirs.parameters()) == found["parameters"]
    for shape in ((1, 1), (2, 16), (3, 100), (1, 256)):
        tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.equal(theirs(input_ids=tokens).logits, ours.module(tokens)), shape


@pytest.mark.parametrize("name", ["gpt2", "gpt2-tied", "gpt2-bf16"])
def test_gpt2_is_exported_bit_for_bit(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 of transformers keeps its matrices transposed, and BLAS may then sum in another order: with ours laid out
    in memory as theirs, the logits are the same bits, and without they are within rounding."""
    ours = load_model(runs / name)
    found = result_of(capsys, "export", str(runs / name), "--to", "model")
    theirs = loaded("model", "GPT2LMHeadModel")
    assert found["class"] == "GPT2LMHeadModel"
    assert theirs.dtype == ours.dtype
    mine = dict(ours.module.named_parameters())
    assert {key for key, _ in theirs.named_parameters()} == set(mine)
    for key, value in theirs.named_parameters():
        turned = value.shape != mine[key].shape or key.endswith(("c_proj.weight", "c_attn.weight", "c_fc.weight"))
        assert torch.equal(value.t() if turned else value, mine[key]), key
    # One rounding of a sum of 32 terms, through 4 blocks: 16 times the spacing of numbers is far from any wrong weight.
    bound = 16 * torch.finfo(ours.dtype).eps
    shapes = ((1, 1), (2, 7), (2, 16), (3, 100), (1, 256))
    all_tokens = [torch.randint(256, shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    with torch.no_grad():
        for tokens in all_tokens:
            expected = ours.module(tokens).float()
            assert float((theirs(input_ids=tokens).logits.float() - expected).norm() / expected.norm()) < bound
        for key, value in ours.module.named_parameters():
            if key.endswith(("c_proj.weight", "c_attn.weight", "c_fc.weight")):
                value.data = value.data.t().contiguous().t()
        for tokens in all_tokens:
            assert torch.equal(theirs(input_ids=tokens).logits, ours.module(tokens)), tokens.shape


def test_export_leaves_what_is_there(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs / "llama")
    Path("full").mkdir()
    Path("full/config.json").write_text("{}")
    assert "--to full is not empty: name a new folder" in error_of(capsys, "export", run, "--to", "full")
    assert "--to full/config.json is no folder" in error_of(capsys, "export", run, "--to", "full/config.json")
    assert "--to /proc/new cannot be written" in error_of(capsys, "export", run, "--to", "/proc/new")
    Path("empty").mkdir()
    assert cli.main(["export", run, "--to", "empty"]) == 0
    first = hashlib.sha256(Path("empty/model.safetensors").read_bytes()).hexdigest()
    capsys.readouterr()
    assert "is not empty" in error_of(capsys, "export", run, "--to", "empty")
    assert hashlib.sha256(Path("empty/model.safetensors").read_bytes()).hexdigest() == first


def test_a_full_disk_leaves_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert cli.main(["export", str(runs / "llama"), "--to", "new"]) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err.splitlines()[-1]
    assert os.listdir() == []


def test_every_family_has_a_run() -> None:
    assert {name.split("-")[0] for name in RUNS} == set(FAMILIES)
