"""Models whose parts stand in another order than they run, whose layers return tuples, and that no cut is right for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.hf.layout import layout_of
from paci_rt.hf.probe import probe

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install paci-rt[test]")

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
FFN = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
OPT = {**SIZES, **ENDS, "ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0}

CUT: dict[str, tuple[str, dict[str, Any]]] = {
    # The last norm, or the head, stands in front of the layers.
    "opt": ("OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}),
    "opt-350m": ("OPTForCausalLM", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", FFN),
    "distilbert": ("DistilBertForMaskedLM", {**SIZES, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4}),
    # Layers return tuples.
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "falcon": ("FalconForCausalLM", {**SIZES, **ENDS}),
    "mpt": ("MptForCausalLM", {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {**SIZES, **ENDS, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    ),
    # Tables without parameters in front of the layers.
    "xglm": ("XGLMForCausalLM", {"vocab_size": VOCAB, "d_model": 32, "ffn_dim": 48, "num_layers": 4}),
    "esm": ("EsmForMaskedLM", {**FFN, "position_embedding_type": "rotary", "mask_token_id": 3}),
    # Others, that a registered order gets right: no change for them.
    "llama": ("LlamaForCausalLM", {**FFN, **ENDS}),
    "gemma3": ("Gemma3ForCausalLM", {**FFN, **ENDS, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}),
    "granite": ("GraniteForCausalLM", {**FFN, **ENDS, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}),
}


def make(name: str) -> Any:
    kind, options = CUT[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(1)
    options = {"attention_heads": 4, **options} if name == "xglm" else options
    return cls(cls.config_class(**options)).eval()


def ids_of(rows: int = 4) -> Tensor:
    return torch.randint(4, VOCAB, (rows, 10), generator=torch.Generator().manual_seed(3))


def run(stages: list[Any], ids: Tensor, **kwargs: Any) -> Tensor:
    value: Any = ids
    for stage in stages:
        value = stage(*(value if isinstance(value, tuple) else (value,)), **kwargs)
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CUT)
def test_all_of_it_gives_the_models_bits(name: str, tmp_path: Path) -> None:
    """Logits, with a mask too; one update; the saved folder, by transformers and stage by stage."""
    model = make(name)
    whole, ids, mask = copy.deepcopy(model), ids_of(), torch.ones(4, 10, dtype=torch.long)
    mask[:2, 7:] = 0
    stages = paci_rt.hf.split(model, 3)
    assert layout_of(model).sure
    with torch.no_grad():
        # A cache lays keys out in another way, and BLAS may then add up in another order.
        expected = whole(ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(run(stages, ids, attention_mask=mask), expected)

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    pipe = paci_rt.LocalPipeline(
        stages,
        schedule="1f1b",
        n_microbatches=2,
        loss_fn=loss_fn,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )
    losses: list[Tensor] = []
    pipe.step(ids, target=ids, losses=losses)
    pipe.drain()
    for loss, part in zip(losses, ids.tensor_split(2), strict=True):
        wanted = loss_fn(whole(part).logits, part)
        (wanted / 2).backward()
        assert torch.equal(loss.detach(), wanted.detach())
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    with torch.no_grad():
        trained = run(stages, ids)
        assert (trained - whole(ids).logits).norm() <= 1e-5 * trained.norm()  # a tie's gradients have another order
        paci_rt.hf.save_pretrained(pipe, tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids, use_cache=False).logits, trained)
        parts = [paci_rt.hf.stage(tmp_path, at, 3).eval() for at in range(3)]
        assert torch.equal(run(parts, ids), trained)


def auto(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_configuration_says_what_transformers_would_say(tmp_path: Path, dtype: torch.dtype) -> None:
    """Class and dtype, also of a model that was made from a configuration and never saved before."""
    model = make("llama").to(dtype)
    pipe = paci_rt.LocalPipeline(paci_rt.hf.split(model, 2), schedule="1f1b", n_microbatches=1)
    paci_rt.hf.save_pretrained(pipe, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = auto(tmp_path / "ours"), auto(tmp_path / "theirs")
    named = {"_name_or_path": ""}  # of the folder
    assert ours.to_dict() | named == theirs.to_dict() | named
    assert ours.architectures == ["LlamaForCausalLM"] and ours.dtype == dtype
    assert next(paci_rt.hf.stage(tmp_path / "ours", 0, 2).parameters()).dtype == dtype


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "shared layers": ("AlbertForMaskedLM", {**FFN, "embedding_size": 16}, "calls layer 0 as number 1"),
    "position bias": ("MPNetForMaskedLM", FFN, "layer 0 takes more than the hidden states from parameters"),
    "ids behind": ("LlamaForSequenceClassification", {**FFN, **ENDS}, "reads the token ids again behind its layers"),
    "ids behind, gpt2": ("GPT2ForSequenceClassification", {"n_embd": 32, "n_head": 4}, "has no head that gives"),
    "no head": ("LlamaModel", {**FFN, **ENDS}, "LlamaModel has no head"),
    "no head, bert": ("BertModel", FFN, "BertModel has no head"),
    "two lists": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48}, "has not one list of layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_cut_is_right_for_is_refused(name: str, tmp_path: Path) -> None:
    """From a folder too, where nothing is compared."""
    kind, options, words = REFUSED[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**{"vocab_size": VOCAB, **options}))
    with pytest.raises(ValueError, match=words):
        paci_rt.hf.split(model, 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        paci_rt.hf.stage(tmp_path, 0, 1)


def test_stages_that_cannot_run_are_refused() -> None:
    config = transformers.DebertaV2Config(**FFN, relative_attention=True, pos_att_type=["p2c", "c2p"])
    with pytest.raises(paci_rt.ParityError, match=r"stages of DebertaV2ForMaskedLM do not (run|give)"):
        paci_rt.hf.split(transformers.DebertaV2ForMaskedLM(config), 2)
    with pytest.raises(ValueError, match="is no model of transformers"):
        paci_rt.hf.split("llama/", 2)


def test_looking_changes_nothing() -> None:
    """Hooks are not called, modes, gradients and random numbers stay, and no memory is taken for weights."""
    model = make("llama").train()
    called: list[str] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: called.append("pre"))
    model.register_forward_hook(lambda *_: called.append("post"))
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, "model.layers", ["model.embed_tokens", "model.norm", "lm_head"])
    assert found is not None and found.before == {"model.embed_tokens"} and found.after == {"model.norm", "lm_head"}
    assert not called and model.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(model.model.layers[0]._forward_pre_hooks) == 1 and all(one.grad is None for one in model.parameters())
