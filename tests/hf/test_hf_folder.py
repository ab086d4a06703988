"""A folder of transformers has one whole model at every moment: the old one or the new one."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.errors import CheckpointError
from paci_rt.hf.folder import switch, write_tensors
from paci_rt.hf.load import CONFIG, INDEX, WHOLE

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).view(2, 6)


class Dead(BaseException):
    """Nothing comes after it."""


class Crash:
    """Ends everything at one operation on files; later ones, such as those of a cleanup, do not happen either."""

    def __init__(self, at: int) -> None:
        self.left = at

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Dead
            return work(*args, **options)

        return counted


def llama(seed: int, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, num_hidden_layers=layers, max_position_embeddings=16, **sizes)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"  # as save_pretrained writes them
    return transformers.LlamaForCausalLM(config).eval()


def pipe_of(model: Any) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        paci_rt.hf.split(model, 2, check=False),
        schedule="1f1b",
        n_microbatches=2,
        loss_fn=lambda logits, ids: nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        optimizer=paci_rt.AdamW,
    )


def save(model: Any, folder: Path, *, sharded: bool) -> None:
    """As one process does, or as two do one after the other."""
    if not sharded:
        paci_rt.hf.save_pretrained(pipe_of(model), folder)
        return
    folder.mkdir(exist_ok=True)
    files, state = {}, model.state_dict()
    for rank, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        tensors = {name: state[name] for name in names}
        name = write_tensors(folder, tensors, f"model-{rank + 1:05d}-of-00002.safetensors")
        files[name] = names, sum(one.nbytes for one in tensors.values())
    switch(folder, files, [model.config, model.generation_config])


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Crash]]:
    def make(at: int) -> Crash:
        crash = Crash(at)
        for name in ("replace", "rename", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, crash.around(getattr(os, name)))
        monkeypatch.setattr(safetensors.torch, "save_file", crash.around(safetensors.torch.save_file))
        return crash

    yield make
    monkeypatch.undo()


@pytest.mark.parametrize("new", [False, True], ids=["to-whole", "to-sharded"])
@pytest.mark.parametrize("old", [False, True], ids=["from-whole", "from-sharded"])
def test_a_crash_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, crashing: Any, monkeypatch: pytest.MonkeyPatch, old: bool, new: bool
) -> None:
    first, second = llama(0), llama(1)
    with torch.no_grad():
        before, after = first(IDS).logits, second(IDS).logits
    seen = []
    for at in range(40):
        folder = tmp_path / str(at)
        save(first, folder, sharded=old)
        assert torch.equal(logits_of(folder), before)
        crash = crashing(at)
        try:
            save(second, folder, sharded=new)
        except Dead:
            done = False
        else:
            done = True
        monkeypatch.undo()
        found = logits_of(folder)
        seen.append("old" if torch.equal(found, before) else "new" if torch.equal(found, after) else "mixed")
        if done:
            break
        assert crash.left < 0
        save(second, folder, sharded=new)  # and the next save ends well and leaves nothing of it
        assert torch.equal(logits_of(folder), after)
        names = sorted(os.listdir(folder))
        assert not [name for name in names if name.startswith(".model")]
        assert len([name for name in names if name.endswith(".safetensors")]) == (2 if new else 1)
        assert (INDEX in names, WHOLE in names) == (new, not new)
    assert seen[-1] == "new"
    assert seen == sorted(seen, reverse=True)  # old ones, then new ones, and "mixed" never
    assert "mixed" not in seen
    assert seen.count("old") > 2


def test_another_model_in_the_folder_is_gone_before_its_configuration_is(tmp_path: Path, crashing: Any) -> None:
    first, second = llama(0, layers=2), llama(1, layers=3)
    with torch.no_grad():
        wanted = [first(IDS).logits, second(IDS).logits]
    states = set()
    for at in range(40):
        folder = tmp_path / str(at)
        save(first, folder, sharded=False)
        with pytest.MonkeyPatch.context() as patch:
            crash = Crash(at)
            for name in ("replace", "rename", "unlink", "rmdir"):
                patch.setattr(os, name, crash.around(getattr(os, name)))
            try:
                save(second, folder, sharded=False)
                done = True
            except Dead:
                done = False
        if (folder / CONFIG).exists():
            found = logits_of(folder)
            states.add(next(number for number, one in enumerate(wanted) if torch.equal(found, one)))
        else:
            states.add("no configuration")
            with pytest.raises(ValueError, match=f"has no {CONFIG}"):
                paci_rt.hf.stage(folder, 0, 2)
        if done:
            break
    assert states == {0, "no configuration", 1}


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_leaves_the_model_that_was_there(tmp_path: Path, limit: int) -> None:
    first, second = llama(0), llama(1)
    save(first, tmp_path, sharded=False)
    names = sorted(os.listdir(tmp_path))
    with torch.no_grad():
        before = first(IDS).logits
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    pipe = pipe_of(second)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OSError, match=r"cannot write the model to .*the one that was there is intact"):
            paci_rt.hf.save_pretrained(pipe, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(os.listdir(tmp_path)) == names
    assert torch.equal(logits_of(tmp_path), before)


def test_a_file_in_the_way_a_bad_index_and_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the model to .*file"):
        save(llama(0), tmp_path / "file", sharded=False)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../file", "y": 3}}))
    save(llama(0), tmp_path, sharded=False)
    assert (tmp_path / "file").exists()  # not one of the folder's
    assert not (tmp_path / INDEX).exists()
    names = sorted(os.listdir(tmp_path))
    bad = llama(1)
    with torch.no_grad():
        bad.model.norm.weight.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="is not finite"):
        save(bad, tmp_path, sharded=False)
    assert sorted(os.listdir(tmp_path)) == names
