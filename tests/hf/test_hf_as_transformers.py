"""Stages from a folder hold what ``from_pretrained`` gives, and what stages cannot do as the model does is refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install paci-rt[test]")
safetensors = pytest.importorskip("safetensors.torch")

VOCAB = 61
ENDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {**ENDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT = {**ENDS, "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64}
MAMBA = {"mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
DEEPSEEK = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "original_max_position_embeddings": 6, "rope_parameters": LONG}),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    # Tables that no file has and the class does not compute module by module: transformers reads the whole model.
    "falcon-h1": ("FalconH1ForCausalLM", {**GROUPED, **MAMBA}),
    # Routers stay in fp32 in a model of bf16.
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**SIZES, **EXPERTS, **DEEPSEEK, "first_k_dense_replace": 1}),
}


def make(name: str) -> Any:
    kind, options = TABLES[name]
    return build(kind, **options)


def build(kind: str, **options: Any) -> Any:
    cls = getattr(transformers, kind)
    torch.manual_seed(1)
    return cls(cls.config_class(**options)).eval()


IDS = torch.randint(3, VOCAB, (4, 10), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(stages: list[Any], **kwargs: Any) -> Tensor:
    value: Any = IDS
    for stage in stages:
        value = stage(value, **kwargs)
    return value  # type: ignore[no-any-return]


def stages_of(folder: Path, count: int = 2, **options: Any) -> list[Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*transformers reads the whole model")
        return [paci_rt.hf.stage(folder, at, count, **options).eval() for at in range(count)]


def as_loaded(stages: list[Any], loaded: Any) -> None:
    """Dtype and bits of all parameters and buffers, and the logits."""
    copies = {tie.reader for tie in stages[0].tied_weights}
    theirs = {**dict(loaded.named_parameters(remove_duplicate=False)), **dict(loaded.named_buffers())}
    seen = set(copies)
    for stage in stages:
        for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
            if name in theirs:
                assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
                seen.add(name)
    assert seen >= {name for name, _ in loaded.named_parameters()}
    assert torch.equal(run(stages), loaded(IDS, use_cache=False).logits)


@pytest.mark.parametrize("name", TABLES)
def test_a_folder_of_bf16_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    """Rotary tables in fp32 among them, which no file has."""
    model = make(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    as_loaded(stages_of(tmp_path), type(model).from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float16, torch.bfloat16])
def test_dtypes_asked_for_or_not_named(written: torch.dtype, asked: torch.dtype | None, tmp_path: Path) -> None:
    model = make("llama").to(written)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    change(tmp_path, dtype=None)
    as_loaded(stages_of(tmp_path, dtype=asked), type(model).from_pretrained(tmp_path, dtype=asked or "auto").eval())


def test_a_model_is_given_another_dtype_but_not_its_tables() -> None:
    model = make("llama")
    whole = copy.deepcopy(model)
    table = whole.model.rotary_emb.inv_freq.clone()
    for param in whole.parameters():
        param.data = param.data.to(torch.bfloat16)
    stages = [paci_rt.hf.stage(copy.deepcopy(model), at, 2, dtype=torch.bfloat16).eval() for at in range(2)]
    as_loaded(stages, whole)
    assert torch.equal(stages[1].model.rotary_emb.inv_freq, table)
    stages = paci_rt.hf.split(make("llama"), 2)
    as_loaded([stage.to(torch.bfloat16).eval() for stage in stages], make("llama").to(torch.bfloat16))


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, at: int, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of one shard, and what the index says of them."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = sorted(set(index["weight_map"].values()))[at]
    tensors = safetensors.load_file(folder / file)
    edit(tensors)
    safetensors.save_file(tensors, folder / file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard(folder: Path, at: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[at]


def cut_off(folder: Path) -> None:
    shard(folder, -1).write_bytes(shard(folder, -1).read_bytes()[:-100])


def other_head(folder: Path) -> None:
    """A head of its own, and a configuration that ties it to the embedding."""
    change(folder, tie_word_embeddings=True)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: shard(folder, -1).unlink(), r"model-\S+ is not there: copy the folder again"),
    "cut off": (cut_off, r"model-\S+ cannot be read \(.*\): copy the folder again"),
    "empty": (lambda folder: shard(folder, -1).write_bytes(b""), r"model-\S+ cannot be read"),
    "a tensor less": (lambda folder: rewrite(folder, -1, lambda found: found.pop(min(found))), r"cannot be read \(.*"),
    "index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "is no index of tensors"),
    "index of nothing": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "is no index"),
    "tied": (other_head, r"different values for '\S+' and '\S+', .* ties: write \"tie_word_embeddings\": false"),
    "integers": (
        lambda folder: rewrite(folder, -1, lambda found: found.update({k: v.to(torch.int8) for k, v in found.items()})),
        r"in torch\.int8, which may be quantized",
    ),
    "quantized": (lambda folder: change(folder, quantization_config={"quant_method": "fp8"}), r"are quantized \(fp8\)"),
    "other class": (lambda folder: change(folder, architectures=["GPT2LMHeadModel"]), "of a 'llama' and names GPT2LM"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders_are_refused(name: str, tmp_path: Path) -> None:
    damage, words = DAMAGED[name]
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as told:
        stages_of(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("extra", [True, False])
def test_tensors_without_a_place_are_told(extra: bool, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    if extra:
        rewrite(tmp_path, 0, lambda found: found.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}))
    else:
        change(tmp_path, num_hidden_layers=3)
    with pytest.warns(UserWarning, match=r"has (1|9) tensors that its config\.json has no place for, such as 'model"):
        paci_rt.hf.stage(tmp_path, 0, 2)


ARGUMENTS: dict[str, tuple[Any, str]] = {
    "labels": (IDS, r"labels is given, and a stage computes no loss: give step\(target=labels\)"),
    "output_hidden_states": (True, "returns logits only: leave it out"),
    "output_attentions": (True, "returns logits only: leave it out"),
    "return_dict": (False, "return_dict is False, and a stage returns tensors"),
    "use_cache": (True, "keeps no cache"),
    "output_router_logits": (True, r"output_router_logits is True, and the model was cut with False: set config\."),
    "inputs_embeds": (torch.zeros(4, 10, 32), "several stages take token ids only"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_stages_would_not_answer_are_refused(name: str) -> None:
    value, words = ARGUMENTS[name]
    stages = paci_rt.hf.split(make("llama"), 2)
    for stage, given in zip(stages, (IDS, torch.zeros(4, 10, 32)), strict=True):
        with pytest.raises(ValueError, match=words):
            stage(given, **{name: value})
    if isinstance(value, bool):
        run(stages, **{name: not value})


SEQUENCE = {**ENDS, "d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5}


def replaced(name: str) -> Callable[[], Any]:
    def changed() -> Any:
        model = make("llama")
        part = model.get_submodule(name)
        part.forward = part.forward
        return model

    return changed


def hooked() -> Any:
    model = make("llama")
    model.register_forward_hook(lambda *_: None)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "opt": (lambda: build("OPTForCausalLM", **OPT), r"'model\.decoder' .*layerdrop is 0\.5.* set its attribute"),
    "bart": (lambda: build("BartForCausalLM", **SEQUENCE, decoder_layerdrop=0.5), r"leaves out layers at random"),
    "forward": (replaced(""), "the forward of LlamaForCausalLM was replaced on the object"),
    "inner forward": (replaced("model"), "the forward of 'model' of LlamaForCausalLM was replaced"),
    "hook": (hooked, "LlamaForCausalLM has a forward hook, which no stage would call"),
    "parallel": (lambda: nn.DataParallel(make("llama")), r"DataParallel wraps a model: .* its \.module"),
    "two heads": (lambda: build("GPT2DoubleHeadsModel", **GPT), "it has a head of its own for mc_logits"),
    "two heads, bert": (lambda: build("BertForPreTraining", **SIZES), r"a head of its own for prediction_logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_stages_would_not_be_are_refused(name: str) -> None:
    broken, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        paci_rt.hf.split(broken(), 2)


def test_a_layer_left_out_after_the_cut_is_an_error() -> None:
    stages = paci_rt.hf.split(build("OPTForCausalLM", **{**OPT, "layerdrop": 0.0}), 2)
    assert run(stages).shape == (4, 10, VOCAB)
    for stage in stages:
        stage.train().model.decoder.layerdrop = 1.0
    with pytest.raises(RuntimeError, match="left out layer 2, in front of which this stage ends"):
        stages[0](IDS)


@pytest.mark.parametrize("given", [[2.0, 2.0], "22", 4, [[2], [2]]])
def test_partitions_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"partition is .*: give 2 numbers of at least 1 that add up to 4 layers"):
        paci_rt.hf.split(make("llama"), 2, partition=given)
    assert len(paci_rt.hf.split(make("llama"), 2, partition=torch.tensor([1, 3]))) == 2


@pytest.mark.parametrize("given", [None, {}, 3])
def test_neither_a_model_nor_a_folder(given: Any) -> None:
    with pytest.raises(ValueError, match="is neither a model nor a folder"):
        paci_rt.hf.stage(given, 0, 2)
    with pytest.raises(ValueError, match="dtype is 'bfloat16': give one of torch"):
        paci_rt.hf.stage(nn.Linear(2, 2), 0, 2, dtype="bfloat16")  # type: ignore[arg-type]
