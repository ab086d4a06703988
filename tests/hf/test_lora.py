"""Models with LoRA adapters of ``peft``: cut, trained, saved, merged."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt import checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
KINDS = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "o_proj", "gate_proj"],
}
VOCAB = 50


def base(name: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    if name == "gpt2":
        sizes = {"n_embd": 16, "n_head": 2, "n_layer": 4, "n_positions": 32}
        still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, **still))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **sizes))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **sizes, head_dim=8))


def wrapped(name: str, **options: Any) -> Any:
    model = base(name)
    torch.manual_seed(1)
    options = {"target_modules": KINDS[name], "fan_in_fan_out": name == "gpt2", "r": 2, "lora_alpha": 8} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def ids_of(seed: int) -> Tensor:
    return torch.randint(VOCAB, (8, 10), generator=torch.Generator().manual_seed(seed))


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def plain(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        for ids in ids_of(step).tensor_split(4):
            loss_fn(model(ids).logits, ids).backward()
        for param in model.parameters():
            if param.grad is not None:
                param.grad /= 4
        optimizer.step()


def pipe_of(model: Any, schedule: str = "1f1b", stages: int = 2, optimizer: Any = torch.optim.AdamW) -> Any:
    return paci_rt.LocalPipeline(
        paci_rt.hf.split(model, stages),
        schedule=schedule,
        n_microbatches=4,
        loss_fn=loss_fn,
        optimizer=lambda named: optimizer([param for _, param in named], lr=1e-2),
    )


def train(pipe: Any, steps: int) -> None:
    for step in range(steps):
        pipe.step(ids_of(step), target=ids_of(step), return_outputs=False)
    pipe.drain()


def params(pipe: Any) -> dict[str, Tensor]:
    copies = {tie.reader for tie in pipe.stages[0].submod.tied_weights}
    return {name: param.detach() for name, param in pipe.named_parameters() if name not in copies}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"modules_to_save": ["lm_head"]},
    {"use_dora": True},
    {"layers_to_transform": [3]},
    {"bias": "lora_only"},
    {"use_rslora": True, "rank_pattern": {"c_attn": 4, "q_proj": 4}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_flush_schedules_give_the_bits_of_plain_training(name: str, options: dict[str, Any]) -> None:
    whole, before = wrapped(name, **options), wrapped(name, **options)
    plain(whole, 2)
    wanted = {key: param.detach() for key, param in whole.named_parameters()}
    changed = {key for key, param in before.named_parameters() if not torch.equal(wanted[key], param)}
    assert changed == {key for key, param in whole.named_parameters() if param.requires_grad}
    for schedule in ("1f1b", "zb-h1"):
        pipe = pipe_of(wrapped(name, **options), schedule)
        train(pipe, 2)
        found = params(pipe)
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], schedule


@pytest.mark.parametrize("name", KINDS)
def test_what_is_frozen_takes_no_memory_but_its_own(name: str) -> None:
    model = wrapped(name)
    adapters = sum(param.numel() for param in model.parameters() if param.requires_grad)
    pipe = pipe_of(model, "paci", optimizer=paci_rt.AdamW)
    before = {key: value.clone() for key, value in params(pipe).items()}
    train(pipe, 3)
    changed = {key for key, value in params(pipe).items() if not torch.equal(value, before[key])}
    assert changed == {key for key, param in model.named_parameters() if param.requires_grad}
    memory = pipe.stats()["memory"].values()
    padding = 64 * 4 * 40  # of flat buffers
    assert 4 * adapters <= sum(parts["accumulators"] for parts in memory) <= 4 * adapters + padding
    assert 8 * adapters <= sum(parts["optimizer"] for parts in memory) <= 8 * adapters + 2 * padding
    assert pipe.stats()["max_drift"] == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_read_by_peft_with_the_same_logits(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = wrapped(name, **options)
    pipe = pipe_of(model)
    train(pipe, 1)
    model.eval()
    with torch.no_grad():
        wanted = model(ids_of(9)).logits
    paci_rt.hf.save_pretrained(pipe, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids_of(9)).logits, wanted)
    model.save_pretrained(tmp_path / "theirs")
    theirs = (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == theirs
    ours, their = ((tmp_path / part / "adapter_config.json").read_text() for part in (".", "theirs"))
    assert ours == their
    paci_rt.hf.save_pretrained(pipe, tmp_path)  # again, in place


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_merged_model_is_that_of_peft(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = wrapped(name, **options)
    pipe = pipe_of(model)
    train(pipe, 1)
    if name == "gpt2" and "modules_to_save" in options:
        with pytest.raises(ValueError, match="the head is tied to the embedding and one of them has an adapter"):
            paci_rt.hf.save_pretrained(pipe, tmp_path / "new", merge_adapters=True)
        assert not (tmp_path / "new").exists()
        return
    paci_rt.hf.save_pretrained(pipe, tmp_path, merge_adapters=True)
    loaded, told = type(base(name)).from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload().eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids_of(9)).logits, merged(ids_of(9)).logits)


def test_a_run_goes_on_from_a_checkpoint_and_from_its_adapters(tmp_path: Path) -> None:
    straight = pipe_of(wrapped("llama"), "paci")
    train(straight, 2)
    checkpoint.save(tmp_path / "run", straight)
    paci_rt.hf.save_pretrained(straight, tmp_path / "adapter")
    train(straight, 2)
    resumed = pipe_of(wrapped("llama"), "paci", stages=2)
    checkpoint.load(tmp_path / "run", resumed)
    train(resumed, 2)
    assert all(torch.equal(value, params(straight)[key]) for key, value in params(resumed).items())
    again = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "adapter", is_trainable=True)
    train(pipe_of(again), 1)


def on_rank(rank: int, group: Any, folder: str, name: str) -> None:
    model = wrapped(name)
    module = paci_rt.hf.stage(model, rank, 2)
    stage = paci_rt.PipelineStage(module, rank, 2, group=group)
    pipe = paci_rt.SchedulePACI(stage, 4, loss_fn, optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-2))
    train(pipe, 2)
    paci_rt.hf.save_pretrained(pipe, folder)
    paci_rt.hf.save_pretrained(pipe, f"{folder}/merged", merge_adapters=True)
    pipe.close()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_processes_save_one_adapter(tmp_path: Path, workers: Any, name: str) -> None:
    workers.run(on_rank, 2, str(tmp_path), name)
    model = wrapped(name)
    pipe = pipe_of(model, "paci", optimizer=paci_rt.AdamW)
    train(pipe, 2)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors", "merged"]
    loaded = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    with torch.no_grad():
        wanted = model.eval()(ids_of(9)).logits
        assert torch.equal(loaded(ids_of(9)).logits, wanted)
        merged = type(base(name)).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(merged(ids_of(9)).logits, model.merge_and_unload()(ids_of(9)).logits)


def test_what_is_refused(tmp_path: Path) -> None:
    prompts = peft.get_peft_model(base("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    scales = peft.get_peft_model(
        base("llama"),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    )
    hadamard = peft.get_peft_model(base("llama"), peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for model, kind in ((prompts, "PROMPT_TUNING"), (scales, "IA3"), (hadamard, "LOHA")):
        with pytest.raises(ValueError, match=f"is of type {kind}: paci_rt cuts models with LoRA adapters only"):
            paci_rt.hf.split(model, 2)
    two = wrapped("llama")
    two.add_adapter("other", two.peft_config["default"])
    with pytest.raises(ValueError, match="the model has adapters default, other: keep the one"):
        paci_rt.hf.split(two, 2)
    inside = base("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), inside)
    with pytest.raises(ValueError, match=r"wrap the model with peft\.get_peft_model"):
        paci_rt.hf.split(inside, 2)
    with pytest.raises(ValueError, match="the model has no adapters of peft: leave it out"):
        paci_rt.hf.save_pretrained(pipe_of(base("llama")), tmp_path / "new", merge_adapters=True)
    wrapped("llama").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter and no model: load its base model"):
        paci_rt.hf.stage(tmp_path / "adapter", 0, 2)
